//! Clusters that join by a token, over real TLS: who gets in, and how far.

use std::{fs, sync::Arc};

use control_api::{
    http::{AuditEntry, Changed, InvitationRequest, List, Status},
    join::{ALPN, Certificate, JoinDoorClient, JoinRequest, Joined, RenewDoorClient, RenewRequest},
};
use control_core::command::LEVEL;
use http::StatusCode;
use netmanager_api::identity::{
    Credentials, Role, client_by_fingerprints, files::Files, fingerprint, fingerprints_of_file,
};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use rustls::ClientConfig;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::{Code, transport::Channel};
use weft_lead::{
    authority::{self, rotation},
    dial::dial_by,
};

use crate::{
    agents::TestAgent,
    doors::{knock, tls_of_chain},
    log::Log,
    mesh::{LIMIT, TestMesh, request_by, wait_for},
};

/// Leads that know joins, of which `signing` sign.
async fn start(leads: &[&str], signing: &[&str]) -> TestMesh {
    let mesh = TestMesh::start(leads).await;
    mesh.leader().await;
    for lead in leads {
        wait_for("the feature level", LIMIT, async || {
            let (_, status): (_, Status) = mesh.get(lead, "/v1/status").await;
            status.level >= LEVEL
        })
        .await;
    }
    for lead in signing {
        let out = mesh.path().join(format!("lead-{lead}"));
        authority::delegate(&mesh.path().join("ca"), lead, &out).unwrap();
    }
    mesh
}

/// A key and the request for it.
fn new_key() -> (String, String) {
    let key = KeyPair::generate().unwrap();
    let request = CertificateParams::default().serialize_request(&key);
    (key.serialize_pem(), request.unwrap().pem().unwrap())
}

fn secret(digit: char) -> String {
    digit.to_string().repeat(64)
}

async fn invite(mesh: &TestMesh, lead: &str, cluster: &str, digit: char) -> (StatusCode, String) {
    let wish = InvitationRequest {
        hash: fingerprint(secret(digit).as_bytes()),
        minutes: 15,
    };
    let body = serde_json::to_string(&wish).unwrap();
    let path = format!("/v1/clusters/{cluster}/invitation");
    mesh.ask(lead, "POST", &path, &body).await
}

fn pins(mesh: &TestMesh) -> Vec<String> {
    fingerprints_of_file(&mesh.path().join("ca/ca.crt")).unwrap()
}

/// TLS of who knows these authorities only.
fn tls(pins: Vec<String>) -> Arc<ClientConfig> {
    let is_lead = |role: &Role| matches!(role, Role::Lead { .. });
    client_by_fingerprints(pins.into_iter().collect(), &[ALPN], is_lead).unwrap()
}

fn door(mesh: &TestMesh, lead: &str) -> Channel {
    dial_by(tls(pins(mesh)), mesh.address(lead))
}

/// Asks as a client does; again for as long as the leads are busy.
async fn join(
    mesh: &TestMesh,
    lead: &str,
    (cluster, digit): (&str, char),
    request: &str,
) -> Result<Joined, (Code, String)> {
    let ask = JoinRequest {
        cluster: cluster.to_owned(),
        secret: secret(digit),
        request: request.to_owned(),
    };
    let mut answer = None;
    wait_for("an answer", LIMIT, async || {
        let joined = JoinDoorClient::new(door(mesh, lead))
            .join(ask.clone())
            .await;
        let passes = matches!(&joined, Err(status) if status.code() == Code::Unavailable);
        answer = Some(joined);
        !passes
    })
    .await;
    let answer = answer.unwrap().map(tonic::Response::into_inner);
    answer.map_err(|status| (status.code(), status.message().to_owned()))
}

