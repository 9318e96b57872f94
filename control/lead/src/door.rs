//! The lead's one door: a TLS port for users, agents and leads.
//!
//! ```text
//!  TCP --> TLS (certificate of this mesh required, not revoked) --> HTTP/2 or HTTP/1.1
//!      --> roles::admit(who, where) --> /v1/...  LeadDoor  RenewDoor  /raft/v1/...
//!                                         '--> roles::authorise(access, method, route, namespace)
//! ```
//!
//! Who asks for it in the handshake (ALPN) shows no certificate and gets to another door, [`joins`], whose routes are its own.
//!
//! A connection's certificate says who it is; every request is checked against it, and a connection ends with its
//! certificate. What a request means is not known here.

mod begun;
pub(crate) mod caller;
pub(crate) mod joins;
pub(crate) mod limits;
mod peers;
mod roles;
pub(crate) mod tokens;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::Request,
    middleware::{Next, from_fn},
    response::Response,
};
use control_api::{
    join::renew_door_server::RenewDoorServer,
    stream::{MESSAGE_LIMIT, lead_door_server::LeadDoorServer},
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use netmanager_api::identity::{Credentials, Guarded, Identity, IdentityError, RevokedList, Shown};
use rustls::{ServerConfig, server::Acceptor};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_rustls::{LazyConfigAcceptor, server::TlsStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{begun::Begun, caller::Caller, joins::Joins, limits::Limits};
use crate::{agents::AgentDoor, api, joins::Renewals, lead::Lead, problem::Refusal};

/// The other end of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub(crate) SocketAddr);

/// The limit of one TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// How many requests a connection carries at once.
const STREAMS: u32 = 256;
/// How often a silent connection is probed, and how long it may not answer.
const PROBE: Duration = Duration::from_secs(5);
/// How long to wait when the system gives no more connections.
const EXHAUSTED: Duration = Duration::from_millis(100);

/// How many connections the leads' and agents' door holds: 1,000 agents, and room for who comes and goes.
pub(crate) const CONNECTIONS: usize = 4_096;
/// How many the door for tokens holds, which opens for who shows nothing at first: so few that the descriptors of the
/// process are left for the others.
pub(crate) const CONNECTIONS_BY_TOKEN: usize = 256;

/// What the door needs.
pub(crate) struct Door {
    pub(crate) listener: TcpListener,
    pub(crate) tls: Arc<ServerConfig>,
    /// What is revoked; `None` at the door for who shows no certificate.
    pub(crate) revoked: Option<RevokedList>,
    pub(crate) routes: Router,
    /// Where clusters join, behind the same port; `None`: nowhere.
    pub(crate) joins: Option<Joins>,
    /// How many connections there are at once; who comes then waits.
    pub(crate) connections: usize,
    /// What one caller may take of it.
    pub(crate) limits: Arc<Limits>,
}

/// TLS as the door speaks it.
pub(crate) fn tls(credentials: &Credentials) -> Result<Arc<ServerConfig>, IdentityError> {
    credentials.server(&[b"h2", b"http/1.1"])
}

/// TLS for who shows no certificate.
pub(crate) fn tls_for_tokens(
    credentials: &Credentials,
) -> Result<Arc<ServerConfig>, IdentityError> {
    credentials.server_for_all(&[b"h2", b"http/1.1"])
}

/// Everything that can be asked here.
pub(crate) fn routes(lead: &Arc<Lead>, agents: AgentDoor) -> Router {
    let agents = LeadDoorServer::new(agents)
        .max_decoding_message_size(MESSAGE_LIMIT)
        .max_encoding_message_size(MESSAGE_LIMIT);
    let agents = tonic::service::Routes::new(agents)
        .add_service(RenewDoorServer::new(Renewals::new(lead.clone())))
        .into_axum_router()
        .reset_fallback();
    Router::new()
        .merge(api::routes(lead.clone()))
        .merge(peers::routes(lead.clone()))
        .merge(agents)
        .layer(from_fn(admit))
}

async fn admit(mut request: Request, next: Next) -> Response {
    let identity = request
        .extensions()
        .get::<Identity>()
        .expect("every connection has one");
    let limits = request.extensions().get::<Arc<Limits>>();
    if let Some(Err(refusal)) = limits.map(|limits| limits.ask_as(identity)) {
        tracing::debug!(%identity, path = request.uri().path(), "refused: too many requests");
        return refusal.answer();
    }
    if let Err(expected) = roles::admit(&identity.role, request.uri().path()) {
        tracing::warn!(%identity, path = request.uri().path(), takes = expected, "refused");
        return Refusal::role(identity, expected).answer();
    }
    if let Some(caller) = Caller::of(identity) {
        request.extensions_mut().insert(caller);
    }
    next.run(request).await
}

impl Door {
    /// Serves until `shutdown`; connections are ended then.
    pub(crate) async fn serve(self, shutdown: CancellationToken) {
        let tasks = TaskTracker::new();
        let behind = Arc::new(Behind {
            tls: self.tls,
            revoked: self.revoked,
            routes: self.routes,
            joins: self.joins,
            limits: self.limits,
        });
        let room = Arc::new(Semaphore::new(self.connections));
        loop {
            let accepted = tokio::select! {
                accepted = accept(&self.listener, &room) => accepted,
                () = shutdown.cancelled() => break,
            };
            let (place, tcp, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "failed to accept a connection");
                    tokio::time::sleep(EXHAUSTED).await;
                    continue;
                }
            };
            let (behind, shutdown) = (behind.clone(), shutdown.clone());
            tasks.spawn(async move {
                let _place = place;
                tokio::select! {
                    () = behind.connection(tcp, peer) => {}
                    () = shutdown.cancelled() => {}
                }
            });
        }
        tasks.close();
        tasks.wait().await;
    }
}

