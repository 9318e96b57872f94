//! The lab and the CLI, as a person would use them, with JSON for answers.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;

use super::report::Report;

/// Where the CLI runs: a machine that keeps its network whatever is killed.
const DESK: &str = "lead-a";
/// How long a condition rests between two looks.
const REST: Duration = Duration::from_millis(100);
/// How long nothing may change before it counts as at rest: several looks of the leader's.
const AT_REST: Duration = Duration::from_millis(1500);
/// Where the demo's visitor is.
pub(crate) const VISITOR: &str = "shop/bookinfo/visitor/0";
/// The port of all of the shop's services.
pub(crate) const PORT: u16 = 9080;

/// A lab with the product in it; goes down when it is dropped.
#[derive(Debug)]
pub(crate) struct Mesh {
    weft: PathBuf,
    id: String,
    stays: bool,
}

impl Mesh {
    /// Makes a lab; it is given up with this process unless it stays.
    pub(crate) fn up(binaries: &Path, stays: bool) -> Result<Self> {
        let weft = binaries.join("weft");
        let own = std::process::id().to_string();
        let mut command = Command::new(&weft);
        command.args(["lab", "up", "--json"]);
        if !stays {
            command.args(["--owner", &own]);
        }
        let said: Value = serde_json::from_str(&output(&mut command)?)?;
        let id = said["lab"].as_str().context("weft lab up named no lab")?;
        Ok(Self {
            weft,
            id: id.to_owned(),
            stays,
        })
    }

    /// The lab's ID.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// Takes the lab down.
    pub(crate) fn down(mut self) -> Result<()> {
        self.stays = true;
        self.lab("down", &[]).map(drop)
    }

    /// Says how to look at a lab that stays.
    pub(crate) fn keep(mut self, report: &Report) {
        self.stays = true;
        let (weft, id) = (self.weft.display(), &self.id);
        for line in [
            format!("lab {id} stays up; look at it by:"),
            format!("  {weft} lab status --lab {id}"),
            format!("  {weft} lab exec --lab {id} {DESK} -- weft get bindings"),
            format!("  {weft} lab exec --lab {id} {VISITOR}"),
            format!("  {weft} lab down --lab {id}"),
        ] {
            report.say(&line);
        }
    }

