//! A client's connection: HTTP/2 over mutual TLS, one request at a time; for the leads' API and for etcd's gRPC alike.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use netmanager_api::identity::SERVER_NAME;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::{net::TcpStream, task::JoinHandle, time::timeout};
use tokio_rustls::TlsConnector;

/// How long a connection, and an answer, may take.
const LIMIT: Duration = Duration::from_secs(15);

/// A member's address, and how one knocks there.
#[derive(Clone, Debug)]
pub struct Door {
    /// Where it is.
    pub address: SocketAddr,
    /// With which certificate, and to whom.
    pub tls: Arc<ClientConfig>,
}

/// What came back.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// What came behind the body.
    pub trailers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

/// A connection that lasts until it is dropped.
#[derive(Debug)]
pub struct Connection {
    requests: SendRequest<Full<Bytes>>,
    driver: JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Door {
    /// Connects.
    ///
    /// # Errors
    /// When nobody answers there in time, or somebody else does.
    pub async fn open(&self) -> Result<Connection> {
        let opened = timeout(LIMIT, self.connect()).await;
        opened
            .context("it took too long")
            .flatten()
            .with_context(|| format!("failed to connect to {}", self.address))
    }

    async fn connect(&self) -> Result<Connection> {
        let tcp = TcpStream::connect(self.address).await?;
        tcp.set_nodelay(true)?;
        let name = ServerName::try_from(SERVER_NAME).expect("it is a DNS name");
        let tls = TlsConnector::from(self.tls.clone());
        let stream = TokioIo::new(tls.connect(name, tcp).await?);
        let (requests, connection) = handshake(TokioExecutor::new(), stream).await?;
        let driver = tokio::spawn(async move {
            // Whoever asks hears of it.
            let _ = connection.await;
        });
        Ok(Connection { requests, driver })
    }
}

impl Connection {
    /// Sends `request` and reads the whole answer.
    ///
    /// # Errors
    /// When the connection breaks, or there is no answer in time.
    pub async fn ask(&self, request: Request<Full<Bytes>>) -> Result<Answer> {
        let mut requests = self.requests.clone();
        let asked = async {
            requests.ready().await?;
            let (head, body) = requests.send_request(request).await?.into_parts();
            let body = body.collect().await?;
            anyhow::Ok(Answer {
                status: head.status,
                headers: head.headers,
                trailers: body.trailers().cloned().unwrap_or_default(),
                body: body.to_bytes(),
            })
        };
        timeout(LIMIT, asked).await.context("no answer in time")?
    }
}

/// A request for `path`, of whoever listens.
///
/// # Panics
/// When a part is not valid.
#[must_use]
pub fn request(method: &str, path: &str, content_type: &str, body: Bytes) -> Request<Full<Bytes>> {
    Request::builder()
        .method(method)
        .uri(format!("https://{SERVER_NAME}{path}"))
        .header("content-type", content_type)
        .header("te", "trailers")
        .body(Full::new(body))
        .expect("the parts are valid")
}
