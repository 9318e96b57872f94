//! Three leads as an operator starts them: `weft init`, `weft cert`, `weft lead`.

pub mod apart;
pub mod client;
pub mod member;

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    time::Duration,
};

use crate::Process;
use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use netmanager_api::identity::{Credentials, Role};
use serde_json::Value;
use tokio::time::Instant;

use self::{
    apart::Apart,
    client::{Answer, Connection, Door, request},
};

/// The leads' names.
pub const NAMES: [&str; 3] = ["a", "b", "c"];
/// Where all applications are asked for.
const APPLICATIONS: &str = "/v1/applications";
/// The namespace of everything that is applied.
pub const NAMESPACE: &str = "bench";
/// How long a lead may take until it serves; far more than it is allowed, so that it is measured.
const START: Duration = Duration::from_secs(120);
/// Between two attempts.
const AGAIN: Duration = Duration::from_millis(50);

/// The leads; they end with this.
#[derive(Debug)]
pub struct Leads {
    program: PathBuf,
    dir: PathBuf,
    addresses: Vec<SocketAddr>,
    /// What a lead is started by, in front of its command.
    within: Vec<Vec<String>>,
    running: Vec<Process>,
    doors: Vec<Door>,
}

/// Where leads run.
#[derive(Debug)]
pub struct Place {
    /// Their doors.
    addresses: Vec<SocketAddr>,
    within: Vec<Vec<String>>,
}

impl Place {
    /// On this machine.
    ///
    /// # Errors
    /// When there are no ports left.
    pub fn here() -> Result<Self> {
        Ok(Self {
            addresses: member::addresses(NAMES.len())?,
            within: vec![Vec::new(); NAMES.len()],
        })
    }

    /// Each on its own of these machines.
    #[must_use]
    pub fn apart(machines: &Apart) -> Self {
        let enter = |number| {
            let netns = machines.lead(number).path();
            let netns = format!("--net={}", netns.display());
            ["nsenter", &netns, "--"].map(str::to_owned).to_vec()
        };
        Self {
            addresses: machines.addresses(),
            within: (0..NAMES.len()).map(enter).collect(),
        }
    }
}

impl Leads {
    /// Makes a mesh (`init`: how, besides), starts three leads and waits until each serves.
    ///
    /// # Errors
    /// When something that it takes is missing, or one does not serve in time.
    pub async fn start(binaries: &Path, data: &Path, init: &[&str], place: Place) -> Result<Self> {
        let program = fs::canonicalize(binaries.join("weft"))
            .with_context(|| format!("{} holds no weft", binaries.display()))?;
        let dir = data.join("weft");
        fs::create_dir_all(&dir)?;
        let weft = |arguments: &[&str]| {
            member::run(Command::new(&program).current_dir(&dir).args(arguments))
        };
        weft(&[&["init", "--dir", "ca", "--mesh", "bench"], init].concat())?;
        for (role, name) in [("lead", "a"), ("lead", "b"), ("lead", "c"), ("user", "ann")] {
            let out = format!("{role}-{name}");
            weft(&[
                "cert", "--ca", "ca", "--role", role, "--name", name, "--out", &out,
            ])?;
        }
        let credentials = Credentials::load(&dir.join("user-ann"))?;
        let tls = credentials.client(&[b"h2"], |role| matches!(role, Role::Lead { .. }))?;
        let Place { addresses, within } = place;
        let door = |address| Door {
            address,
            tls: tls.clone(),
        };
        let mut leads = Self {
            doors: addresses.iter().copied().map(door).collect(),
            program,
            dir,
            addresses,
            within,
            running: Vec::new(),
        };
        for number in 0..NAMES.len() {
            let process = leads.launch(number)?;
            leads.running.push(process);
        }
        for number in 0..NAMES.len() {
            leads.await_service(number, APPLICATIONS).await?;
        }
        Ok(leads)
    }

