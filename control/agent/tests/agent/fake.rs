//! The agent's neighbours: a lead, a node and a driver that do what the test says.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use control_api::join::{
    Certificate, RenewRequest,
    renew_door_server::{RenewDoor, RenewDoorServer},
};
use control_api::stream::{
    FromAgent, Hello, ToAgent, Welcome,
    lead_door_server::{LeadDoor, LeadDoorServer},
};
use control_core::{
    assignment::Run,
    report::{InstanceId, Report},
};
use futures::StreamExt;
use hyper_util::rt::TokioIo;
use netmanager_api::{
    conditions::Conditions,
    identity::{Credentials, Role, SERVER_NAME},
    stream::{self, FromNode, NodeDoorClient, ToNode},
    table::Revision,
};
use rcgen::CertificateSigningRequestParams;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    task::JoinHandle,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Endpoint, Server, Uri, server::Connected},
};
use weft_agent::driver::{self, Driver, State, Statuses};

use crate::authority::Signer;

/// No step of a test takes longer.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// How often a node speaks.
const SPEAKS: Duration = Duration::from_secs(1);

/// Waits for `future`, at most [`DEADLINE`].
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match timeout(DEADLINE, future).await {
        Ok(value) => value,
        Err(_) => panic!("waited too long for {what}"),
    }
}

/// One stream of an agent, as a lead sees it.
pub(crate) struct AgentStream {
    pub(crate) hello: Hello,
    said: mpsc::UnboundedReceiver<FromAgent>,
    says: mpsc::Sender<Result<ToAgent, Status>>,
}

impl AgentStream {
    pub(crate) async fn say(&self, message: ToAgent) {
        self.says.send(Ok(message)).await.expect("the stream is up");
    }

    pub(crate) async fn welcome(&self, session: u64, lease: Duration) {
        let lease_ms = u64::try_from(lease.as_millis()).expect("a short lease");
        self.say(ToAgent::Welcome(Welcome { session, lease_ms }))
            .await;
    }

    /// The next message for which `pick` has something.
    pub(crate) async fn next<T>(
        &mut self,
        what: &str,
        mut pick: impl FnMut(FromAgent) -> Option<T>,
    ) -> T {
        soon(what, async {
            loop {
                let message = self.said.recv().await.expect("the stream is up");
                if let Some(found) = pick(message) {
                    return found;
                }
            }
        })
        .await
    }

    /// Whether the agent asks for a renewal before it leaves.
    pub(crate) async fn asks_for_renewal(&mut self) -> bool {
        soon("a renewal", async {
            loop {
                match self.said.recv().await {
                    Some(FromAgent::Alive { .. }) => return true,
                    Some(_) => {}
                    None => return false,
                }
            }
        })
        .await
    }

    /// The next report that satisfies `wanted`; renewals are counted meanwhile.
    pub(crate) async fn report(
        &mut self,
        what: &str,
        mut wanted: impl FnMut(&Report) -> bool,
    ) -> Report {
        let says = self.says.clone();
        self.next(what, |message| match message {
            FromAgent::Report(report) => wanted(&report).then_some(report),
            FromAgent::Alive { sequence } => {
                says.try_send(Ok(ToAgent::Renewed { sequence })).ok();
                None
            }
            FromAgent::Hello(_) | FromAgent::Conditions(_) => None,
        })
        .await
    }
}

/// A lead that hands every stream to the test; gone when dropped.
pub(crate) struct FakeLead {
    pub(crate) address: SocketAddr,
    pub(crate) streams: mpsc::UnboundedReceiver<AgentStream>,
    server: JoinHandle<()>,
}

struct Door(mpsc::UnboundedSender<AgentStream>);

#[tonic::async_trait]
impl LeadDoor for Door {
    type FollowStream = ReceiverStream<Result<ToAgent, Status>>;

    async fn follow(
        &self,
        request: Request<Streaming<FromAgent>>,
    ) -> Result<Response<Self::FollowStream>, Status> {
        let mut messages = request.into_inner();
        let Some(FromAgent::Hello(hello)) = messages.message().await? else {
            return Err(Status::invalid_argument("no hello"));
        };
        let (says, out) = mpsc::channel(16);
        let (sender, said) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok(Some(message)) = messages.message().await {
                if sender.send(message).is_err() {
                    return;
                }
            }
        });
        let stream = AgentStream { hello, said, says };
        let _ = self.0.send(stream);
        Ok(Response::new(ReceiverStream::new(out)))
    }
}

