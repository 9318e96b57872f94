//! An agent's node door for the tests: real TLS and gRPC, and a channel each way.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use futures::{Stream, StreamExt};
use netmanager_api::{
    identity::Credentials,
    stream::{
        FromNode, ToNode,
        node_door_server::{NodeDoor, NodeDoorServer},
    },
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType};
use rustls::ServerConfig;
use tokio::{
    io::{DuplexStream, copy_bidirectional, duplex},
    net::TcpListener,
    sync::{Mutex, mpsc},
    task::{JoinHandle, yield_now},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, transport::Server};

/// A mesh's certificate authority.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    directory: tempfile::TempDir,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "mesh");
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        Self {
            issuer,
            directory: tempfile::tempdir().unwrap(),
        }
    }

    /// The folder with the credentials of `weft://m/ROLE`.
    pub(crate) fn issue(&self, role: &str) -> PathBuf {
        let mut params = CertificateParams::new(vec!["weft.internal".to_owned()]).unwrap();
        let uri = format!("weft://m/{role}").as_str().try_into().unwrap();
        params.subject_alt_names.push(SanType::URI(uri));
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let folder = self.directory.path().join(role.replace('/', "-"));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("tls.crt"), certificate.pem()).unwrap();
        fs::write(folder.join("tls.key"), key.serialize_pem()).unwrap();
        fs::write(folder.join("ca.crt"), self.issuer.pem()).unwrap();
        let private = fs::Permissions::from_mode(0o600);
        fs::set_permissions(folder.join("tls.key"), private).unwrap();
        folder
    }
}

/// A running door; it closes on drop.
pub(crate) struct Agent {
    pub(crate) address: SocketAddr,
    /// What nodes say.
    pub(crate) said: mpsc::UnboundedReceiver<FromNode>,
    /// What the node of the next or running stream is told.
    pub(crate) tell: mpsc::Sender<Result<ToNode, Status>>,
    /// TLS handshakes that failed.
    pub(crate) refused: mpsc::UnboundedReceiver<io::Error>,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Agent {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

struct Door {
    said: mpsc::UnboundedSender<FromNode>,
    told: Mutex<Option<mpsc::Receiver<Result<ToNode, Status>>>>,
}

#[tonic::async_trait]
impl NodeDoor for Door {
    type FollowStream = Pin<Box<dyn Stream<Item = Result<ToNode, Status>> + Send>>;

    async fn follow(
        &self,
        request: Request<Streaming<FromNode>>,
    ) -> Result<Response<Self::FollowStream>, Status> {
        let mut words = request.into_inner();
        let said = self.said.clone();
        tokio::spawn(async move {
            while let Some(Ok(word)) = words.next().await {
                if said.send(word).is_err() {
                    return;
                }
            }
        });
        let told = self.told.lock().await.take();
        let told = told.ok_or_else(|| Status::unavailable("one stream per door"))?;
        Ok(Response::new(Box::pin(ReceiverStream::new(told))))
    }
}

impl Agent {
    /// Opens the door with the credentials in `folder`.
    pub(crate) async fn open(folder: &Path, at: SocketAddr) -> Self {
        let tls = Credentials::load(folder).unwrap().server(&[b"h2"]).unwrap();
        // A door that was just dropped closes with its task's next turn.
        let listener = timeout(Duration::from_secs(10), async {
            loop {
                match TcpListener::bind(at).await {
                    Ok(listener) => return listener,
                    Err(_) => yield_now().await,
                }
            }
        })
        .await
        .unwrap();
        let address = listener.local_addr().unwrap();
        let (said_sender, said) = mpsc::unbounded_channel();
        let (tell, told) = mpsc::channel(8);
        let (refused_sender, refused) = mpsc::unbounded_channel();
        let (streams, incoming) = mpsc::channel::<io::Result<DuplexStream>>(8);
        let door = Door {
            said: said_sender,
            told: Mutex::new(Some(told)),
        };
        let serving = Server::builder()
            .add_service(NodeDoorServer::new(door))
            .serve_with_incoming(ReceiverStream::new(incoming));
        let serving = tokio::spawn(async move { serving.await.unwrap() });
        let accepting = tokio::spawn(accept(listener, tls, streams, refused_sender));
        Self {
            address,
            said,
            tell,
            refused,
            tasks: [serving, accepting],
        }
    }
}

/// Hands each connection's plain bytes on; they end with this task.
async fn accept(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    streams: mpsc::Sender<io::Result<DuplexStream>>,
    refused: mpsc::UnboundedSender<io::Error>,
) {
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((tcp, _)) = listener.accept().await {
        match TlsAcceptor::from(tls.clone()).accept(tcp).await {
            Ok(mut outside) => {
                let (mut inside, served) = duplex(64 << 10);
                connections.spawn(async move {
                    let _ = copy_bidirectional(&mut outside, &mut inside).await;
                });
                let _ = streams.send(Ok(served)).await;
            }
            Err(error) => {
                let _ = refused.send(error);
            }
        }
    }
}
