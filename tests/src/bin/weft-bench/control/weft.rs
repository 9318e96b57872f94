//! Three leads as an operator starts them: `weft init`, `weft cert`, `weft lead`.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use netmanager_api::identity::{Credentials, Role};
use serde_json::Value;
use tokio::time::Instant;
use weft_tests::Process;

use super::{
    client::{Answer, Connection, Door, request},
    member,
};

const NAMES: [&str; 3] = ["a", "b", "c"];
/// Where all applications are asked for.
const APPLICATIONS: &str = "/v1/applications";
/// The namespace of everything that is applied.
const NAMESPACE: &str = "bench";
/// How long a lead may take until it serves; far more than it is allowed, so that it is measured.
const START: Duration = Duration::from_secs(120);
/// Between two attempts.
const AGAIN: Duration = Duration::from_millis(50);

/// The leads; they end with this.
#[derive(Debug)]
pub(crate) struct Leads {
    program: PathBuf,
    dir: PathBuf,
    addresses: Vec<SocketAddr>,
    running: Vec<Process>,
    doors: Vec<Door>,
}

impl Leads {
    /// Makes a mesh (`init`: how, besides), starts three leads and waits until each serves.
    pub(crate) async fn start(binaries: &Path, data: &Path, init: &[&str]) -> Result<Self> {
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
        let addresses = member::addresses(NAMES.len())?;
        let door = |address| Door {
            address,
            tls: tls.clone(),
        };
        let mut leads = Self {
            doors: addresses.iter().copied().map(door).collect(),
            program,
            dir,
            addresses,
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
    pub(crate) fn agent(&self, cluster: &str) -> Result<PathBuf> {
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
        let mut arguments = vec![
            "lead".to_owned(),
            format!("--name={name}"),
            format!("--data={}", path(&format!("data-{name}"))),
            format!("--credentials={}", path(&format!("lead-{name}"))),
            format!("--listen={}", self.addresses[number]),
            format!("--mesh={}", path("ca/mesh.json")),
        ];
        for (name, address) in NAMES.iter().zip(&self.addresses) {
            arguments.push(format!("--peer={name}={address}"));
        }
        member::start(&self.program, &arguments, &self.log(number))
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

    pub(crate) fn doors(&self) -> &[Door] {
        &self.doors
    }

    pub(crate) fn pids(&self) -> Vec<u32> {
        self.running.iter().map(|it| it.0.id()).collect()
    }

    /// The names of all applications, as lead `number` knows them once it has caught up.
    pub(crate) async fn applications(&self, number: usize) -> Result<BTreeSet<String>> {
        let list = self.get(number, APPLICATIONS).await?;
        let items = list["items"].as_array().context("a list has items")?;
        let prefix = format!("{NAMESPACE}/");
        let name = |item: &Value| Some(item["name"].as_str()?.strip_prefix(&prefix)?.to_owned());
        Ok(items.iter().filter_map(name).collect())
    }

    /// Which of them leads.
    pub(crate) async fn leader(&self) -> Result<usize> {
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

    async fn get(&self, number: usize, path: &str) -> Result<Value> {
        let connection = self.doors[number].open().await?;
        ask(&connection, "GET", path).await
    }

    /// Kills a lead and waits for its end (SIGKILL).
    pub(crate) fn kill(&mut self, number: usize) -> Result<()> {
        let child = &mut self.running[number].0;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Starts a lead that was killed and waits until it serves.
    pub(crate) async fn restart(&mut self, number: usize) -> Result<()> {
        self.restart_by(number, APPLICATIONS).await
    }

    /// Starts a lead that was killed and waits until it answers what is asked for at `path`.
    pub(crate) async fn restart_by(&mut self, number: usize, path: &str) -> Result<()> {
        self.running[number] = self.launch(number)?;
        self.await_service(number, path).await
    }

    /// Lets another lead.
    pub(crate) async fn drain(&self) -> Result<()> {
        let connection = self.doors[0].open().await?;
        ask(&connection, "POST", "/v1/leads/drain")
            .await
            .map(|_| ())
    }

    /// Takes applications away.
    pub(crate) async fn delete(&self, names: impl Iterator<Item = &String>) -> Result<()> {
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
pub(crate) fn goal(name: &str, turn: u64) -> String {
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
pub(crate) fn change(key: &str, turn: u64) -> Request<Full<Bytes>> {
    let body = Bytes::from(goal(key, turn));
    request("POST", "/v1/applications", "application/yaml", body)
}

/// Whether a change was acknowledged.
pub(crate) fn check(answer: &Answer) -> Result<()> {
    ensure!(
        answer.status.is_success(),
        "a lead answered {}: {}",
        answer.status,
        String::from_utf8_lossy(&answer.body)
    );
    Ok(())
}
