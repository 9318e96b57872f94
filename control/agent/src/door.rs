//! The node door: where the NetManagers of this cluster knock.
//!
//! Mutual TLS; only a node of this cluster gets in, by the name in its certificate, and only if it is configured; its
//! connection ends with its certificate. A newer stream of a node takes the place of an older one.

use std::{
    collections::BTreeSet,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures::{Stream, StreamExt};
use netmanager_api::{
    conditions::Conditions,
    identity::{Guarded, Identity, RevokedList, Role, Shown},
    stream::{
        FromNode, Hello, ToNode,
        node_door_server::{NodeDoor, NodeDoorServer},
    },
};
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, watch},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Server, server::Connected},
};

use crate::event::Event;

/// The largest message of a node, bytes: some 50,000 endpoints.
const MESSAGE_LIMIT: usize = 16 * 1024 * 1024;
/// How long a peer has for its TLS handshake, and a node for its hello.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// How many handshakes go on at once.
const HANDSHAKES: usize = 64;
/// How often a silent connection is probed, and how long it has to answer.
const KEEPALIVE: Duration = Duration::from_secs(1);

/// Who may come in, and where what they say goes.
#[derive(Debug)]
pub struct Door {
    /// The agent's own identity: mesh and cluster.
    pub identity: Identity,
    /// The nodes as configured.
    pub nodes: BTreeSet<String>,
    /// Where what is heard goes.
    pub events: mpsc::Sender<Event>,
    /// The certificates that count no more.
    pub revoked: RevokedList,
    streams: AtomicU64,
}

impl Door {
    /// A door of the agent `identity` for its `nodes`.
    #[must_use]
    pub fn new(
        identity: Identity,
        nodes: BTreeSet<String>,
        events: mpsc::Sender<Event>,
        revoked: RevokedList,
    ) -> Self {
        Self {
            identity,
            nodes,
            events,
            revoked,
            streams: AtomicU64::new(0),
        }
    }

    /// Serves until `shutdown`.
    ///
    /// # Errors
    /// When the server fails.
    pub async fn serve(
        self,
        listener: TcpListener,
        tls: Arc<ServerConfig>,
        shutdown: CancellationToken,
    ) -> Result<(), tonic::transport::Error> {
        let (sender, receiver) = mpsc::channel(8);
        let revoked = self.revoked.clone();
        let accepting = accept(listener, TlsAcceptor::from(tls), revoked, sender);
        let serving = Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE))
            .add_service(NodeDoorServer::new(self).max_decoding_message_size(MESSAGE_LIMIT))
            .serve_with_incoming(ReceiverStream::new(receiver));
        tokio::select! {
            // Streams have no end of their own: those that are up are cut.
            () = shutdown.cancelled() => Ok(()),
            result = serving => result,
            never = accepting => match never {},
        }
    }

    /// The name of the node behind a request, if it may come in.
    fn admit(&self, caller: Option<&Caller>) -> Result<String, Status> {
        let Some(Caller(identity)) = caller else {
            return Err(Status::unauthenticated("the caller showed no certificate"));
        };
        let own = match &self.identity.role {
            Role::Agent { cluster } => cluster,
            _ => return Err(Status::internal("this door belongs to no agent")),
        };
        match &identity.role {
            Role::Node { cluster, node }
                if cluster == own && identity.mesh == self.identity.mesh =>
            {
                if self.nodes.contains(node) {
                    Ok(node.clone())
                } else {
                    Err(Status::permission_denied(format!(
                        "{identity} is no node of this agent's configuration: add it to driver.local.nodes"
                    )))
                }
            }
            _ => Err(Status::permission_denied(format!(
                "{identity} may not come in: this door is for weft://{}/node/{own}/NODE",
                self.identity.mesh
            ))),
        }
    }
}

#[tonic::async_trait]
impl NodeDoor for Door {
    type FollowStream = Pin<Box<dyn Stream<Item = Result<ToNode, Status>> + Send>>;

