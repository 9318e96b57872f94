//! Revocations, tokens and the audit log, over real TLS.

use std::collections::BTreeMap;

use control_api::http::{AuditEntry, Changed, List, Revocation, Status, Token};
use http::StatusCode;
use netmanager_api::identity::{
    Access, Credentials, Revoked, Role, Shown, client_without_certificate, fingerprint,
};
use weft_lead::{
    LeadError, authority,
    dial::{dial, dial_by},
};

use crate::{
    agents::TestAgent,
    goal,
    log::Log,
    members::leads,
    mesh::{LIMIT, TestMesh, request_by, wait_for},
};

/// A mesh whose leads know tokens and revocations.
async fn start(leads: &[&str]) -> TestMesh {
    let mesh = TestMesh::start(leads).await;
    mesh.leader().await;
    for lead in leads {
        wait_for("the feature level", LIMIT, async || {
            let (_, status): (_, Status) = mesh.get(lead, "/v1/status").await;
            status.level >= 2
        })
        .await;
    }
    mesh
}

async fn revoke(mesh: &TestMesh, lead: &str, body: &str) {
    let (status, changed): (_, Changed) = mesh.post(lead, "/v1/revocations", body).await;
    assert_eq!((status, changed.changed), (StatusCode::OK, true), "{body}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_certificate_opens_no_lead_s_door_any_more_and_a_new_one_does() {
    let mesh = start(&["a", "b"]).await;
    let asks = async |who: &str, lead: &str| {
        let channel = mesh.channel(who, lead);
        request_by(channel, "GET", "/v1/status").await.ok()
    };
    // One connection that is open all the while.
    let open = mesh.channel("viewer", "b");
    let on_open = async || request_by(open.clone(), "GET", "/v1/status").await.ok();
    assert_eq!(on_open().await, Some(200));
    revoke(&mesh, "a", r#"{"holder":"weft://demo/user/viewer"}"#).await;
    for lead in ["a", "b"] {
        wait_for("the viewer to be refused", LIMIT, async || {
            asks("viewer", lead).await.is_none()
        })
        .await;
    }
    assert_eq!(
        on_open().await,
        None,
        "the connection ended with its certificate"
    );
    // The list is there: what is refused from now on is refused at the handshake. Before, a connection may also have ended
    // behind it.
    assert_eq!(asks("viewer", "b").await, None);
    Log::says(&[
        "refused a certificate",
        "weft://demo/user/viewer",
        "Revoked",
    ])
    .await;
    assert_eq!(asks("deployer", "b").await, Some(200));
    let mut number = 0;
    wait_for(
        "a new certificate of the same name to count",
        LIMIT,
        async || {
            number += 1;
            let role = Role::User {
                name: "viewer".to_owned(),
                access: Access::Viewer,
            };
            let out = format!("viewer-{number}");
            authority::issue(&mesh.path().join("ca"), role, &mesh.path().join(&out)).unwrap();
            asks(&out, "b").await.is_some()
        },
    )
    .await;
    // One certificate by its fingerprint.
    let shown = Shown::of_file(&mesh.path().join("deployer/tls.crt")).unwrap();
    let body = format!(
        r#"{{"holder":"{}","certificate":"{}"}}"#,
        shown.identity, shown.fingerprint
    );
    revoke(&mesh, "b", &body).await;
    wait_for("the deployer to be refused", LIMIT, async || {
        asks("deployer", "a").await.is_none()
    })
    .await;
    let (_, list): (_, List<Revocation>) = mesh.get("a", "/v1/revocations").await;
    assert_eq!(list.items.len(), 2, "{list:?}");
    for (body, part) in [
        (r#"{"holder":"weft://demo/lead/a"}"#, "weft lead remove"),
        (r#"{"holder":"weft://other/user/ann"}"#, "another mesh"),
        (r#"{"holder":"ann"}"#, "is not an identity"),
        (
            r#"{"holder":"weft://demo/user/ann","certificate":"12"}"#,
            "no SHA-256",
        ),
    ] {
        let (status, text) = mesh.ask("a", "POST", "/v1/revocations", body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{body}: {text}");
        assert!(text.contains(part), "{body}: {text}");
    }
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_agent_s_stream_ends_and_agents_learn_of_their_nodes() {
    let mesh = start(&["a"]).await;
    let (mut edge, _) = TestAgent::follow(&mesh, "a", "edge", None).await.unwrap();
    let (mut fog, _) = TestAgent::follow(&mesh, "a", "fog", None).await.unwrap();
    revoke(&mesh, "a", r#"{"holder":"weft://demo/node/edge/n1"}"#).await;
    edge.hear("what is revoked", |agent| {
        let holders = &agent.assignments.revoked.holders;
        holders.contains_key("weft://demo/node/edge/n1")
    })
    .await
    .unwrap();
    revoke(&mesh, "a", r#"{"holder":"weft://demo/agent/fog"}"#).await;
    wait_for("its stream to end", LIMIT, async || fog.has_ended().await).await;
    assert!(TestAgent::follow(&mesh, "a", "fog", None).await.is_err());
    // What is not a cluster's own does not concern it: fog's came before this one.
    revoke(&mesh, "a", r#"{"holder":"weft://demo/node/edge/n2"}"#).await;
    edge.hear("the next of its own", |agent| {
        let holders = &agent.assignments.revoked.holders;
        holders.contains_key("weft://demo/node/edge/n2")
    })
    .await
    .unwrap();
    let heard: Vec<_> = edge.assignments.revoked.holders.keys().collect();
    assert_eq!(
        heard,
        ["weft://demo/node/edge/n1", "weft://demo/node/edge/n2"]
    );
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_opens_the_api_s_own_door_as_far_as_its_access_goes() {
    let mesh = start(&["a"]).await;
    let secret = "5".repeat(64);
    let hash = fingerprint(secret.as_bytes());
    let body = format!(r#"{{"name":"ci","hash":"{hash}","access":"deployer/shop","days":1}}"#);
    let (status, text) = mesh.ask("a", "POST", "/v1/tokens", &body).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    let tls = || {
        let ca = mesh.path().join("ca/ca.crt");
        let is_lead = |role: &Role| matches!(role, Role::Lead { .. });
        client_without_certificate(&ca, &[b"h2"], is_lead).unwrap()
    };
    let by_token = async |token: &str, (method, path): (&str, &str), body: &str| {
        let channel = dial_by(tls(), mesh.token_address("a"));
        let headers = [("authorization", format!("Bearer {token}"))];
        mesh.request_with(channel, (method, path), body, &headers)
            .await
    };
    let good = format!("ci.{secret}");
    let apply = ("POST", "/v1/applications");
    let cases = [
        (&*good, ("GET", "/v1/applications"), String::new(), 200),
        (&*good, apply, goal("one"), 200),
        (
            &*good,
            apply,
            goal("one").replace("namespace: shop", "namespace: bank"),
            403,
        ),
        (&*good, ("GET", "/v1/tokens"), String::new(), 403),
        (&*good, ("POST", "/raft/v1/vote"), String::new(), 404),
        (
            &*good,
            ("POST", "/weft.agent.v1.LeadDoor/Follow"),
            String::new(),
            404,
        ),
        ("ci.wrong", ("GET", "/v1/applications"), String::new(), 401),
        ("cj.wrong", ("GET", "/v1/applications"), String::new(), 401),
        ("", ("GET", "/v1/applications"), String::new(), 401),
    ];
    for (token, ask, body, want) in cases {
        let (status, text) = by_token(token, ask, &body).await;
        assert_eq!(status.as_u16(), want, "{token:?} {ask:?}: {text}");
        assert!(!text.contains(&secret), "{text}");
    }
    Log::says(&["refused", "token=\"ci\"", "does not count"]).await;
    Log::says(&["refused", "no token was shown"]).await;
    // The leads' door does not speak to who shows none but a token.
    let channel = dial_by(tls(), mesh.address("a"));
    assert!(request_by(channel, "GET", "/v1/status").await.is_err());
    // Who did what is known, also of a token; taken back, it opens nothing.
    let (_, list): (_, List<Token>) = mesh.get("a", "/v1/tokens").await;
    assert_eq!(list.items[0].access, "deployer/shop");
    let (_, log): (_, List<AuditEntry>) = mesh.get("a", "/v1/audit").await;
    let said: Vec<_> = log.items.iter().map(|it| (&*it.by, &*it.what)).collect();
    assert_eq!(
        said,
        [
            ("token:ci", "apply shop/one"),
            ("user", "create token ci (deployer/shop)"),
        ]
    );
    assert!(log.items[0].revision[1] > log.items[1].revision[1]);
    let (_, log): (_, List<AuditEntry>) = mesh.get("a", "/v1/audit?limit=1").await;
    assert_eq!(log.items.len(), 1);
    let (status, _) = mesh.ask("a", "DELETE", "/v1/tokens/ci", "").await;
    assert_eq!(status, StatusCode::OK);
    let (status, text) = by_token(&good, ("GET", "/v1/applications"), "").await;
    assert_eq!(status, StatusCode::UNAUTHORIZED, "{text}");
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_ends_with_the_certificate_of_the_lead_that_was_dialled() {
    let mesh = TestMesh::start(&["a"]).await;
    mesh.leader().await;
    let credentials = Credentials::load(&mesh.path().join("viewer")).unwrap();
    let channel = dial(&credentials, mesh.address("a"), |_| true).unwrap();
    let asks = async || {
        let answer = request_by(channel.clone(), "GET", "/v1/status").await;
        answer.ok()
    };
    assert_eq!(asks().await, Some(200));
    let holders = BTreeMap::from([("weft://demo/lead/a".to_owned(), u64::MAX)]);
    credentials.revoked().set(Revoked {
        holders,
        ..Revoked::default()
    });
    assert_eq!(asks().await, None);
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_removal_of_the_lead_that_is_asked_is_in_the_audit_log() {
    let mut mesh = start(&["a", "b", "c"]).await;
    let leader = mesh.leader().await;
    let [asked, other] = mesh.others(&leader);
    let path = format!("/v1/leads/{asked}");
    wait_for("its removal", LIMIT, async || {
        let answer = mesh.ask_now(&asked, ("DELETE", &path), "", None).await;
        println!("{answer:?}");
        // It ends: its answer may get lost.
        let left = leads(&mesh, &other).await;
        let is_gone = left.iter().all(|lead| lead.name != asked);
        assert!(is_gone || answer.0 != StatusCode::OK, "{answer:?}");
        is_gone
    })
    .await;
    let (_, log): (_, List<AuditEntry>) = mesh.get(&other, "/v1/audit").await;
    let mut said: Vec<_> = log.items.iter().map(|it| (&*it.by, &*it.what)).collect();
    // Once for each time that it was asked.
    said.dedup();
    assert_eq!(said, [("user", &*format!("ask to remove lead {asked}"))]);
    let ended = mesh.ended(&asked).await;
    assert!(matches!(ended, Err(LeadError::Removed { .. })), "{ended:?}");
    mesh.end().await;
}
