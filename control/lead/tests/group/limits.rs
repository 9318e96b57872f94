//! What one caller may take of a lead's doors.

use std::num::NonZeroU32;

use netmanager_api::identity::{Role, client_without_certificate};
use weft_lead::dial::dial_by;

use crate::mesh::{LIMIT, TestMesh, wait_for};

const STATUS: (&str, &str) = ("GET", "/v1/status");

async fn ask(mesh: &TestMesh, who: &str) -> (u16, String) {
    let (status, text) = mesh.ask_as(who, "a", STATUS.0, STATUS.1).await;
    (status.as_u16(), text)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_too_often_is_told_to_wait_and_nobody_else_is() {
    let mut mesh = TestMesh::start(&["a"]).await;
    mesh.leader().await;
    mesh.stop("a").await;
    mesh.requests_per_second = NonZeroU32::MIN;
    mesh.start_lead("a").await;
    // Faster than one in a second, on whatever machine: until it is too much.
    let refused = async {
        loop {
            let (status, text) = ask(&mesh, "user").await;
            match status {
                200 => {}
                429 => return text,
                other => panic!("{other}: {text}"),
            }
        }
    };
    let refused = tokio::time::timeout(LIMIT, refused).await.unwrap();
    for part in [
        "weft://demo/user/user asks too often",
        "not again before",
        "--requests-per-second",
    ] {
        assert!(refused.contains(part), "{part}: {refused}");
    }
    assert_eq!(ask(&mesh, "viewer").await.0, 200);
    wait_for("it may ask again", LIMIT, async || {
        ask(&mesh, "user").await.0 == 200
    })
    .await;
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_guesses_tokens_is_told_to_wait() {
    let mesh = TestMesh::start(&["a"]).await;
    mesh.leader().await;
    let ca = mesh.path().join("ca/ca.crt");
    let is_lead = |role: &Role| matches!(role, Role::Lead { .. });
    let tls = client_without_certificate(&ca, &[b"h2"], is_lead).unwrap();
    let channel = dial_by(tls, mesh.token_address("a"));
    let guess = async |number: u32| {
        let headers = [("authorization", format!("Bearer ci.{number}"))];
        let answer = mesh.request_with(channel.clone(), STATUS, "", &headers);
        answer.await.0.as_u16()
    };
    assert_eq!(guess(0).await, 401);
    let refused = async {
        let mut number = 0;
        while guess(number).await == 401 {
            number += 1;
        }
        guess(number).await
    };
    assert_eq!(tokio::time::timeout(LIMIT, refused).await.unwrap(), 429);
    mesh.end().await;
}