    async fn follow(
        &self,
        request: Request<Streaming<FromNode>>,
    ) -> Result<Response<Self::FollowStream>, Status> {
        let admitted = self.admit(request.extensions().get());
        let node = admitted.inspect_err(|status| {
            tracing::warn!(
                reason = status.message(),
                "refused a caller at the node door"
            );
        })?;
        let mut messages = request.into_inner();
        let hello = first_word(&node, &mut messages).await;
        let hello = hello.inspect_err(|status| {
            tracing::warn!(node, reason = status.message(), "refused a node's hello");
        })?;
        let stream = self.streams.fetch_add(1, Ordering::Relaxed) + 1;
        let (tables, table) = watch::channel(None);
        let (conditions, condition) = watch::channel(Conditions::default());
        let connected = Event::Connected {
            node: node.clone(),
            stream,
            hello,
            tables,
            conditions,
        };
        let closing = |_| Status::unavailable("the agent ends");
        self.events.send(connected).await.map_err(closing)?;
        tokio::spawn(listen(node, stream, messages, self.events.clone()));
        let out = WatchStream::new(table).filter_map(|table| async move {
            let table = table?;
            Some(Ok(ToNode::Table(Box::new((*table).clone()))))
        });
        let conditions = WatchStream::from_changes(condition);
        let conditions = conditions.map(|conditions| Ok(ToNode::Conditions(conditions)));
        Ok(Response::new(Box::pin(ends_with(out, conditions))))
    }
}

/// Both streams in one, until the first ends.
fn ends_with<T: Send + 'static>(
    first: impl Stream<Item = T> + Send + 'static,
    second: impl Stream<Item = T> + Send + 'static,
) -> impl Stream<Item = T> + Send {
    let ending = first.map(Some).chain(futures::stream::iter([None]));
    futures::stream::select(ending, second.map(Some))
        .take_while(|item| std::future::ready(item.is_some()))
        .filter_map(std::future::ready)
}

async fn first_word(node: &str, messages: &mut Streaming<FromNode>) -> Result<Hello, Status> {
    let first = timeout(HANDSHAKE, messages.message())
        .await
        .map_err(|_| Status::deadline_exceeded("no hello within 5 s"))??;
    match first {
        Some(FromNode::Hello(hello)) if hello.node == node => Ok(hello),
        Some(FromNode::Hello(hello)) => Err(Status::permission_denied(format!(
            "the hello says node {:?}, the certificate says {node:?}",
            hello.node
        ))),
        _ => Err(Status::invalid_argument(
            "the first message must be a hello",
        )),
    }
}

/// Hands on what a node says until its stream breaks; ends then, or with the engine.
async fn listen(
    node: String,
    stream: u64,
    mut messages: Streaming<FromNode>,
    events: mpsc::Sender<Event>,
) {
    loop {
        let event = match messages.message().await {
            Ok(Some(message)) => Event::Said {
                node: node.clone(),
                stream,
                message,
            },
            Ok(None) | Err(_) => Event::Broke {
                node: node.clone(),
                stream,
            },
        };
        let broke = matches!(event, Event::Broke { .. });
        if events.send(event).await.is_err() || broke {
            return;
        }
    }
}

/// Takes connections for ever and hands on those whose TLS handshake succeeds.
async fn accept(
    listener: TcpListener,
    tls: TlsAcceptor,
    revoked: RevokedList,
    sender: mpsc::Sender<io::Result<Connection>>,
) -> std::convert::Infallible {
    let slots = Arc::new(Semaphore::new(HANDSHAKES));
    loop {
        let slot = slots.clone().acquire_owned().await;
        let (tcp, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "failed to accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await; // Out of descriptors: let some close.
                continue;
            }
        };
        let (tls, revoked, sender) = (tls.clone(), revoked.clone(), sender.clone());
        tokio::spawn(async move {
            let _slot = slot;
            let handshake = async {
                tcp.set_nodelay(true)?;
                tls.accept(tcp).await
            };
            match timeout(HANDSHAKE, handshake).await {
                Ok(Ok(stream)) => match Shown::of_peer(stream.get_ref().1) {
                    Ok(shown) => {
                        let stream = Guarded::new(stream, Arc::new(shown), revoked);
                        let _ = sender.send(Ok(Connection(stream))).await;
                    }
                    Err(error) => tracing::warn!(%peer, %error, "refused"),
                },
                Ok(Err(error)) => tracing::warn!(%peer, %error, "refused at the TLS handshake"),
                Err(_) => tracing::warn!(%peer, "refused: the TLS handshake took too long"),
            }
        });
    }
}

/// Who is at the other end of a connection, by its certificate.
#[derive(Clone, Debug)]
struct Caller(Identity);

/// A TLS connection that knows who is at its other end.
#[derive(Debug)]
struct Connection(Guarded<TlsStream<TcpStream>>);

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        Caller(self.0.shown().identity.clone())
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