    /// `weft lab VERB --lab ID ARGS`.
    pub(crate) fn lab(&self, verb: &str, args: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.weft);
        output(command.args(["lab", verb, "--lab", &self.id]).args(args))
    }

    /// A command that runs on a machine or in a pod.
    pub(crate) fn command(&self, place: &str, args: &[&str]) -> Command {
        let mut command = Command::new(&self.weft);
        command
            .args(["lab", "exec", "--lab", &self.id, place, "--"])
            .args(args);
        command
    }

    /// Runs a program on a machine or in a pod that answers with JSON.
    pub(crate) fn exec(&self, place: &str, args: &[&str]) -> Result<Value> {
        let said = output(&mut self.command(place, args))?;
        serde_json::from_str(&said).with_context(|| format!("{} answered no JSON", args.join(" ")))
    }

    /// `weft ARGS -o json`.
    pub(crate) fn cli(&self, args: &[&str]) -> Result<Value> {
        let mut all = vec!["weft"];
        all.extend(args);
        all.extend(["-o", "json"]);
        self.exec(DESK, &all)
    }

    /// The things of a kind.
    pub(crate) fn get(&self, kind: &str) -> Result<Vec<Value>> {
        match self.cli(&["get", kind])?["items"].take() {
            Value::Array(items) => Ok(items),
            other => bail!("weft get {kind} answered {other}"),
        }
    }

    /// Where everything runs, as text.
    pub(crate) fn bindings_text(&self) -> Result<String> {
        output(&mut self.command(DESK, &["weft", "get", "bindings", "--stale"]))
    }

    /// The address of the page's VIP of a policy, `family` 4 or 6, as it stands in a URL.
    pub(crate) fn page(&self, policy: &str, family: u8) -> Result<String> {
        let services = self.get("services")?;
        let page = find(&services, "name", "shop/bookinfo/productpage")?;
        let vips = page["vips"].as_array().map_or(&[][..], Vec::as_slice);
        let vip = find(vips, "policy", policy)?;
        let address = vip[format!("addr{family}")]
            .as_str()
            .with_context(|| format!("the page's {policy} VIP has no IPv{family} address"))?;
        Ok(match family {
            6 => format!("http://[{address}]:{PORT}/productpage"),
            _ => format!("http://{address}:{PORT}/productpage"),
        })
    }

    /// The node on which the visitor runs.
    pub(crate) fn visitor_node(&self) -> Result<String> {
        let bindings = self.get("bindings")?;
        let visitor = find(&bindings, "slot", "shop/bookinfo/visitor#0")?;
        Ok(text(visitor, "node").to_owned())
    }

    /// Waits until every instance of every application is ready, and nothing moved or drained for a while; returns
    /// how long that took, the while apart.
    pub(crate) fn settled(&self, within: Duration) -> Result<Duration> {
        let mut rest: Option<(Instant, Vec<Value>)> = None;
        let took = wait("everything is ready and at rest", within, || {
            let found = self.at_rest();
            let Ok(bindings) = &found else {
                rest = None;
                return found.map(drop);
            };
            match &rest {
                Some((since, before)) if before == bindings => {
                    ensure!(since.elapsed() > AT_REST, "it is at rest for a moment only");
                    Ok(())
                }
                _ => {
                    rest = Some((Instant::now(), bindings.clone()));
                    bail!("it came to rest just now")
                }
            }
        })?;
        Ok(took.saturating_sub(AT_REST))
    }

    /// The bindings, if they are all active and ready, and as many as are wanted.
    fn at_rest(&self) -> Result<Vec<Value>> {
        let applications = self.get("applications")?;
        let wanted: u64 = applications
            .iter()
            .filter_map(|app| app["wanted"].as_u64())
            .sum();
        let bindings = self.get("bindings")?;
        let at_rest = |binding: &&Value| {
            text(binding, "state") == "active" && text(binding, "phase") == "ready"
        };
        let ready = bindings.iter().filter(at_rest).count() as u64;
        let all = bindings.len() as u64;
        ensure!(
            ready == all && ready == wanted,
            "{ready} of {wanted} instances are at rest, there are {all} bindings"
        );
        Ok(bindings)
    }

    /// Waits until all nodes are ready.
    pub(crate) fn nodes_ready(&self, within: Duration) -> Result<Duration> {
        wait("every node is ready", within, || {
            let nodes = self.get("nodes")?;
            let away = nodes.iter().filter(|node| node["ready"] != true).count();
            ensure!(away == 0, "{away} nodes are not ready");
            Ok(())
        })
    }

    /// The leader's name.
    pub(crate) fn leader(&self) -> Result<String> {
        let status = self.cli(&["status"])?;
        ensure!(status["stale"] != true, "no majority of the leads answers");
        let leader = status["leader"].as_str();
        leader.map(str::to_owned).context("there is no leader")
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if !self.stays
            && let Err(error) = self.lab("down", &[])
        {
            eprintln!("{error:#}");
        }
    }
}

/// Asks until there is no error; returns how long that took.
pub(crate) fn wait(
    what: &str,
    within: Duration,
    mut ask: impl FnMut() -> Result<()>,
) -> Result<Duration> {
    let start = Instant::now();
    loop {
        match ask() {
            Ok(()) => return Ok(start.elapsed()),
            Err(error) if start.elapsed() > within => {
                return Err(error.context(format!("not within {within:?}: {what}")));
            }
            Err(_) => thread::sleep(REST),
        }
    }
}

/// The thing whose `field` is `value`.
pub(crate) fn find<'a>(things: &'a [Value], field: &str, value: &str) -> Result<&'a Value> {
    things
        .iter()
        .find(|thing| thing[field] == value)
        .with_context(|| format!("there is none whose {field} is {value}"))
}

/// A field's text; empty where there is none.
pub(crate) fn text<'a>(thing: &'a Value, field: &str) -> &'a str {
    thing[field].as_str().unwrap_or_default()
}

fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("failed to start {}", command.get_program().display()))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let args: Vec<_> = command
        .get_args()
        .map(|word| word.to_string_lossy())
        .collect();
    let said = String::from_utf8_lossy(&output.stderr);
    Err(anyhow!("weft {}: {}", args.join(" "), said.trim()))
}
