//! The door for who has no certificate yet: clusters that join by a token, and nothing else.
//!
//! ```text
//!  TCP --> TLS (ALPN weft-join/1; the lead shows its certificate and the authorities) --> JoinDoor/Join
//! ```
//!
//! It is behind the same port as the others, and apart from them: its connections get a router with the one route, are
//! few at once, and are let go after a short time.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, extract::DefaultBodyLimit};
use control_api::join::{ALPN, MESSAGE_LIMIT, join_door_server::JoinDoorServer};
use netmanager_api::identity::{Credentials, IdentityError};
use rustls::{ServerConfig, server::ClientHello};
use tokio::{net::TcpStream, sync::Semaphore, time::timeout};
use tokio_rustls::server::TlsStream;

use super::{Peer, speak};
use crate::{joins, lead::Lead};

/// How many connections there are at once: who comes then is let go, so that nobody keeps the others' places.
const CONNECTIONS: usize = 32;
/// How long one lasts: it looks for a leader meanwhile, and writes to the log.
const LASTS: Duration = Duration::from_secs(15);

/// The door.
pub(crate) struct Joins {
    pub(super) tls: Arc<ServerConfig>,
    routes: Router,
    room: Arc<Semaphore>,
}

/// TLS for who joins.
pub(crate) fn tls(credentials: &Credentials) -> Result<Arc<ServerConfig>, IdentityError> {
    credentials.server_that_introduces(&[ALPN])
}

/// All that can be asked here.
pub(crate) fn routes(lead: &Arc<Lead>) -> Router {
    let door = JoinDoorServer::new(joins::Joins(lead.clone()))
        .max_decoding_message_size(MESSAGE_LIMIT)
        .max_encoding_message_size(MESSAGE_LIMIT);
    tonic::service::Routes::new(door)
        .into_axum_router()
        .reset_fallback()
        .layer(DefaultBodyLimit::max(MESSAGE_LIMIT))
}

/// Whether a client asks for this door, and for no other.
pub(super) fn is_asked_for(hello: &ClientHello<'_>) -> bool {
    hello
        .alpn()
        .is_some_and(|mut names| names.all(|name| name == ALPN))
}

impl Joins {
    pub(crate) fn new(tls: Arc<ServerConfig>, routes: Router) -> Self {
        Self {
            tls,
            routes,
            room: Arc::new(Semaphore::new(CONNECTIONS)),
        }
    }

    pub(super) async fn serve(&self, stream: TlsStream<TcpStream>, peer: SocketAddr) {
        let Ok(_place) = self.room.clone().try_acquire_owned() else {
            return tracing::warn!(%peer, "refused: too many join at once");
        };
        let routes = self.routes.clone().layer(axum::Extension(Peer(peer)));
        if timeout(LASTS, speak(stream, peer, routes)).await.is_err() {
            tracing::warn!(%peer, "who would join took too long");
        }
    }
}