/// A connection as tonic takes it.
pub(crate) struct Tls(pub(crate) tokio_rustls::server::TlsStream<TcpStream>);

/// Signs for whoever asks, as a lead of the authority's.
pub(crate) struct Renewals(pub(crate) Signer);

#[tonic::async_trait]
impl RenewDoor for Renewals {
    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<Certificate>, Status> {
        let wish = CertificateSigningRequestParams::from_pem(&request.into_inner().request);
        let wish = wish.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let chain = self.0.sign("agent/edge", &wish.public_key, |_| {});
        Ok(Response::new(Certificate { chain }))
    }
}

impl FakeLead {
    pub(crate) async fn start(credentials: &Credentials) -> Self {
        Self::start_with(credentials, None).await
    }

    /// One that also signs.
    pub(crate) async fn start_with(credentials: &Credentials, renewals: Option<Renewals>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let tls = TlsAcceptor::from(credentials.server(&[b"h2"]).expect("TLS"));
        let incoming = futures::stream::unfold((listener, tls), |(listener, tls)| async move {
            let (tcp, _) = listener.accept().await.expect("a connection");
            let stream = tls.accept(tcp).await.map(Tls);
            Some((stream, (listener, tls)))
        });
        let (sender, streams) = mpsc::unbounded_channel();
        let service = LeadDoorServer::new(Door(sender));
        let server = tokio::spawn(async move {
            let served = Server::builder()
                .add_service(service)
                .add_optional_service(renewals.map(RenewDoorServer::new))
                .serve_with_incoming(incoming)
                .await;
            served.expect("the server serves");
        });
        Self {
            address,
            streams,
            server,
        }
    }

    pub(crate) async fn stream(&mut self) -> AgentStream {
        let stream = soon("an agent's stream", self.streams.recv()).await;
        stream.expect("the lead is up")
    }

    /// As kill -9: the door and every stream are gone.
    pub(crate) async fn die(self, stream: AgentStream) {
        self.server.abort();
        let _ = self.server.await;
        drop(stream);
    }
}

/// A node's NetManager.
pub(crate) struct FakeNode {
    pub(crate) says: mpsc::Sender<FromNode>,
    hears: Streaming<ToNode>,
}

pub(crate) fn hello(node: &str) -> stream::Hello {
    stream::Hello {
        node: node.to_owned(),
        public_key: "a2V5".to_owned(),
        tunnel_port: 51_900,
        underlay: vec!["192.0.2.1".parse().expect("an address")],
        applied: None,
        version: "0.1.0".to_owned(),
    }
}

impl FakeNode {
    /// Dials `agent` and says `hello`.
    pub(crate) async fn dial(
        agent: SocketAddr,
        credentials: &Credentials,
        hello: stream::Hello,
    ) -> Result<Self, Status> {
        let tls = credentials
            .client(&[b"h2"], |role| matches!(role, Role::Agent { .. }))
            .expect("TLS");
        let connector = tower::service_fn(move |_: Uri| {
            let tls = TlsConnector::from(tls.clone());
            async move {
                let tcp = TcpStream::connect(agent).await?;
                let name = SERVER_NAME.try_into().expect("a DNS name");
                tls.connect(name, tcp).await.map(TokioIo::new)
            }
        });
        let endpoint = Endpoint::from_static("http://weft.internal");
        let channel = soon("a connection", endpoint.connect_with_connector(connector)).await;
        let channel = channel.map_err(|error| Status::unavailable(format!("{error:?}")))?;
        let (says, receiver) = mpsc::channel(16);
        says.try_send(FromNode::Hello(hello)).expect("room");
        let mut door = NodeDoorClient::new(channel);
        let response = soon("the door", door.follow(ReceiverStream::new(receiver))).await?;
        Ok(Self {
            says,
            hears: response.into_inner(),
        })
    }

    pub(crate) async fn say(&self, message: FromNode) {
        self.says.send(message).await.expect("the stream is up");
    }

