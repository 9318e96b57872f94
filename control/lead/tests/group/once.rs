//! Changes with idempotency keys.

use std::time::Duration;

use control_api::http::{Application, ApplyResponse, ApplyResult, List, Problem, Status};
use http::StatusCode;

use crate::{
    goal,
    mesh::{LIMIT, TestMesh, wait_for},
    names,
    stopwatch::Stopwatch,
};

const APPLY: (&str, &str) = ("POST", "/v1/applications");
const DELETE: (&str, &str) = ("DELETE", "/v1/applications/shop/one");

async fn level(mesh: &TestMesh, lead: &str) -> u32 {
    mesh.get::<Status>(lead, "/v1/status").await.1.level
}

async fn leveled(mesh: &TestMesh, lead: &str) {
    wait_for("the feature level", LIMIT, async || {
        level(mesh, lead).await >= 1
    })
    .await;
}

async fn generation(mesh: &TestMesh, lead: &str) -> u64 {
    let (_, list): (_, List<Application>) = mesh.get(lead, "/v1/applications").await;
    list.items[0].generation
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_key_answers_the_same_on_every_lead_and_after_a_restart() {
    let mut mesh = TestMesh::start(&["a", "b", "c"]).await;
    let leader = mesh.leader().await;
    let [x, y] = mesh.others(&leader);
    leveled(&mesh, &x).await;
    let apply = async |mesh: &TestMesh, lead: &str, body: &str| {
        let (status, text) = mesh.ask_once(lead, APPLY, body, "first").await;
        (status, text)
    };
    let result = |text: &str| {
        let answer: ApplyResponse = serde_json::from_str(text).unwrap();
        answer.applications[0].result
    };
    let (status, text) = apply(&mesh, &x, &goal("one")).await;
    assert_eq!(
        (status, result(&text)),
        (StatusCode::OK, ApplyResult::Created)
    );
    let other = goal("one").replace("100m", "200m");
    let (status, _): (_, ApplyResponse) = mesh.post(&y, "/v1/applications", &other).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(generation(&mesh, &x).await, 2);

    // Asked again, it neither undoes the second change nor says that it did something else.
    for lead in [&x, &y, &leader] {
        let (status, text) = apply(&mesh, lead, &goal("one")).await;
        assert_eq!(
            (status, result(&text)),
            (StatusCode::OK, ApplyResult::Created)
        );
    }
    assert_eq!(generation(&mesh, &x).await, 2);
    let (status, text) = apply(&mesh, &x, &other).await;
    let problem: Problem = serde_json::from_str(&text).unwrap();
    assert_eq!(status, StatusCode::CONFLICT, "{text}");
    assert!(
        problem
            .error
            .contains("user/first was used for another request"),
        "{text}"
    );

    // What was refused stays refused, what was deleted stays deleted.
    let (status, _) = mesh.ask_once(&x, DELETE, "", "gone").await;
    assert_eq!(status, StatusCode::OK);
    let (status, _) = mesh.ask("a", DELETE.0, DELETE.1, "").await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    for name in ["a", "b", "c"] {
        mesh.stop(name).await;
        mesh.start_lead(name).await;
    }
    mesh.leader().await;
    let (status, text) = mesh.ask_once(&y, DELETE, "", "gone").await;
    assert_eq!(status, StatusCode::OK, "{text}");
    assert!(names(&mesh, &y).await.is_empty());
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_commands_wait_until_every_lead_says_that_it_knows_them() {
    let mut mesh = TestMesh::start_some(&["a", "b", "c"], &["a", "b"]).await;
    mesh.leader().await;
    // The leader looks every lease: by then both have said their level, and the third has not.
    let since = Stopwatch::start();
    while since.had() < Duration::from_secs(2) {
        let (status, _): (_, ApplyResponse) = mesh.post("a", APPLY.1, &goal("one")).await;
        assert_eq!((status, level(&mesh, "a").await), (StatusCode::OK, 0));
    }
    wait_for("the refusal", LIMIT, async || {
        let (status, text) = mesh.ask_now("b", APPLY, &goal("two"), Some("k")).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{text}");
        text.contains("feature level 1")
    })
    .await;

    mesh.start_lead("c").await;
    leveled(&mesh, "c").await;
    let (status, text) = mesh.ask_once("b", APPLY, &goal("two"), "k").await;
    assert_eq!(status, StatusCode::OK, "{text}");
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_has_bounds() {
    let mesh = TestMesh::start(&["a"]).await;
    mesh.leader().await;
    let long = "k".repeat(65);
    let (status, text) = mesh.ask_once("a", APPLY, &goal("one"), &long).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{text}");
    assert!(text.contains("idempotency-key"), "{text}");
    assert!(names(&mesh, "a").await.is_empty());
    mesh.end().await;
}
