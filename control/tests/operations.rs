//! `docs/operations.md` as it stands: every command in it, in its order, on leads that are processes.
//!
//! Addresses of the document become ports of the loopback. A command that runs a lead or an agent is a process of its own;
//! the others must succeed. What a person would do without a command stands in comments of the document:
//!
//! | comment | does |
//! |---|---|
//! | `test: until COMMAND` | repeats it until it succeeds |
//! | `test: fails` | the next command must fail |
//! | `test: kill NAME`, `test: start NAME` | kill -9; starts it again on its data |
//! | `test: lose NAME` | its data are gone |
//! | `test: damage NAME` | a bit of every page of its database is another |
//! | `test: ended NAME [CODE]` | its process has ended by itself, with an error |
//! | `test: said NAME COUNT` | so many of the next commands stand in its log |
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    net::TcpListener,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

const DOCUMENT: &str = include_str!("../../docs/operations.md");
const LIMIT: Duration = Duration::from_secs(60);
/// What a lead says that was too busy for a change of the leads.
const EARLY: [&str; 3] = [
    "the leads are being changed",
    "the membership was not changed",
    "goes on leading",
];
const GOAL: &str = "
apiVersion: weft.dev/v1alpha1
kind: MeshApplication
metadata: { name: shop }
spec: { services: [{ name: web, command: [/bin/true] }] }
";

/// A cluster in which nothing can run: its only node never comes.
const AGENT: &str = "
cluster: edge
facts:
  tier: edge
  region: de
  cpu_price_ueur_h: 30000
  memory_price_ueur_h: 4000
  egress_price_ueur_gib: 0
  cpu_power_mw: 4000
  carbon_g_kwh: 300
driver: { local: { run_dir: run-edge, cni_plugin: /bin/true, nodes: [{ name: n1, cni_socket: n1.sock, cpu: 1, memory: 1Gi }] } }
";

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Run(String),
    Until(String),
    Fails,
    Kill(String),
    Start(String),
    Lose(String),
    Damage(String),
    Ended(String, Option<i32>),
    Said(String, usize),
}

/// The document's commands and comments, in order.
fn steps(document: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut in_block = false;
    for line in document.lines() {
        let comment = line.strip_prefix("<!-- test: ");
        let comment = comment.and_then(|line| line.strip_suffix(" -->"));
        match (line, comment) {
            (_, Some(comment)) => steps.push(directive(comment)),
            ("```sh", _) => in_block = true,
            ("```", _) => in_block = false,
            (command, _) if in_block => steps.push(Step::Run(command.to_owned())),
            _ => {}
        }
    }
    steps
}

fn directive(comment: &str) -> Step {
    let (word, rest) = comment.split_once(' ').unwrap_or((comment, ""));
    let rest = rest.to_owned();
    match word {
        "until" => Step::Until(rest),
        "fails" => Step::Fails,
        "kill" => Step::Kill(rest),
        "start" => Step::Start(rest),
        "lose" => Step::Lose(rest),
        "damage" => Step::Damage(rest),
        "ended" => match rest.split_once(' ') {
            Some((name, code)) => Step::Ended(name.to_owned(), Some(code.parse().unwrap())),
            None => Step::Ended(rest, None),
        },
        "said" => {
            let (name, count) = rest.split_once(' ').unwrap();
            Step::Said(name.to_owned(), count.parse().unwrap())
        }
        _ => panic!("the document says {comment:?}"),
    }
}

/// Whom a command runs: the lead, or the agent by its configuration's name.
fn daemon(line: &str) -> Option<&str> {
    let lead = line.strip_prefix("weft lead --name ");
    let name = lead.or(line.strip_prefix("weft agent --config "))?;
    name.split([' ', '.']).next()
}

/// Whether the leads were busy, refused it and did nothing: a person asks again.
fn is_early(output: &Output) -> bool {
    let error = String::from_utf8_lossy(&output.stderr);
    EARLY.iter().any(|words| error.contains(words))
}

struct Stage {
    dir: tempfile::TempDir,
    /// What stands for the document's addresses.
    addresses: BTreeMap<String, String>,
    environment: BTreeMap<String, String>,
    running: BTreeMap<String, Child>,
    /// How each lead was started last.
    started: BTreeMap<String, String>,
    must_fail: bool,
    /// Whose log holds the next commands, and how many of them.
    said_by: Option<(String, usize)>,
}

impl Stage {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [("app.yaml", GOAL), ("edge.yaml", AGENT)] {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        // Held together, so that the system gives different ports.
        let held: Vec<_> = (1..=4)
            .map(|number| (number, TcpListener::bind("127.0.0.1:0").unwrap()))
            .collect();
        let address = |(number, listener): &(u8, TcpListener)| {
            let real = listener.local_addr().unwrap().to_string();
            (format!("192.0.2.{number}:7000"), real)
        };
        Self {
            dir,
            addresses: held.iter().map(address).collect(),
            environment: BTreeMap::new(),
            running: BTreeMap::new(),
            started: BTreeMap::new(),
            must_fail: false,
            said_by: None,
        }
    }

