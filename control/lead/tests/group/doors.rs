//! Knocking at a lead's door with every certificate that should not open it.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::StatusCode;
use netmanager_api::identity::{BACKDATED, SERVER_NAME};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};
use rustls::{ClientConfig, ConfigBuilder, RootCertStore, client::WantsClientCert};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;

use crate::{
    goal,
    log::Log,
    mesh::{LIMIT, TestMesh},
};

const DAY: Duration = Duration::from_secs(86_400);

/// A certificate as nobody should issue it.
struct Forged<'a> {
    identities: &'a [&'a str],
    /// How long ago it was issued, and how long it lasts from then.
    age: Duration,
    lasts: Duration,
    /// Signed by a CA of the same name, but of its own.
    is_foreign: bool,
}

impl Forged<'_> {
    const fn of<'a>(identities: &'a [&'a str]) -> Forged<'a> {
        Forged {
            identities,
            age: Duration::ZERO,
            lasts: DAY,
            is_foreign: false,
        }
    }

    /// Makes it in `out`, with the mesh's CA as the one to trust.
    fn issue(&self, mesh: &TestMesh, out: &str) -> PathBuf {
        let out = mesh.path().join(out);
        fs::create_dir_all(&out).unwrap();
        let ca = fs::read_to_string(mesh.path().join("ca/ca.crt")).unwrap();
        let key = fs::read_to_string(mesh.path().join("ca/ca.key")).unwrap();
        let signs = match self.is_foreign {
            false => KeyPair::from_pem(&key).unwrap(),
            true => KeyPair::generate().unwrap(),
        };
        let issuer = Issuer::from_ca_cert_pem(&ca, signs).unwrap();
        let mut params = CertificateParams::new(vec![SERVER_NAME.to_owned()]).unwrap();
        for identity in self.identities {
            let name = SanType::URI((*identity).try_into().unwrap());
            params.subject_alt_names.push(name);
        }
        params.is_ca = IsCa::NoCa;
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let begins = SystemTime::now() - self.age - BACKDATED;
        params.not_before = begins.into();
        params.not_after = (begins + BACKDATED + self.lasts).into();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &issuer).unwrap();
        fs::write(out.join("tls.crt"), certificate.pem()).unwrap();
        fs::write(out.join("ca.crt"), ca).unwrap();
        let path = out.join("tls.key");
        fs::write(&path, key.serialize_pem()).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        out
    }
}

/// TLS with the certificate in `dir`, or with none; it does not look at who answers.
fn tls(mesh: &TestMesh, dir: Option<&Path>) -> Arc<ClientConfig> {
    let read = |dir: &Path, name| fs::read_to_string(dir.join(name)).unwrap();
    match dir {
        None => Arc::new(to_any_lead(mesh).with_no_client_auth()),
        Some(dir) => tls_of_chain(mesh, &read(dir, "tls.crt"), &read(dir, "tls.key")),
    }
}

/// TLS with this chain and key, PEM.
pub(crate) fn tls_of_chain(mesh: &TestMesh, chain: &str, key: &str) -> Arc<ClientConfig> {
    let chain = CertificateDer::pem_slice_iter(chain.as_bytes()).map(Result::unwrap);
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
    let config = to_any_lead(mesh).with_client_auth_cert(chain.collect(), key);
    Arc::new(config.unwrap())
}

fn to_any_lead(mesh: &TestMesh) -> ConfigBuilder<ClientConfig, WantsClientCert> {
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_file(mesh.path().join("ca/ca.crt")).unwrap();
    roots.add(ca).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
}

