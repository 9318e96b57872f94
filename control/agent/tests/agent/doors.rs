//! Knocking at the node door with every certificate that should not open it.

use std::{
    io,
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use control_api::stream::{Assignments, ToAgent};
use netmanager_api::identity::SERVER_NAME;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

use crate::{
    Running,
    authority::Authority,
    fake::{FakeDriver, FakeLead, FakeNode, hello, soon},
    log::Log,
};

/// TLS with the certificate in `dir`, or with none; it does not look at who answers.
fn tls(authority: &Authority, dir: Option<&Path>) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    let root = CertificateDer::from_pem_slice(authority.root().as_bytes()).unwrap();
    roots.add(root).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match dir {
        None => config.with_no_client_auth(),
        Some(dir) => {
            let certificate = CertificateDer::from_pem_file(dir.join("tls.crt")).unwrap();
            let key = PrivateKeyDer::from_pem_file(dir.join("tls.key")).unwrap();
            let config = config.with_client_auth_cert(vec![certificate], key);
            config.unwrap()
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

/// Leads that do not answer.
fn nobody() -> Vec<SocketAddr> {
    vec!["127.0.0.1:1".parse().unwrap()]
}

/// Whether the door says anything to this certificate.
async fn knock(at: SocketAddr, tls: Arc<ClientConfig>) -> io::Result<()> {
    let exchange = async {
        let tcp = TcpStream::connect(at).await?;
        let name = SERVER_NAME.try_into().unwrap();
        let mut stream = TlsConnector::from(tls).connect(name, tcp).await?;
        // HTTP/2's preface (RFC 9113, section 3.4) with empty settings.
        stream
            .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            .await?;
        stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await?;
        stream.read_u8().await.map(drop)
    };
    soon("the door", exchange).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_shows_no_good_certificate_does_not_get_past_tls() {
    let authority = Authority::new();
    let agent = Running::start(&authority, nobody(), None, FakeDriver::new()).await;
    let day = Duration::from_secs(86_400);
    let foreign = Authority::new();
    let node = "node/edge/n1";
    let good = authority.forge(node, "good", |_| {});
    knock(agent.door, tls(&authority, Some(&good)))
        .await
        .unwrap();
    let expired = authority.forge(node, "expired", |params| {
        params.not_before = (SystemTime::now() - day * 3).into();
        params.not_after = (SystemTime::now() - day).into();
    });
    let other_mesh = authority.forge(node, "other-mesh", |params| {
        params.subject_alt_names.pop();
        let name = "weft://other/node/edge/n1".try_into().unwrap();
        params.subject_alt_names.push(rcgen::SanType::URI(name));
    });
    let nobody = authority.forge(node, "nobody", |params| {
        params.subject_alt_names.pop();
    });
    let cases = [
        (foreign.forge(node, "foreign", |_| {}), "BadSignature"),
        (expired, "expired"),
        (other_mesh, "is of mesh"),
        (nobody, "names 0 identities"),
    ];
    for (dir, why) in cases {
        let answer = knock(agent.door, tls(&authority, Some(&dir))).await;
        assert!(answer.is_err(), "{}", dir.display());
        Log::says(&["refused a certificate", why]).await;
    }
    let answer = knock(agent.door, tls(&authority, None)).await;
    assert!(answer.is_err(), "without a certificate");
    Log::says(&["refused at the TLS handshake", "no certificates"]).await;
    agent.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_nodes_of_this_cluster_come_in_and_speak_for_themselves() {
    let authority = Authority::new();
    let agent = Running::start(&authority, nobody(), None, FakeDriver::new()).await;
    for (who, named, refusal) in [
        ("user/ann", "n1", "weft://m/user/ann may not come in"),
        ("agent/edge", "n1", "weft://m/agent/edge may not come in"),
        ("lead/a", "n1", "weft://m/lead/a may not come in"),
        ("node/fog/n1", "n1", "weft://m/node/fog/n1 may not come in"),
        (
            "node/edge/n3",
            "n3",
            "weft://m/node/edge/n3 is no node of this agent's configuration",
        ),
        ("node/edge/n1", "n2", "the hello says node \"n2\""),
    ] {
        let dialed = FakeNode::dial(agent.door, &authority.issue(who), hello(named)).await;
        let status = dialed.err().expect(who);
        assert_eq!(status.code(), tonic::Code::PermissionDenied, "{who}");
        assert!(status.message().contains(refusal), "{who}: {status}");
        let logged = if who == "node/edge/n1" {
            "the hello says"
        } else {
            who
        };
        Log::says(&["refused", logged]).await;
    }
    let good = authority.issue("node/edge/n1");
    assert!(FakeNode::dial(agent.door, &good, hello("n1")).await.is_ok());
    agent.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_the_leads_revoked_is_cut_off_also_after_a_restart_without_leads() {
    let authority = Authority::new();
    let mut lead = FakeLead::start(&authority.issue("lead/a")).await;
    let (leads, state) = (vec![lead.address], Some(authority.state()));
    let driver = FakeDriver::new();
    let agent = Running::start(&authority, leads, state.clone(), driver.clone()).await;
    let stream = lead.stream().await;
    stream.welcome(1, Duration::from_secs(60)).await;
    let credentials = authority.issue("node/edge/n1");
    let mut node = FakeNode::dial(agent.door, &credentials, hello("n1"))
        .await
        .unwrap();
    let mut assignments = Assignments {
        revision: (0, 1),
        ..Assignments::default()
    };
    let holders = &mut assignments.revoked.holders;
    holders.insert("weft://m/node/edge/n1".to_owned(), u64::MAX);
    stream.say(ToAgent::Assignments(assignments)).await;
    soon("the node to be cut off", async {
        while node.table().await.is_some() {}
    })
    .await;
    Log::says(&["a connection ends", "weft://m/node/edge/n1", "revoked"]).await;
    let refused = FakeNode::dial(agent.door, &credentials, hello("n1")).await;
    assert!(refused.is_err());
    Log::says(&["refused a certificate", "weft://m/node/edge/n1", "Revoked"]).await;
    let other = authority.issue("node/edge/n2");
    assert!(
        FakeNode::dial(agent.door, &other, hello("n2"))
            .await
            .is_ok()
    );
    agent.end().await;
    lead.die(stream).await;
    let agent = Running::start(&authority, nobody(), state, driver).await;
    let refused = FakeNode::dial(agent.door, &credentials, hello("n1")).await;
    assert!(refused.is_err(), "after a restart");
    agent.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lead_that_is_revoked_is_followed_no_more() {
    let authority = Authority::new();
    let mut lead = FakeLead::start(&authority.issue("lead/stolen")).await;
    let leads = vec![lead.address];
    let agent = Running::start(&authority, leads, None, FakeDriver::new()).await;
    let stream = lead.stream().await;
    stream.welcome(1, Duration::from_secs(60)).await;
    let mut assignments = Assignments {
        revision: (0, 1),
        ..Assignments::default()
    };
    let holders = &mut assignments.revoked.holders;
    holders.insert("weft://m/lead/stolen".to_owned(), u64::MAX);
    stream.say(ToAgent::Assignments(assignments)).await;
    Log::says(&["a connection ends", "weft://m/lead/stolen", "revoked"]).await;
    agent.end().await;
}