    /// The credentials of a cluster's agent.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn agent(&self, cluster: &str) -> Result<PathBuf> {
        let out = format!("agent-{cluster}");
        let mut weft = Command::new(&self.program);
        weft.current_dir(&self.dir)
            .args(["cert", "--ca", "ca", "--role", "agent", "--name", "agent"])
            .args(["--cluster", cluster, "--out", &out]);
        member::run(&mut weft)?;
        Ok(self.dir.join(out))
    }

    fn launch(&self, number: usize) -> Result<Process> {
        let name = NAMES[number];
        let path = |name: &str| self.dir.join(name).display().to_string();
        let mut arguments = self.within[number].clone();
        arguments.extend([
            self.program.display().to_string(),
            "lead".to_owned(),
            format!("--name={name}"),
            format!("--data={}", path(&format!("data-{name}"))),
            format!("--credentials={}", path(&format!("lead-{name}"))),
            format!("--listen={}", self.addresses[number]),
            format!("--mesh={}", path("ca/mesh.json")),
        ]);
        for (name, address) in NAMES.iter().zip(&self.addresses) {
            arguments.push(format!("--peer={name}={address}"));
        }
        let (program, arguments) = arguments.split_first().expect("it is a command");
        member::start(Path::new(program), arguments, &self.log(number))
    }

    fn log(&self, number: usize) -> PathBuf {
        self.dir.join(format!("{}.log", NAMES[number]))
    }

    /// Waits until a lead answers what is asked for at `path`, with all that was acknowledged.
    async fn await_service(&self, number: usize, path: &str) -> Result<()> {
        let end = Instant::now() + START;
        while let Err(error) = self.get(number, path).await {
            if Instant::now() >= end {
                let log = member::tail(&self.log(number));
                bail!("lead {} does not serve: {error:#}\n{log}", NAMES[number]);
            }
            tokio::time::sleep(AGAIN).await;
        }
        Ok(())
    }

    /// Where they are asked.
    #[must_use]
    pub fn doors(&self) -> &[Door] {
        &self.doors
    }

    /// Their processes.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        self.running.iter().map(|it| it.0.id()).collect()
    }

    /// The names of all applications, as lead `number` knows them once it has caught up.
    ///
    /// # Errors
    /// When it does not say.
    pub async fn applications(&self, number: usize) -> Result<BTreeSet<String>> {
        let list = self.get(number, APPLICATIONS).await?;
        let items = list["items"].as_array().context("a list has items")?;
        let prefix = format!("{NAMESPACE}/");
        let name = |item: &Value| Some(item["name"].as_str()?.strip_prefix(&prefix)?.to_owned());
        Ok(items.iter().filter_map(name).collect())
    }

    /// Which of them leads.
    ///
    /// # Errors
    /// When none says so in time.
    pub async fn leader(&self) -> Result<usize> {
        let end = Instant::now() + START;
        loop {
            for number in 0..NAMES.len() {
                let status = self.get(number, "/v1/status").await?;
                if let Some(leader) = NAMES.iter().position(|name| status["leader"] == *name) {
                    return Ok(leader);
                }
            }
            ensure!(Instant::now() < end, "no lead says who leads");
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// How long they believe in a silent leader: the longest that one of them says.
    ///
    /// # Errors
    /// When none says so.
    pub async fn lease(&self) -> Result<Duration> {
        let leads = self.get(0, "/v1/leads").await?;
        let leads = leads["items"].as_array().context("a list has items")?;
        let said = |lead: &Value| lead["timers"]["election_ms"].as_u64();
        let longest = leads.iter().filter_map(said).max();
        longest
            .map(Duration::from_millis)
            .context("no lead says how long a lease is")
    }

    async fn get(&self, number: usize, path: &str) -> Result<Value> {
        let connection = self.doors[number].open().await?;
        ask(&connection, "GET", path).await
    }

    /// Kills a lead and waits for its end (SIGKILL).
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill(&mut self, number: usize) -> Result<()> {
        let child = &mut self.running[number].0;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// How a lead ended, if it did.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn ended(&mut self, number: usize) -> Result<Option<ExitStatus>> {
        Ok(self.running[number].0.try_wait()?)
    }

    /// Starts a lead that has ended, and does not wait for it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_again(&mut self, number: usize) -> Result<()> {
        self.running[number] = self.launch(number)?;
        Ok(())
    }

    /// Starts a lead that was killed and waits until it serves.
    ///
    /// # Errors
    /// When it does not.
    pub async fn restart(&mut self, number: usize) -> Result<()> {
        self.restart_by(number, APPLICATIONS).await
    }

    /// Starts a lead that was killed and waits until it answers what is asked for at `path`.
    ///
    /// # Errors
    /// When it does not.
    pub async fn restart_by(&mut self, number: usize, path: &str) -> Result<()> {
        self.start_again(number)?;
        self.await_service(number, path).await
    }

    /// Lets another lead.
    ///
    /// # Errors
    /// When none does.
    pub async fn drain(&self) -> Result<()> {
        let connection = self.doors[0].open().await?;
        ask(&connection, "POST", "/v1/leads/drain")
            .await
            .map(|_| ())
    }

    /// Takes applications away.
    ///
    /// # Errors
    /// When a lead says no.
    pub async fn delete(&self, names: impl Iterator<Item = &String>) -> Result<()> {
        let connection = self.doors[0].open().await?;
        let deleted = names.map(|name| {
            let path = format!("/v1/applications/{NAMESPACE}/{name}");
            let connection = &connection;
            async move { ask(connection, "DELETE", &path).await }
        });
        futures::future::try_join_all(deleted).await.map(|_| ())
    }
}

async fn ask(connection: &Connection, method: &str, path: &str) -> Result<Value> {
    let request = request(method, path, "application/json", Bytes::new());
    let answer = connection.ask(request).await?;
    check(&answer)?;
    Ok(serde_json::from_slice(&answer.body)?)
}

/// The goal file of an application with one service, other in each turn and always of one size.
#[must_use]
pub fn goal(name: &str, turn: u64) -> String {
    format!(
        "\
apiVersion: weft.dev/v1alpha1
kind: MeshApplication
metadata: {{ name: {name}, namespace: {NAMESPACE} }}
spec:
  services:
    - name: web
      command: [/bin/true]
      env: {{ TURN: \"{turn:012}\" }}
      requests: {{ cpu: 100m, memory: 32Mi }}
"
    )
}

/// A POST of [`goal`].
#[must_use]
pub fn change(key: &str, turn: u64) -> Request<Full<Bytes>> {
    let body = Bytes::from(goal(key, turn));
    request("POST", "/v1/applications", "application/yaml", body)
}

/// Whether a change was acknowledged.
///
/// # Errors
/// When it was not.
pub fn check(answer: &Answer) -> Result<()> {
    ensure!(
        answer.status.is_success(),
        "a lead answered {}: {}",
        answer.status,
        String::from_utf8_lossy(&answer.body)
    );
    Ok(())
}
