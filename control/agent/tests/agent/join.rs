//! Joining by a token, at a lead that does what the test says.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use control_api::join::{
    ALPN, JoinRequest, JoinString, Joined,
    join_door_server::{JoinDoor, JoinDoorServer},
};
use netmanager_api::identity::{Credentials, fingerprint, fingerprints_of_file};
use rcgen::CertificateSigningRequestParams;
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_rustls::TlsAcceptor;
use tonic::{Request, Response, Status, transport::Server};
use weft_agent::join::{JoinError, Member, join};

use crate::{
    authority::{Authority, Signer},
    fake::Tls,
};

/// What the lead answers, one after the other; then it gives certificates.
type Script = Arc<Mutex<Vec<Status>>>;

/// A lead's door for joins.
struct Door {
    signer: Signer,
    authorities: String,
    /// Whose certificate it gives.
    who: String,
    script: Script,
    asked: Arc<Mutex<Vec<JoinRequest>>>,
}

#[tonic::async_trait]
impl JoinDoor for Door {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<Joined>, Status> {
        let said = request.into_inner();
        self.asked.lock().unwrap().push(said.clone());
        if let Some(status) = self.script.lock().unwrap().pop() {
            return Err(status);
        }
        let wish = CertificateSigningRequestParams::from_pem(&said.request).unwrap();
        Ok(Response::new(Joined {
            chain: self.signer.sign(&self.who, &wish.public_key, |_| {}),
            authorities: self.authorities.clone(),
        }))
    }
}

struct Lead {
    authority: Authority,
    address: SocketAddr,
    script: Script,
    asked: Arc<Mutex<Vec<JoinRequest>>>,
    dir: tempfile::TempDir,
    server: JoinHandle<()>,
}

impl Drop for Lead {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Lead {
    /// One that gives certificates of `who`, and says that these authorities count beside its own.
    async fn start(who: &str, others: &str) -> Self {
        let authority = Authority::new();
        let credentials: Credentials = authority.issue("lead/a");
        let tls = credentials.server_that_introduces(&[ALPN]).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (script, asked) = (Script::default(), Arc::default());
        let door = Door {
            signer: authority.delegate("a"),
            authorities: format!("{others}{}", authority.root()),
            who: who.to_owned(),
            script: script.clone(),
            asked: Arc::clone(&asked),
        };
        let tls = TlsAcceptor::from(tls);
        let incoming = futures::stream::unfold((listener, tls), |(listener, tls)| async move {
            let (tcp, _) = listener.accept().await.unwrap();
            let stream = tls.accept(tcp).await.map(Tls);
            Some((stream, (listener, tls)))
        });
        let server = tokio::spawn(async move {
            let served = Server::builder()
                .add_service(JoinDoorServer::new(door))
                .serve_with_incoming(incoming);
            served.await.unwrap();
        });
        Self {
            authority,
            address,
            script,
            asked,
            dir: tempfile::tempdir().unwrap(),
            server,
        }
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("edge")
    }

    fn string(&self) -> JoinString {
        let ca = self.dir.path().join("ca.crt");
        fs::write(&ca, self.authority.root()).unwrap();
        JoinString {
            cluster: "edge".parse().unwrap(),
            secret: "5".repeat(64),
            // The first does not answer.
            leads: vec!["127.0.0.1:1".parse().unwrap(), self.address],
            authorities: fingerprints_of_file(&ca).unwrap().into_iter().collect(),
        }
    }

    async fn join(&self) -> Result<Member, JoinError> {
        join(&self.string().to_string(), &self.out()).await
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_joins_has_credentials_and_believes_in_the_named_authorities_only() {
    let lead = Lead::start("agent/edge", Authority::new().root()).await;
    let member = lead.join().await.unwrap();
    assert_eq!(member.identity.to_string(), "weft://m/agent/edge");
    let out = lead.out();
    assert_eq!(names(&out), ["ca.crt", "tls.crt", "tls.key"]);
    let mode = fs::metadata(out.join("tls.key")).unwrap().permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
    let believed = fingerprints_of_file(&out.join("ca.crt")).unwrap();
    assert_eq!(believed, Vec::from_iter(lead.string().authorities));
    Credentials::load(&out).unwrap();
    assert!(matches!(lead.join().await, Err(JoinError::Exists(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_join_that_is_asked_again_is_the_same_request() {
    let lead = Lead::start("agent/edge", "").await;
    let refused = Status::permission_denied("the token has expired");
    *lead.script.lock().unwrap() = vec![refused, Status::unavailable("no leader")];
    // What passes is asked for again, what is refused is said.
    let error = lead.join().await.unwrap_err().to_string();
    assert!(error.contains("the token has expired"), "{error}");
    assert_eq!(names(&lead.out()), ["join.csr", "join.key"]);
    lead.join().await.unwrap();
    let asked = lead.asked.lock().unwrap().clone();
    assert_eq!(asked.len(), 3);
    assert!(asked.iter().all(|it| *it == asked[0]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lead_of_another_authority_is_not_even_asked() {
    let lead = Lead::start("agent/edge", "").await;
    let mut string = lead.string();
    string.authorities = [fingerprint(b"another")].into();
    let error = join(&string.to_string(), &lead.out()).await.unwrap_err();
    let error = error.to_string();
    assert!(error.contains("expected authority"), "{error}");
    assert!(
        lead.asked.lock().unwrap().is_empty(),
        "the token is not shown"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_is_not_this_cluster_s_or_nobody_s_agent_is_not_written() {
    for who in ["agent/fog", "node/edge/n1", "user/ann"] {
        let lead = Lead::start(who, "").await;
        let refused = lead.join().await.unwrap_err();
        let is_refused = matches!(refused, JoinError::Other(_) | JoinError::Credentials(_));
        assert!(is_refused, "{who}: {refused}");
        assert_eq!(names(&lead.out()), ["join.csr", "join.key"], "{who}");
    }
}
