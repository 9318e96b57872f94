//! The lead's one door: a TLS port for users, agents and leads.
//!
//! ```text
//!  TCP --> TLS (certificate of this mesh required, not revoked) --> HTTP/2 or HTTP/1.1
//!      --> roles::admit(who, where) --> /v1/...  LeadDoor  /raft/v1/...
//!                                         '--> roles::authorise(access, method, route, namespace)
//! ```
//!
//! A connection's certificate says who it is; every request is checked against it, and a connection ends with its
//! certificate. What a request means is not known here.

mod begun;
pub(crate) mod caller;
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
use control_api::stream::{MESSAGE_LIMIT, lead_door_server::LeadDoorServer};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use netmanager_api::identity::{Credentials, Guarded, Identity, IdentityError, RevokedList, Shown};
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{begun::Begun, caller::Caller};
use crate::{agents::AgentDoor, api, lead::Lead, problem::Refusal};

/// The limit of one TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);
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
    /// How many connections there are at once; who comes then waits.
    pub(crate) connections: usize,
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
        let acceptor = TlsAcceptor::from(self.tls);
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
            let (acceptor, revoked) = (acceptor.clone(), self.revoked.clone());
            let (routes, shutdown) = (self.routes.clone(), shutdown.clone());
            tasks.spawn(async move {
                let _place = place;
                tokio::select! {
                    () = connection(acceptor, tcp, peer, revoked, routes) => {}
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

async fn connection(
    acceptor: TlsAcceptor,
    tcp: TcpStream,
    peer: SocketAddr,
    revoked: Option<RevokedList>,
    routes: Router,
) {
    let _ = tcp.set_nodelay(true);
    let stream = match timeout(HANDSHAKE, acceptor.accept(tcp)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::warn!(%peer, %error, "refused at the TLS handshake"),
        Err(_) => return tracing::warn!(%peer, "refused: the TLS handshake took too long"),
    };
    let Some(revoked) = revoked else {
        let routes = routes.layer(axum::Extension(tokens::Peer(peer)));
        return speak(stream, peer, routes).await;
    };
    let shown = match Shown::of_peer(stream.get_ref().1) {
        Ok(shown) => shown,
        Err(error) => return tracing::warn!(%peer, %error, "refused"),
    };
    let routes = routes.layer(axum::Extension(shown.identity.clone()));
    let stream = Guarded::new(stream, Arc::new(shown), revoked);
    speak(stream, peer, routes).await;
}

/// HTTP on a connection, until it ends.
async fn speak<S>(stream: S, peer: SocketAddr, routes: Router)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http2()
        .timer(TokioTimer::new())
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
