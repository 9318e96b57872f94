//! Knocking at a lead's door: one HTTP/2 connection over mutual TLS, kept and made again when it breaks.

use std::{
    collections::BTreeMap,
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use netmanager_api::identity::{
    Credentials, Guarded, IdentityError, RevokedList, Role, SERVER_NAME, Shown,
};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::{Channel, Endpoint};
use tower::{Service, ServiceExt};

use crate::world::{Boxed, Wire};

/// The limit of one connection attempt, TLS included.
const CONNECT: Duration = Duration::from_secs(2);
/// How often a silent connection is probed, and how long it may not answer.
const PROBE: Duration = Duration::from_secs(2);

/// The largest answer that is read, bytes.
const ANSWER_LIMIT: usize = 64 << 20;

/// Why a request got no answer: whatever the connection says.
pub type DialError = Box<dyn std::error::Error + Send + Sync>;

type Connecting =
    Pin<Box<dyn Future<Output = io::Result<TokioIo<Guarded<TlsStream<TcpStream>>>>> + Send>>;

/// A connection to `address`, made when it is first used, to whoever `accept` accepts there; it breaks when the
/// certificate that was shown there is revoked or expires.
///
/// # Errors
/// When the credentials do not serve for TLS.
pub fn dial(
    credentials: &Credentials,
    address: SocketAddr,
    accept: impl Fn(&Role) -> bool + Send + Sync + 'static,
) -> Result<Channel, IdentityError> {
    let tls = credentials.client(&[b"h2"], accept)?;
    Ok(lazily(tls, credentials.revoked(), address))
}

/// A connection to `address`, made when it is first used, by this TLS, of who has no list of what is revoked.
pub fn dial_by(tls: Arc<ClientConfig>, address: SocketAddr) -> Channel {
    lazily(tls, RevokedList::default(), address)
}

fn lazily(tls: Arc<ClientConfig>, revoked: RevokedList, address: SocketAddr) -> Channel {
    Endpoint::from_shared(format!("https://{address}"))
        .expect("an address and a scheme are a URI")
        .connect_timeout(CONNECT)
        .http2_keep_alive_interval(PROBE)
        .keep_alive_timeout(PROBE)
        .keep_alive_while_idle(true)
        .tcp_nodelay(true)
        .connect_with_connector_lazy(tower::service_fn(move |_| {
            connect(tls.clone(), revoked.clone(), address)
        }))
}

/// Sends `request` and reads the whole answer.
///
/// # Errors
/// When the connection cannot be made or breaks, or the answer is larger than 64 MiB.
pub async fn exchange(
    mut channel: Channel,
    request: Request<Bytes>,
) -> Result<(StatusCode, Bytes), DialError> {
    let request = request.map(|body| tonic::body::Body::new(axum::body::Body::from(body)));
    let answer = channel.ready().await?.call(request).await?;
    let status = answer.status();
    let body = axum::body::Body::new(answer.into_body());
    Ok((status, axum::body::to_bytes(body, ANSWER_LIMIT).await?))
}

/// The connections to the other leads, one each.
#[derive(Debug)]
pub(crate) struct Connections {
    credentials: Arc<Credentials>,
    /// With the generation of the credentials that each was made with.
    channels: Mutex<BTreeMap<String, (u64, Channel)>>,
}

impl Connections {
    pub(crate) fn new(credentials: Arc<Credentials>) -> Self {
        Self {
            credentials,
            channels: Mutex::default(),
        }
    }

    fn channel(&self, lead: &str, address: SocketAddr) -> Channel {
        let key = format!("{lead}@{address}");
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        let connect = || {
            let lead = lead.to_owned();
            let is_it = move |role: &Role| matches!(role, Role::Lead { name } if *name == lead);
            dial(&self.credentials, address, is_it)
                .expect("the credentials opened this lead's own door before")
        };
        // What is under way on an old one is answered there.
        let now = self.credentials.generation();
        match channels.get(&key) {
            Some((made, channel)) if *made == now => channel.clone(),
            _ => {
                let channel = connect();
                channels.insert(key, (now, channel.clone()));
                channel
            }
        }
    }
}

impl Wire for Connections {
    fn exchange(
        &self,
        name: &str,
        address: SocketAddr,
        request: Request<Bytes>,
    ) -> Boxed<'_, Result<(StatusCode, Bytes), DialError>> {
        Box::pin(exchange(self.channel(name, address), request))
    }
}

fn connect(tls: Arc<ClientConfig>, revoked: RevokedList, address: SocketAddr) -> Connecting {
    Box::pin(async move {
        let tcp = TcpStream::connect(address).await?;
        tcp.set_nodelay(true)?;
        let name = ServerName::try_from(SERVER_NAME).expect("it is a DNS name");
        let stream = TlsConnector::from(tls).connect(name, tcp).await?;
        let shown = Shown::of_peer(stream.get_ref().1).map_err(io::Error::other)?;
        Ok(TokioIo::new(Guarded::new(stream, Arc::new(shown), revoked)))
    })
}