/// The next connection, once there is room for it.
async fn accept(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
) -> io::Result<(OwnedSemaphorePermit, TcpStream, SocketAddr)> {
    if room.available_permits() == 0 {
        tracing::warn!("the door is full: the next connection waits until one ends");
    }
    let place = room.clone().acquire_owned().await;
    let place = place.expect("nobody closes the semaphore");
    let (tcp, peer) = listener.accept().await?;
    Ok((place, tcp, peer))
}

/// What a connection finds.
struct Behind {
    tls: Arc<ServerConfig>,
    revoked: Option<RevokedList>,
    routes: Router,
    joins: Option<Joins>,
    limits: Arc<Limits>,
}

impl Behind {
    async fn connection(&self, tcp: TcpStream, peer: SocketAddr) {
        let _ = tcp.set_nodelay(true);
        let (stream, joins) = match timeout(HANDSHAKE, self.accept(tcp)).await {
            Ok(Ok(accepted)) => accepted,
            Ok(Err(error)) => return tracing::warn!(%peer, %error, "refused at the TLS handshake"),
            Err(_) => return tracing::warn!(%peer, "refused: the TLS handshake took too long"),
        };
        if let Some(joins) = joins {
            return joins.serve(stream, peer).await;
        }
        let Some(revoked) = self.revoked.clone() else {
            let routes = self.routes.clone();
            let routes = routes
                .layer(axum::Extension(Peer(peer)))
                .layer(axum::Extension(self.limits.clone()));
            return speak(stream, peer, routes).await;
        };
        let shown = match Shown::of_peer(stream.get_ref().1) {
            Ok(shown) => Arc::new(shown),
            Err(error) => return tracing::warn!(%peer, %error, "refused"),
        };
        let identity = &shown.identity;
        let Some(_place) = self.limits.connect(identity) else {
            return tracing::warn!(%peer, %identity, "refused: it has too many connections");
        };
        let routes = self.routes.clone();
        let routes = routes
            .layer(axum::Extension(self.limits.clone()))
            .layer(axum::Extension(shown.identity.clone()))
            .layer(axum::Extension(shown.clone()));
        speak(Guarded::new(stream, shown, revoked), peer, routes).await;
    }

    /// The handshake; with the door for joins, if that was asked for.
    async fn accept(&self, tcp: TcpStream) -> io::Result<(TlsStream<TcpStream>, Option<&Joins>)> {
        let start = LazyConfigAcceptor::new(Acceptor::default(), tcp).await?;
        let joins = self
            .joins
            .as_ref()
            .filter(|_| joins::is_asked_for(&start.client_hello()));
        let tls = joins.map_or(&self.tls, |joins| &joins.tls);
        Ok((start.into_stream(tls.clone()).await?, joins))
    }
}

/// HTTP on a connection, until it ends.
pub(crate) async fn speak<S>(stream: S, peer: SocketAddr, routes: Router)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .keep_alive_interval(PROBE)
        .keep_alive_timeout(PROBE);
    builder.http1().timer(TokioTimer::new());
    let served = builder
        .serve_connection(
            TokioIo::new(Begun::new(stream)),
            TowerToHyperService::new(routes),
        )
        .await;
    if let Err(error) = served {
        tracing::debug!(%peer, error, "a connection broke");
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;

    #[tokio::test]
    async fn a_full_door_takes_the_next_one_when_one_has_left() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let room = Arc::new(Semaphore::new(1));
        let _first = TcpStream::connect(at).await.unwrap();
        let _next = TcpStream::connect(at).await.unwrap();
        let (place, _, _) = accept(&listener, &room).await.unwrap();
        let mut next = pin!(accept(&listener, &room));
        let early = timeout(Duration::from_millis(100), &mut next).await;
        assert!(early.is_err(), "{early:?}");
        drop(place);
        let (_place, _, _) = timeout(HANDSHAKE, next).await.unwrap().unwrap();
    }
}