    fn take(&mut self, step: Step) {
        println!("{step:?}");
        match step {
            Step::Run(line) => {
                if let Some((name, count)) = self.said_by.take().filter(|(_, count)| *count > 0) {
                    let log = self.dir.path().join(format!("log-{name}"));
                    let log = std::fs::read_to_string(log).unwrap();
                    assert!(
                        log.contains(&self.local(&line)),
                        "{name} did not say {line}"
                    );
                    self.said_by = Some((name, count - 1));
                }
                self.run(&line);
            }
            Step::Until(line) => {
                let end = Instant::now() + LIMIT;
                loop {
                    let output = self.shell(&line);
                    if output.status.success() {
                        return;
                    }
                    assert!(Instant::now() < end, "{line}: {output:?}");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
            Step::Fails => self.must_fail = true,
            Step::Kill(name) => {
                let mut child = self.running.remove(&name).unwrap();
                child.kill().unwrap();
                child.wait().unwrap();
            }
            Step::Start(name) => {
                let line = self.started[&name].clone();
                self.start(&name, &line);
            }
            Step::Lose(name) => {
                std::fs::remove_dir_all(self.dir.path().join(format!("data-{name}"))).unwrap();
            }
            Step::Damage(name) => {
                let file = self.dir.path().join(format!("data-{name}/lead.redb"));
                let mut bytes = std::fs::read(&file).unwrap();
                for page in bytes.chunks_mut(4096).skip(1) {
                    page[page.len() / 2] ^= 1;
                }
                std::fs::write(file, bytes).unwrap();
            }
            Step::Said(name, count) => self.said_by = Some((name, count)),
            Step::Ended(name, code) => {
                let mut child = self.running.remove(&name).unwrap();
                let end = Instant::now() + LIMIT;
                while child.try_wait().unwrap().is_none() {
                    assert!(Instant::now() < end, "lead {name} still runs");
                    std::thread::sleep(Duration::from_millis(50));
                }
                let status = child.wait().unwrap();
                assert!(!status.success());
                assert!(
                    code.is_none_or(|code| status.code() == Some(code)),
                    "{status}"
                );
            }
        }
    }

    fn run(&mut self, line: &str) {
        if let Some(pairs) = line.strip_prefix("export ") {
            for pair in pairs.split(' ') {
                let (name, value) = pair.split_once('=').unwrap();
                self.environment.insert(name.to_owned(), self.local(value));
            }
        } else if let Some(name) = daemon(line) {
            self.started.insert(name.to_owned(), line.to_owned());
            self.start(name, line);
        } else {
            let must_fail = std::mem::take(&mut self.must_fail);
            let end = Instant::now() + LIMIT;
            loop {
                let output = self.shell(line);
                if must_fail || !is_early(&output) || Instant::now() >= end {
                    assert_eq!(output.status.success(), !must_fail, "{line}: {output:?}");
                    break;
                }
                println!("{output:?}");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }

    fn local(&self, line: &str) -> String {
        let mut line = line.to_owned();
        for (documented, real) in &self.addresses {
            line = line.replace(documented, real);
        }
        line
    }

    fn command(&self, line: &str) -> Command {
        let weft = Path::new(env!("CARGO_BIN_EXE_weft")).parent().unwrap();
        let path = std::env::var("PATH").unwrap();
        let mut command = Command::new("sh");
        command
            .current_dir(self.dir.path())
            .args(["-c", &self.local(line)])
            .env("PATH", format!("{}:{path}", weft.display()))
            .envs(&self.environment);
        command
    }

    fn shell(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }

    fn start(&mut self, name: &str, line: &str) {
        let log = self.dir.path().join(format!("log-{name}"));
        let log = std::fs::File::options().append(true).create(true).open(log);
        // The daemon itself, so that it is the daemon that is killed.
        let child = self
            .command(&format!("exec {line}"))
            .stdout(Stdio::null())
            .stderr(log.unwrap())
            .spawn();
        self.running.insert(name.to_owned(), child.unwrap());
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for (name, mut child) in std::mem::take(&mut self.running) {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
            if std::thread::panicking() {
                let log = self.dir.path().join(format!("log-{name}"));
                println!("--- {name}\n{}", std::fs::read_to_string(log).unwrap());
            }
        }
    }
}

#[test]
fn every_command_of_the_operations_page_does_what_the_page_says() {
    let mut stage = Stage::new();
    for step in steps(DOCUMENT) {
        stage.take(step);
    }
    let leads = stage.shell("weft lead list -o json");
    let leads: serde_json::Value = serde_json::from_slice(&leads.stdout).unwrap();
    let mut names: Vec<_> = leads["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|lead| lead["name"].as_str().unwrap())
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["a", "b", "c"]);
}

#[test]
fn a_command_that_fails_and_an_unknown_comment_are_seen() {
    let steps =
        steps("text\n```sh\nweft a\nweft b\n```\nweft c\n<!-- test: kill a -->\n```text\nno\n```");
    let run = |line: &str| Step::Run(line.to_owned());
    assert_eq!(
        steps,
        [run("weft a"), run("weft b"), Step::Kill("a".to_owned())]
    );
    let failing = std::panic::catch_unwind(|| Stage::new().run("weft fly"));
    assert!(failing.is_err());
    assert!(std::panic::catch_unwind(|| directive("explode a")).is_err());
}