/// Says one line of HTTP; the status, or how the door was shut.
pub(crate) async fn knock(
    at: SocketAddr,
    tls: Arc<ClientConfig>,
    ask: &str,
) -> io::Result<(u16, String)> {
    let exchange = async {
        let tcp = TcpStream::connect(at).await?;
        let name = SERVER_NAME.try_into().unwrap();
        let mut stream = TlsConnector::from(tls).connect(name, tcp).await?;
        let text = format!(
            "{ask} HTTP/1.1\r\nhost: weft\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
        );
        stream.write_all(text.as_bytes()).await?;
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer).await;
        match answer.get(9..12).and_then(|status| status.parse().ok()) {
            Some(status) => Ok((status, answer)),
            None => Err(read
                .err()
                .unwrap_or_else(|| io::ErrorKind::ConnectionAborted.into())),
        }
    };
    timeout(LIMIT, exchange).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_shows_no_good_certificate_does_not_get_past_tls() {
    let mesh = TestMesh::start(&["a"]).await;
    mesh.leader().await;
    let user = ["weft://demo/user/mallory"];
    let cases = [
        (
            "foreign",
            Forged {
                is_foreign: true,
                ..Forged::of(&user)
            },
            "BadSignature",
        ),
        (
            "expired",
            Forged {
                age: DAY * 3,
                ..Forged::of(&user)
            },
            "expired",
        ),
        (
            "other-mesh",
            Forged::of(&["weft://other/user/mallory"]),
            "of mesh",
        ),
        ("nobody", Forged::of(&[]), "0 identities"),
        (
            "two",
            Forged::of(&["weft://demo/user/mallory", "weft://demo/lead/a"]),
            "2 identities",
        ),
    ];
    let at = mesh.address("a");
    for (name, forged, why) in cases {
        let dir = forged.issue(&mesh, name);
        for ask in ["GET /v1/status", "POST /raft/v1/vote"] {
            let answer = knock(at, tls(&mesh, Some(&dir)), ask).await;
            assert!(answer.is_err(), "{name}: {answer:?}");
        }
        Log::says(&["refused a certificate", why]).await;
    }
    let answer = knock(at, tls(&mesh, None), "GET /v1/status").await;
    assert!(answer.is_err(), "{answer:?}");
    Log::says(&["refused at the TLS handshake", "no certificates"]).await;
    // The door still opens for who may.
    let (status, _) = mesh.ask("a", "GET", "/v1/status", "").await;
    assert_eq!(status, StatusCode::OK);
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_gets_past_tls_and_says_nothing_is_let_go() {
    let mesh = TestMesh::start(&["a"]).await;
    mesh.leader().await;
    let user = mesh.path().join("user");
    let doors = [
        (mesh.address("a"), Some(&*user)),
        (mesh.token_address("a"), None),
    ];
    for (at, dir) in doors {
        let tcp = TcpStream::connect(at).await.unwrap();
        let name = SERVER_NAME.try_into().unwrap();
        let connector = TlsConnector::from(tls(&mesh, dir));
        let mut silent = connector.connect(name, tcp).await.unwrap();
        let read = timeout(LIMIT, silent.read(&mut [0; 1])).await;
        let read = read.expect("the lead ends the connection");
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    }
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_area_of_the_door_opens_for_its_role_only() {
    let mesh = TestMesh::start(&["a"]).await;
    mesh.leader().await;
    let holders = [
        ("user", "weft://demo/user/uma"),
        ("agent", "weft://demo/agent/edge"),
        ("node", "weft://demo/node/edge/n1"),
        ("lead", "weft://demo/lead/z"),
    ];
    let areas = [
        ("GET /v1/status", "user"),
        ("POST /weft.agent.v1.LeadDoor/Follow", "agent"),
        ("POST /raft/v1/vote", "lead"),
        ("GET /metrics", "nobody"),
    ];
    let at = mesh.address("a");
    for (role, identity) in holders {
        let dir = Forged::of(&[identity]).issue(&mesh, &format!("as-{role}"));
        for (ask, opens_for) in areas {
            let (status, answer) = knock(at, tls(&mesh, Some(&dir)), ask).await.unwrap();
            if role == opens_for {
                assert_ne!(status, 403, "{role}: {ask}: {answer}");
                continue;
            }
            assert_eq!(status, 403, "{role}: {ask}: {answer}");
            let (_, path) = ask.split_once(' ').unwrap();
            Log::says(&["refused", identity, path]).await;
        }
    }
    // A lead that is no member of the group may not change what the group holds.
    let dir = mesh.path().join("as-lead");
    let (status, answer) = knock(at, tls(&mesh, Some(&dir)), "POST /raft/v1/ask")
        .await
        .unwrap();
    assert_eq!(status, 403, "{answer}");
    Log::says(&["no member of the group", "weft://demo/lead/z"]).await;
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_does_what_their_access_allows_and_nothing_else() {
    let mesh = TestMesh::start(&["a"]).await;
    mesh.leader().await;
    let move_web = r#"{"slot":"shop/one/web#0","to":"edge"}"#;
    let of_bank = goal("two").replace("namespace: shop", "namespace: bank");
    let both = format!("{}\n---\n{of_bank}", goal("one"));
    let one = goal("one");
    // Who, what, body: whether it is refused.
    let cases = [
        ("viewer", "GET /v1/applications", "", false),
        ("viewer", "POST /v1/applications", &one, true),
        ("viewer", "POST /v1/applications?dry_run=true", &one, true),
        ("viewer", "DELETE /v1/applications/shop/one", "", true),
        ("viewer", "POST /v1/migrations", move_web, true),
        ("viewer", "GET /v1/backup", "", true),
        ("deployer", "POST /v1/applications", &one, false),
        ("deployer", "POST /v1/applications", &of_bank, true),
        ("deployer", "POST /v1/applications", &both, true),
        ("deployer", "POST /v1/migrations", move_web, false),
        (
            "deployer",
            "POST /v1/migrations",
            r#"{"slot":"bank/two/web#0","to":"edge"}"#,
            true,
        ),
        ("deployer", "DELETE /v1/applications/bank/two", "", true),
        ("deployer", "GET /v1/explain/bank/two/web", "", false),
        ("deployer", "DELETE /v1/applications/shop/one", "", false),
        ("deployer", "POST /v1/restore", "", true),
        ("deployer", "POST /v1/leads/drain", "", true),
        ("user", "POST /v1/applications", &of_bank, false),
        ("user", "GET /v1/backup", "", false),
    ];
    for (who, ask, body, is_refused) in cases {
        let (method, path) = ask.split_once(' ').unwrap();
        let (status, text) = mesh.ask_with(who, "a", (method, path), body).await;
        let refused = status == StatusCode::FORBIDDEN;
        assert_eq!(refused, is_refused, "{who}: {ask}: {status} {text}");
    }
    Log::says(&["refused", "deployer (deployer/shop)", "bank"]).await;
    mesh.end().await;
}
