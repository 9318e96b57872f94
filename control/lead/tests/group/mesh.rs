//! A mesh of leads for tests: certificates and data in a temporary folder, ports given by the system.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    num::NonZeroU32,
    path::Path,
    time::{Duration, Instant},
};

use bytes::Bytes;
use control_api::http::Status;
use http::{Method, Request, StatusCode};
use netmanager_api::identity::{Access, Credentials, Role};
use serde::de::DeserializeOwned;
use tokio::{net::TcpListener, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use weft_lead::{
    LeadError, Listeners, Options, REQUESTS, Recovery, Survivor, Timers,
    authority::{self, Wish},
    dial::{DialError, dial, exchange},
};

use crate::{log::Log, relay::Relay, stopwatch::Stopwatch};

/// How long a test waits for what must happen.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// How long a lead looks for a leader before it says that there is none.
const PATIENCE: Duration = Duration::from_secs(6);

/// Waits until `condition` holds; panics after `limit`, of time that the process had.
pub(crate) async fn wait_for(
    what: &str,
    limit: Duration,
    mut condition: impl AsyncFnMut() -> bool,
) {
    let watch = Stopwatch::start();
    while !condition().await {
        assert!(watch.had() < limit, "waited {limit:?} for {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

struct Running {
    shutdown: CancellationToken,
    task: JoinHandle<Result<(), LeadError>>,
}

/// Leads that form one group.
pub(crate) struct TestMesh {
    dir: tempfile::TempDir,
    /// Where their doors are.
    addresses: BTreeMap<String, SocketAddr>,
    /// Where the others are told that they are: behind a relay that can be cut.
    advertised: BTreeMap<String, SocketAddr>,
    relays: BTreeMap<String, Relay>,
    /// Where their doors for tokens are.
    tokens: BTreeMap<String, SocketAddr>,
    /// The leads that formed the group.
    first: BTreeMap<String, SocketAddr>,
    /// Those that joined later.
    joining: BTreeSet<String>,
    running: BTreeMap<String, Running>,
    /// What leads that are started from now on keep of their disks, bytes.
    pub(crate) reserve: Option<u64>,
    /// How often somebody may ask, in a second, leads that are started from now on.
    pub(crate) requests_per_second: NonZeroU32,
}

impl TestMesh {
    /// Forms a group of leads with these names.
    pub(crate) async fn start(names: &[&str]) -> Self {
        Self::start_some(names, names).await
    }

    /// Forms a group of leads with these names, of which only `running` run at first.
    pub(crate) async fn start_some(names: &[&str], running: &[&str]) -> Self {
        Log::start();
        let dir = tempfile::tempdir().unwrap();
        let wish = Wish {
            name: "demo".to_owned(),
            prefix4: Some(authority::DEFAULT_PREFIX4),
            prefix6: None,
        };
        let ca = dir.path().join("ca");
        authority::init(&ca, &wish).unwrap();
        let issue = |role: Role, out: &str| {
            authority::issue(&ca, role, &dir.path().join(out)).unwrap();
        };
        let user = |name: &str, access: Access| {
            let role = Role::User {
                name: name.to_owned(),
                access,
            };
            issue(role, name);
        };
        user("user", Access::Admin);
        user("viewer", Access::Viewer);
        let namespaces = BTreeSet::from(["shop".to_owned()]);
        user("deployer", Access::Deployer { namespaces });
        let cluster = "edge".to_owned();
        issue(Role::Agent { cluster }, "agent");
        let cluster = "fog".to_owned();
        issue(Role::Agent { cluster }, "agent-fog");
        let mut listeners = Vec::new();
        for name in names {
            let role = Role::Lead {
                name: (*name).to_owned(),
            };
            issue(role, &format!("lead-{name}"));
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            listeners.push(((*name).to_owned(), listener));
        }
        let addresses: BTreeMap<_, _> = listeners
            .iter()
            .map(|(name, listener)| (name.clone(), listener.local_addr().unwrap()))
            .collect();
        let mut relays = BTreeMap::new();
        for (name, address) in &addresses {
            relays.insert(name.clone(), Relay::start(*address).await);
        }
        let advertised: BTreeMap<_, _> = relays
            .iter()
            .map(|(name, relay)| (name.clone(), relay.address))
            .collect();
        let mut mesh = Self {
            dir,
            first: advertised.clone(),
            advertised,
            addresses,
            relays,
            tokens: BTreeMap::new(),
            joining: BTreeSet::new(),
            running: BTreeMap::new(),
            reserve: None,
            requests_per_second: REQUESTS,
        };
        for (name, listener) in listeners {
            if running.contains(&name.as_str()) {
                mesh.run(&name, listener);
            }
        }
        mesh
    }

    /// Starts a lead that joins the group; where the others will find it.
    pub(crate) async fn join_lead(&mut self, name: &str) -> SocketAddr {
        let role = Role::Lead {
            name: name.to_owned(),
        };
        let out = self.dir.path().join(format!("lead-{name}"));
        if !out.exists() {
            authority::issue(&self.dir.path().join("ca"), role, &out).unwrap();
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let relay = Relay::start(address).await;
        self.joining.insert(name.to_owned());
        self.addresses.insert(name.to_owned(), address);
        self.advertised.insert(name.to_owned(), relay.address);
        self.relays.insert(name.to_owned(), relay);
        self.run(name, listener);
        self.advertised[name]
    }

    /// Takes a stopped lead's disk away.
    pub(crate) fn lose_disk(&self, name: &str) {
        std::fs::remove_dir_all(self.dir.path().join(format!("data-{name}"))).unwrap();
    }

    /// Makes a stopped lead a group of its own.
    pub(crate) fn recover(&self, name: &str) -> Survivor {
        let data = self.dir.path().join(format!("data-{name}"));
        Recovery::open(data).unwrap().run().unwrap()
    }

    /// What a lead that ended by itself says; its process is gone.
    pub(crate) async fn ended(&mut self, name: &str) -> Result<(), LeadError> {
        let running = self.running.remove(name).unwrap();
        timeout(LIMIT, running.task).await.unwrap().unwrap()
    }

    fn run(&mut self, name: &str, listener: TcpListener) {
        let shutdown = CancellationToken::new();
        let options = Options {
            name: name.to_owned(),
            data: self.dir.path().join(format!("data-{name}")),
            credentials: self.dir.path().join(format!("lead-{name}")),
            listen: self.addresses[name],
            advertise: Some(self.advertised[name]),
            tokens: None,
            mesh: Some(self.dir.path().join("ca/mesh.json")),
            peers: match self.joining.contains(name) {
                true => BTreeMap::new(),
                false => self.first.clone(),
            },
            join: match self.joining.contains(name) {
                true => self.first.clone(),
                false => BTreeMap::new(),
            },
            lease: Duration::from_secs(2),
            timers: Timers::default(),
            reserve: self.reserve,
            requests_per_second: self.requests_per_second,
        };
        let tokens = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        tokens.set_nonblocking(true).unwrap();
        let address = tokens.local_addr().unwrap();
        self.tokens.insert(name.to_owned(), address);
        let listeners = Listeners {
            door: listener,
            tokens: Some(TcpListener::from_std(tokens).unwrap()),
        };
        let serving = weft_lead::serve(options, listeners, shutdown.clone());
        let own = name.to_owned();
        let task = tokio::spawn(async move {
            let ended = serving.await;
            if let Err(error) = &ended {
                println!("lead {own} ended: {error:?}");
            }
            ended
        });
        self.running
            .insert(name.to_owned(), Running { shutdown, task });
    }

    /// Starts a lead again, where it was.
    pub(crate) async fn start_lead(&mut self, name: &str) {
        // Its port was free meanwhile: another's connection may have it for a moment.
        let mut listener = None;
        wait_for("its port", LIMIT, async || {
            listener = TcpListener::bind(self.addresses[name]).await.ok();
            listener.is_some()
        })
        .await;
        self.run(name, listener.unwrap());
    }

    /// Where a lead's door is.
    pub(crate) fn address(&self, name: &str) -> SocketAddr {
        self.addresses[name]
    }

    /// Where a lead takes tokens.
    pub(crate) fn token_address(&self, name: &str) -> SocketAddr {
        self.tokens[name]
    }

    /// Asks by a connection, with headers.
    pub(crate) async fn request_with(
        &self,
        channel: Channel,
        (method, path): (&str, &str),
        body: &str,
        headers: &[(&str, String)],
    ) -> (StatusCode, String) {
        send(channel, (method, path), body, headers).await.unwrap()
    }

    /// Whether the other leads reach `name`; it reaches them all the while.
    pub(crate) fn hears(&self, name: &str, hears: bool) {
        self.relays[name].cut.send_replace(!hears);
    }

    /// Stops a lead.
    pub(crate) async fn stop(&mut self, name: &str) {
        let running = self.running.remove(name).unwrap();
        running.shutdown.cancel();
        running.task.await.unwrap().unwrap();
        // Raft's own tasks let go of it a moment later.
        let database = self.dir.path().join(format!("data-{name}/lead.redb"));
        wait_for("its disk to be free", LIMIT, async || {
            redb::Database::open(&database).is_ok()
        })
        .await;
    }

    /// Stops every lead.
    pub(crate) async fn end(mut self) {
        let names: Vec<_> = self.running.keys().cloned().collect();
        for name in names {
            self.stop(&name).await;
        }
    }

    /// The two leads beside `leader`.
    pub(crate) fn others(&self, leader: &str) -> [String; 2] {
        let others: Vec<_> = self
            .addresses
            .keys()
            .filter(|it| *it != leader)
            .cloned()
            .collect();
        others.try_into().unwrap()
    }

    /// The leader, once the group has one and holds a mesh.
    pub(crate) async fn leader(&self) -> String {
        let mut leader = None;
        let any = self.running.keys().next().unwrap();
        wait_for("a leader", LIMIT, async || {
            let (_, status): (_, Status) = self.get(any, "/v1/status").await;
            leader = status
                .leader
                .filter(|_| status.mesh.is_some() && !status.stale);
            leader.is_some()
        })
        .await;
        leader.unwrap()
    }

    /// A connection to a lead with the certificate in `credentials`.
    pub(crate) fn channel(&self, credentials: &str, lead: &str) -> Channel {
        let credentials = Credentials::load(&self.path().join(credentials)).unwrap();
        let is_lead = |role: &Role| matches!(role, Role::Lead { .. });
        dial(&credentials, self.addresses[lead], is_lead).unwrap()
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Asks a lead as a user; its status and body.
    pub(crate) async fn ask(
        &self,
        lead: &str,
        method: &str,
        path: &str,
        body: &str,
    ) -> (StatusCode, String) {
        self.ask_with("user", lead, (method, path), body).await
    }

    /// As [`TestMesh::ask`], once: 503 also where nobody answered.
    pub(crate) async fn ask_now(
        &self,
        lead: &str,
        (method, path): (&str, &str),
        body: &str,
        key: Option<&str>,
    ) -> (StatusCode, String) {
        self.once("user", lead, (method, path), body, key).await
    }

    /// Asks a lead for a change with an idempotency key.
    pub(crate) async fn ask_once(
        &self,
        lead: &str,
        ask: (&str, &str),
        body: &str,
        key: &str,
    ) -> (StatusCode, String) {
        self.again("user", lead, ask, body, Some(key)).await
    }

    /// Asks a lead with other credentials.
    pub(crate) async fn ask_as(
        &self,
        who: &str,
        lead: &str,
        method: &str,
        path: &str,
    ) -> (StatusCode, String) {
        self.again(who, lead, (method, path), "", None).await
    }

    /// Asks a lead with other credentials, and a body.
    pub(crate) async fn ask_with(
        &self,
        who: &str,
        lead: &str,
        ask: (&str, &str),
        body: &str,
    ) -> (StatusCode, String) {
        self.again(who, lead, ask, body, None).await
    }

    /// Asks again for as long as the answer is 503, as a user is told to.
    async fn again(
        &self,
        who: &str,
        lead: &str,
        ask: (&str, &str),
        body: &str,
        key: Option<&str>,
    ) -> (StatusCode, String) {
        let watch = Stopwatch::start();
        loop {
            let (status, text) = self.once(who, lead, ask, body, key).await;
            if status != StatusCode::SERVICE_UNAVAILABLE || watch.had() >= LIMIT {
                return (status, text);
            }
            println!("{lead} {ask:?}: {text}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn once(
        &self,
        who: &str,
        lead: &str,
        (method, path): (&str, &str),
        body: &str,
        key: Option<&str>,
    ) -> (StatusCode, String) {
        let key = key.map(|key| ("idempotency-key", key.to_owned()));
        let asked = Instant::now();
        let answer = send(
            self.channel(who, lead),
            (method, path),
            body,
            key.as_slice(),
        )
        .await;
        let answer = answer.unwrap_or_else(|error| {
            let problem = format!(r#"{{"error":{:?}}}"#, error.to_string());
            (StatusCode::SERVICE_UNAVAILABLE, problem)
        });
        assert!(
            !answer.1.contains("no leader was reached") || asked.elapsed() >= PATIENCE,
            "it did not wait for an election: {answer:?}"
        );
        answer
    }

    /// Gets and reads JSON.
    pub(crate) async fn get<T: DeserializeOwned>(&self, lead: &str, path: &str) -> (StatusCode, T) {
        let (status, text) = self.ask(lead, "GET", path, "").await;
        (status, read(&text))
    }

    /// Posts and reads JSON.
    pub(crate) async fn post<T: DeserializeOwned>(
        &self,
        lead: &str,
        path: &str,
        body: &str,
    ) -> (StatusCode, T) {
        let (status, text) = self.ask(lead, "POST", path, body).await;
        (status, read(&text))
    }
}

fn read<T: DeserializeOwned>(text: &str) -> T {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Asks by a connection that may be refused; the status.
pub(crate) async fn request_by(
    channel: Channel,
    method: &str,
    path: &str,
) -> Result<u16, DialError> {
    let (status, _) = send(channel, (method, path), "", &[]).await?;
    Ok(status.as_u16())
}

async fn send(
    channel: Channel,
    (method, path): (&str, &str),
    body: &str,
    headers: &[(&str, String)],
) -> Result<(StatusCode, String), DialError> {
    let mut request = Request::builder()
        .method(Method::from_bytes(method.as_bytes()).unwrap())
        .uri(path)
        .header("content-type", "application/json");
    for (name, value) in headers {
        request = request.header(*name, value);
    }
    let request = request.body(Bytes::from(body.to_owned())).unwrap();
    let (status, body) = exchange(channel, request).await?;
    Ok((status, String::from_utf8(body.to_vec()).unwrap()))
}