/// The files of who joined; the folder's name.
fn keep(mesh: &TestMesh, chain: &str, key: &str, out: &str) -> Files {
    let files = Files {
        chain: chain.into(),
        key: key.into(),
        authorities: fs::read(mesh.path().join("ca/ca.crt")).unwrap(),
    };
    files.create(&mesh.path().join(out)).unwrap();
    files
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_joins_by_a_token_at_any_lead_that_signs_and_another_does_not() {
    let mesh = start(&["a", "b", "c"], &["a", "b"]).await;
    let (status, text) = invite(&mesh, "c", "dune", '1').await;
    assert_eq!(status, StatusCode::OK, "{text}");
    let (key, request) = new_key();
    let (code, why) = join(&mesh, "c", ("dune", '1'), &request).await.unwrap_err();
    assert_eq!(code, Code::Unimplemented, "{why}");
    assert!(why.contains("--role lead --name c --issuer"), "{why}");
    // Two at once, at two leads: one wins.
    let (_, other) = new_key();
    let (first, second) = tokio::join!(
        join(&mesh, "a", ("dune", '1'), &request),
        join(&mesh, "b", ("dune", '1'), &other)
    );
    let (won, (code, why), key) = match (first, second) {
        (Ok(won), Err(lost)) => (won, lost, Some(key)),
        (Err(lost), Ok(won)) => (won, lost, None),
        both => panic!("{both:?}"),
    };
    assert_eq!(code, Code::PermissionDenied, "{why}");
    assert!(why.contains("somebody else"), "{why}");
    // Who won is told the same again, also elsewhere.
    let request = key.as_ref().map_or(&other, |_| &request);
    for lead in ["a", "b"] {
        let again = join(&mesh, lead, ("dune", '1'), request).await.unwrap();
        assert_eq!(again, won, "{lead}");
    }
    let (_, log): (_, List<AuditEntry>) = mesh.get("a", "/v1/audit").await;
    let said: Vec<_> = log.items.iter().map(|it| (&*it.by, &*it.what)).collect();
    assert_eq!(
        said,
        [
            ("cluster:dune", "issue a certificate to cluster dune"),
            ("user", "invite cluster dune to join"),
        ]
    );
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_joined_is_that_cluster_s_agent_and_is_renewed_until_it_is_revoked() {
    let mesh = start(&["a"], &["a"]).await;
    invite(&mesh, "a", "dune", '1').await;
    let (key, request) = new_key();
    let joined = join(&mesh, "a", ("dune", '1'), &request).await.unwrap();
    let files = keep(&mesh, &joined.chain, &key, "agent-dune");
    let identity = files.check().unwrap().identity;
    assert_eq!(identity.to_string(), "weft://demo/agent/dune");
    let (mut agent, _) = TestAgent::follow(&mesh, "a", "dune", None).await.unwrap();
    let ends = async || {
        let (_, list): (_, List<control_api::http::Cluster>) = mesh.get("a", "/v1/clusters").await;
        list.items[0].certificate_ends_ms
    };
    let own = files.check().unwrap().expires_ms;
    wait_for("its end to be known", LIMIT, async || {
        ends().await == Some(own)
    })
    .await;
    // Who is connected is nobody else's.
    let (status, text) = invite(&mesh, "a", "dune", '2').await;
    assert_eq!(status, StatusCode::CONFLICT, "{text}");
    assert!(text.contains("its agent is connected"), "{text}");

    let renew = async |who: &str| -> Result<Certificate, tonic::Status> {
        let (_, request) = new_key();
        let mut door = RenewDoorClient::new(mesh.channel(who, "a"));
        let answer = door.renew(RenewRequest { request }).await;
        answer.map(tonic::Response::into_inner)
    };
    let renewed = renew("agent-dune").await.unwrap();
    assert_ne!(renewed.chain, joined.chain);
    let early = renew("agent-dune").await.unwrap_err();
    assert_eq!(early.code(), Code::ResourceExhausted, "{early}");
    // Only agents come so far.
    let user = renew("user").await.unwrap_err();
    assert!(user.code() != Code::Ok && !user.message().contains("CERTIFICATE"));

    let body = r#"{"holder":"weft://demo/agent/dune"}"#;
    let (_, changed): (_, Changed) = mesh.post("a", "/v1/revocations", body).await;
    assert!(changed.changed);
    wait_for("its stream to end", LIMIT, async || agent.has_ended().await).await;
    let refused = renew("agent-dune").await;
    assert!(refused.is_err(), "{refused:?}");
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_no_certificate_gets_no_further_than_joining() {
    let mesh = start(&["a"], &["a"]).await;
    let (_, request) = new_key();
    let (code, unknown) = join(&mesh, "a", ("dune", '1'), &request).await.unwrap_err();
    assert_eq!(code, Code::PermissionDenied, "{unknown}");
    assert!(
        unknown.contains("weft cluster join-string dune"),
        "{unknown}"
    );
    Log::says(&["refused to let a cluster join", "dune", "the token is none"]).await;
    invite(&mesh, "a", "dune", '1').await;
    let wrong = join(&mesh, "a", ("dune", '2'), &request).await.unwrap_err();
    assert_eq!(
        wrong,
        (code, unknown),
        "it is not told whether there is one"
    );
    let (code, why) = join(&mesh, "a", ("dune", '1'), "none").await.unwrap_err();
    assert_eq!(code, Code::InvalidArgument, "{why}");
    // A withdrawn one.
    let path = "/v1/clusters/dune/invitation";
    let (status, _) = mesh.ask("a", "DELETE", path, "").await;
    assert_eq!(status, StatusCode::OK);
    let (code, _) = join(&mesh, "a", ("dune", '1'), &request).await.unwrap_err();
    assert_eq!(code, Code::PermissionDenied);

    for (method, path) in [
        ("GET", "/v1/status"),
        ("GET", "/openapi.json"),
        ("POST", "/v1/clusters/dune/invitation"),
        ("POST", "/raft/v1/vote"),
        ("POST", "/weft.agent.v1.LeadDoor/Follow"),
        ("POST", "/weft.agent.v1.RenewDoor/Renew"),
    ] {
        let status = request_by(door(&mesh, "a"), method, path).await.unwrap();
        assert_eq!(status, 404, "{method} {path}");
    }
    // Who asks for both doors gets to the one that wants a certificate, and where it is not told whom it meets to none.
    let both = {
        let mut tls = (*tls(pins(&mesh))).clone();
        tls.alpn_protocols = vec![ALPN.to_vec(), b"h2".to_vec()];
        dial_by(Arc::new(tls), mesh.address("a"))
    };
    assert!(request_by(both, "GET", "/v1/status").await.is_err());
    let foreign = dial_by(tls(vec!["0".repeat(64)]), mesh.address("a"));
    let error = request_by(foreign, "GET", "/v1/status").await.unwrap_err();
    let causes = std::iter::successors(Some(&*error as &dyn std::error::Error), |it| it.source());
    let causes: Vec<_> = causes.map(ToString::to_string).collect();
    assert!(
        causes.iter().any(|it| it.contains("expected authority")),
        "{causes:?}"
    );
    // The other doors of that port still open for who may.
    let (status, _) = mesh.ask("a", "GET", "/v1/status", "").await;
    assert_eq!(status, StatusCode::OK);
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_would_join_finds_few_places_and_the_other_doors_have_theirs() {
    let mesh = start(&["a"], &["a"]).await;
    let connect = async || {
        let tcp = TcpStream::connect(mesh.address("a")).await.unwrap();
        let name = netmanager_api::identity::SERVER_NAME.try_into().unwrap();
        let connector = TlsConnector::from(tls(pins(&mesh)));
        connector.connect(name, tcp).await
    };
    // Who says nothing is let go after a while: there are always some that have just come.
    let mut held = Vec::new();
    while !Log::has(&["too many join at once"]) {
        assert!(held.len() < 10_000, "the door has no end");
        held.push(connect().await);
    }
    let (status, _) = mesh.ask("a", "GET", "/v1/status", "").await;
    assert_eq!(status, StatusCode::OK);
    drop(held);
    wait_for("a place", LIMIT, async || {
        let channel = door(&mesh, "a");
        request_by(channel, "GET", "/v1/status").await.ok() == Some(404)
    })
    .await;
    mesh.end().await;
}

/// A lead's key is stolen, with what it signs with.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_stole_what_a_lead_signs_with_makes_no_admin_and_no_lead() {
    let mesh = start(&["a"], &["a"]).await;
    let stolen = mesh.path().join("lead-a");
    let read = |name: &str| fs::read_to_string(stolen.join(name)).unwrap();
    let forge = |identity: &str| {
        let signer = KeyPair::from_pem(&read("issuer.key")).unwrap();
        let issuer = Issuer::from_ca_cert_pem(&read("issuer.crt"), signer).unwrap();
        let name = netmanager_api::identity::SERVER_NAME.to_owned();
        let mut params = CertificateParams::new(vec![name]).unwrap();
        let uri = SanType::URI(identity.try_into().unwrap());
        params.subject_alt_names.push(uri);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        // It would rather sign on.
        params.is_ca = match identity.contains("/lead/z") {
            true => IsCa::Ca(BasicConstraints::Unconstrained),
            false => IsCa::NoCa,
        };
        let key = KeyPair::generate().unwrap();
        let own = params.signed_by(&key, &issuer).unwrap().pem();
        (format!("{own}{}", read("issuer.crt")), key.serialize_pem())
    };
    let at = mesh.address("a");
    for (identity, ask) in [
        ("weft://demo/user/eve", "GET /v1/backup"),
        ("weft://demo/user/eve/viewer", "GET /v1/status"),
        ("weft://demo/lead/a", "POST /raft/v1/vote"),
        ("weft://demo/lead/z", "POST /raft/v1/ask"),
    ] {
        let (chain, key) = forge(identity);
        let answer = knock(at, tls_of_chain(&mesh, &chain, &key), ask).await;
        assert!(answer.is_err(), "{identity}: {answer:?}");
        Log::says(&["refused a certificate", identity]).await;
    }
    // An agent's opens that door, until the lead's are revoked: with one file, because the lead is a member.
    let (chain, key) = forge("weft://demo/agent/dune");
    let tls = tls_of_chain(&mesh, &chain, &key);
    let (status, _) = knock(at, tls.clone(), "GET /v1/status").await.unwrap();
    assert_eq!(status, 403);
    let shown = netmanager_api::identity::Shown::of_file(&stolen.join("issuer.crt")).unwrap();
    let body = format!(
        r#"{{"holder":"{}","certificate":"{}"}}"#,
        shown.identity, shown.fingerprint
    );
    let (status, text) = mesh.ask("a", "POST", "/v1/revocations", &body).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    wait_for("what it signed to be revoked", LIMIT, async || {
        knock(at, tls.clone(), "GET /v1/status").await.is_err()
    })
    .await;
    // It signs nothing more that counts, and says so; renewed it does.
    invite(&mesh, "a", "dune", '1').await;
    let (_, request) = new_key();
    let (code, why) = join(&mesh, "a", ("dune", '1'), &request).await.unwrap_err();
    assert_eq!(code, Code::Unimplemented, "{why}");
    assert!(why.contains("weft renew"), "{why}");
    rotation::renew(&mesh.path().join("ca"), &stolen).unwrap();
    join(&mesh, "a", ("dune", '1'), &request).await.unwrap();
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_joined_stays_while_the_authority_is_replaced() {
    let mesh = start(&["a"], &["a"]).await;
    let (ca, lead) = (mesh.path().join("ca"), mesh.path().join("lead-a"));
    invite(&mesh, "a", "dune", '1').await;
    let (key, request) = new_key();
    let joined = join(&mesh, "a", ("dune", '1'), &request).await.unwrap();
    keep(&mesh, &joined.chain, &key, "agent-dune");
    let own = || Credentials::load(&mesh.path().join("agent-dune")).unwrap();
    assert!(own().is_of_who_signs());
    let opens = async |who: &str| {
        let channel = mesh.channel(who, "a");
        request_by(channel, "POST", "/weft.agent.v1.LeadDoor/Follow")
            .await
            .is_ok()
    };
    rotation::prepare(&ca).unwrap();
    let trust = |dir: &str| {
        fs::copy(ca.join("ca.crt"), mesh.path().join(dir).join("ca.crt")).unwrap();
    };
    trust("lead-a");
    trust("agent-dune");
    rotation::switch(&ca).unwrap();
    trust("agent-dune");
    // The new authority signs, and the lead by the old one: both count.
    assert!(!own().is_of_who_signs());
    assert!(opens("agent-dune").await);
    rotation::renew(&ca, &lead).unwrap();
    let renewed = wait_for_renewal(&mesh, "agent-dune").await;
    own()
        .replace(renewed.1.chain.into(), renewed.0.into())
        .unwrap();
    assert!(own().is_of_who_signs());
    // What the old one vouched for counts no more once it is retired.
    keep(&mesh, &joined.chain, &key, "agent-old");
    rotation::retire(&ca).unwrap();
    trust("lead-a");
    wait_for("the old one to be refused", LIMIT, async || {
        !opens("agent-old").await
    })
    .await;
    assert!(opens("agent-dune").await);
    mesh.end().await;
}

/// Asks until what is signed is of the authority that signs now: the lead takes its new files within seconds.
async fn wait_for_renewal(mesh: &TestMesh, who: &str) -> (String, Certificate) {
    let mut renewed = None;
    // A cluster is known with its first stream.
    let _agent = TestAgent::follow(mesh, "a", "dune", None).await.unwrap();
    wait_for("a certificate of the new authority", LIMIT, async || {
        let (key, request) = new_key();
        let mut door = RenewDoorClient::new(mesh.channel(who, "a"));
        match door.renew(RenewRequest { request }).await {
            Ok(answer) => {
                renewed = Some((key, answer.into_inner()));
                true
            }
            Err(status) => {
                println!("{status}");
                false
            }
        }
    })
    .await;
    renewed.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_left_is_shut_out_and_may_join_again() {
    let mesh = start(&["a"], &["a"]).await;
    let enter = async |digit: char| {
        let (status, text) = invite(&mesh, "a", "dune", digit).await;
        assert_eq!(status, StatusCode::OK, "{text}");
        let (key, request) = new_key();
        let joined = join(&mesh, "a", ("dune", digit), &request).await.unwrap();
        // The folder of its agent is another machine's.
        let _ = fs::remove_dir_all(mesh.path().join("agent-dune"));
        keep(&mesh, &joined.chain, &key, "agent-dune");
        let (agent, _) = TestAgent::follow(&mesh, "a", "dune", None).await.unwrap();
        agent
    };
    let clusters = async || {
        let (_, list): (_, List<control_api::http::Cluster>) = mesh.get("a", "/v1/clusters").await;
        list.items
    };
    let change = async |method: &str, rest: &str| {
        let path = format!("/v1/clusters/dune{rest}");
        let (status, text) = mesh.ask("a", method, &path, "").await;
        assert_eq!(status, StatusCode::OK, "{text}");
        serde_json::from_str::<Changed>(&text).unwrap().changed
    };
    let mut agent = enter('1').await;
    assert!(change("POST", "/leave").await);
    assert!(!change("POST", "/leave").await, "it goes on where it was");
    let leaving = clusters().await.remove(0);
    assert!(leaving.leaving_since_ms.is_some() && leaving.drained_since_ms.is_some());
    assert!(change("DELETE", "/drain").await, "it stays after all");
    assert_eq!(clusters().await[0].leaving_since_ms, None);
    assert!(change("POST", "/leave").await);

    let body = r#"{"holder":"weft://demo/agent/dune"}"#;
    let (_, changed): (_, Changed) = mesh.post("a", "/v1/revocations", body).await;
    assert!(changed.changed);
    wait_for("its stream to end", LIMIT, async || agent.has_ended().await).await;
    assert!(TestAgent::follow(&mesh, "a", "dune", None).await.is_err());
    wait_for("it to be lost", LIMIT, async || {
        clusters().await[0].state == "lost"
    })
    .await;
    assert!(change("DELETE", "").await);
    assert!(clusters().await.is_empty());
    let (status, _) = mesh.ask("a", "POST", "/v1/clusters/dune/leave", "").await;
    assert_eq!(status, StatusCode::NOT_FOUND);

    let _agent = enter('2').await;
    let back = clusters().await.remove(0);
    assert_eq!((back.name.as_str(), back.leaving_since_ms), ("dune", None));
    mesh.end().await;
}