    /// Says that its kernel matches this table, now and as often as a NetManager speaks: one that is silent is not ready.
    pub(crate) async fn stands(&self, revision: Revision) {
        let applied = FromNode::Applied { revision };
        self.say(applied.clone()).await;
        let says = self.says.downgrade();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(SPEAKS).await;
                // With the node its stream is gone.
                let Some(says) = says.upgrade() else { return };
                if says.send(applied.clone()).await.is_err() {
                    return;
                }
            }
        });
    }

    /// The next conditions for which `pick` has something.
    pub(crate) async fn conditions<T>(
        &mut self,
        mut pick: impl FnMut(&Conditions) -> Option<T>,
    ) -> T {
        soon("conditions", async {
            loop {
                let word = self.hears.next().await.expect("the stream is up");
                if let Ok(ToNode::Conditions(conditions)) = word
                    && let Some(found) = pick(&conditions)
                {
                    return found;
                }
            }
        })
        .await
    }

    /// The revision of the next table; `None` when the stream ended.
    pub(crate) async fn table(&mut self) -> Option<Revision> {
        loop {
            match soon("a table", self.hears.next()).await? {
                Ok(ToNode::Table(table)) => return Some(table.revision),
                Ok(ToNode::Conditions(_)) => {}
                Err(_) => return None,
            }
        }
    }
}

/// What the agent told the driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    Run(InstanceId, String),
    Stop(InstanceId, Duration),
    Forget(InstanceId),
}

/// A driver whose instances do what the test says; clones are the same driver.
#[derive(Clone, Debug)]
pub(crate) struct FakeDriver {
    told: Arc<Mutex<Vec<Told>>>,
    statuses: watch::Sender<Statuses>,
    /// Since when every serving instance uses half a processor.
    began: Instant,
}

impl FakeDriver {
    pub(crate) fn new() -> Self {
        Self {
            told: Arc::default(),
            statuses: watch::Sender::new(Statuses::new()),
            began: Instant::now(),
        }
    }

    pub(crate) fn told(&self) -> Vec<Told> {
        self.told.lock().expect("no panic").clone()
    }

    /// The instance is in `state` now.
    pub(crate) fn set(&self, id: &InstanceId, state: State) {
        self.statuses.send_modify(|statuses| {
            let status = statuses.get_mut(id).expect("it was run or stopped");
            if state == State::Serving && status.state != State::Serving {
                status.life += 1;
            }
            status.state = state;
        });
    }

    /// Waits until the instance is in `state`.
    pub(crate) async fn reaches(&self, id: &InstanceId, state: State) {
        let mut statuses = self.statuses.subscribe();
        let reached = statuses
            .wait_for(|statuses| statuses.get(id).is_some_and(|status| status.state == state));
        soon("a state", reached).await.expect("the driver is up");
    }

    fn enter(&self, id: &InstanceId, node: Option<&str>, state: State) {
        self.statuses.send_modify(|statuses| {
            let status = statuses.entry(id.clone()).or_insert(driver::Status {
                node: String::new(),
                state,
                life: 0,
                reason: String::new(),
            });
            status.state = state;
            if let Some(node) = node {
                node.clone_into(&mut status.node);
            }
        });
    }
}

impl Driver for FakeDriver {
    fn run(&self, id: &InstanceId, node: &str, _: &Run) {
        let told = Told::Run(id.clone(), node.to_owned());
        self.told.lock().expect("no panic").push(told);
        self.enter(id, Some(node), State::Starting);
    }

    fn stop(&self, id: &InstanceId, grace: Duration) {
        let told = Told::Stop(id.clone(), grace);
        self.told.lock().expect("no panic").push(told);
        self.enter(id, None, State::Stopping);
    }

    fn forget(&self, id: &InstanceId) {
        let told = Told::Forget(id.clone());
        self.told.lock().expect("no panic").push(told);
        self.statuses.send_modify(|statuses| {
            statuses.remove(id);
        });
    }

    fn used(&self) -> BTreeMap<InstanceId, Duration> {
        let statuses = self.statuses.borrow();
        let serving = statuses
            .iter()
            .filter(|(_, status)| status.state == State::Serving);
        serving
            .map(|(id, _)| (id.clone(), self.began.elapsed() / 2))
            .collect()
    }

    fn statuses(&self) -> watch::Receiver<Statuses> {
        self.statuses.subscribe()
    }
}

impl Connected for Tls {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl tokio::io::AsyncRead for Tls {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl tokio::io::AsyncWrite for Tls {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        std::pin::Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
