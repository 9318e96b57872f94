//! Three leads in one process, over real TLS on the loopback.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod agents;
mod backup;
mod clusters;
mod disk;
mod doors;
mod joins;
mod limits;
mod log;
mod members;
mod mesh;
mod once;
mod relay;
mod rotation;
mod security;
mod stopwatch;

use std::time::Duration;

use control_api::http::{Application, ApplyResponse, ApplyResult, List, Problem, Status};
use http::StatusCode;

use crate::{
    mesh::{LIMIT, TestMesh, wait_for},
    stopwatch::{Stopwatch, ensure, undisturbed},
};

/// How long a lead hears nobody: two leases, after one of which it would stand.
const UNHEARD: Duration = Duration::from_millis(1_500);

const GOAL: &str = "
apiVersion: weft.dev/v1alpha1
kind: MeshApplication
metadata: { name: NAME, namespace: shop }
spec:
  services:
    - name: web
      command: [/bin/true]
      ports: [{ name: http, port: 80, targetPort: 8080 }]
      requests: { cpu: 100m, memory: 32Mi }
";

fn goal(name: &str) -> String {
    GOAL.replace("NAME", name)
}

pub(crate) async fn apply(mesh: &TestMesh, lead: &str, name: &str) -> (StatusCode, ApplyResponse) {
    mesh.post(lead, "/v1/applications", &goal(name)).await
}

/// Applies a new application with a key: asked again where an answer was lost, it is still what created it.
async fn create(mesh: &TestMesh, lead: &str, name: &str) {
    let ask = ("POST", "/v1/applications");
    let (status, text) = mesh.ask_once(lead, ask, &goal(name), name).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    let answer: ApplyResponse = serde_json::from_str(&text).unwrap();
    assert_eq!(answer.applications[0].result, ApplyResult::Created);
}

async fn names(mesh: &TestMesh, lead: &str) -> Vec<String> {
    let (status, list): (_, List<Application>) = mesh.get(lead, "/v1/applications").await;
    assert_eq!(status, StatusCode::OK);
    list.items.into_iter().map(|app| app.name).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_when_the_leader_and_then_all_leads_stop() {
    let mut mesh = TestMesh::start(&["a", "b", "c"]).await;
    let leader = mesh.leader().await;
    let [x, y] = mesh.others(&leader);

    create(&mesh, &x, "one").await;
    let (_, answer) = apply(&mesh, &y, "one").await;
    assert_eq!(answer.applications[0].result, ApplyResult::Unchanged);

    mesh.stop(&leader).await;
    create(&mesh, &x, "two").await;
    assert_eq!(names(&mesh, &y).await, ["shop/one", "shop/two"]);

    mesh.stop(&x).await;
    mesh.stop(&y).await;
    for name in ["a", "b", "c"] {
        mesh.start_lead(name).await;
    }
    mesh.leader().await;
    for name in ["a", "b", "c"] {
        assert_eq!(names(&mesh, name).await, ["shop/one", "shop/two"], "{name}");
    }
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_minority_refuses_changes_and_says_that_its_reads_are_stale() {
    let mut mesh = TestMesh::start(&["a", "b", "c"]).await;
    let leader = mesh.leader().await;
    assert_eq!(apply(&mesh, &leader, "one").await.0, StatusCode::OK);
    let [x, y] = mesh.others(&leader);
    mesh.stop(&x).await;
    mesh.stop(&y).await;

    let ask = ("POST", "/v1/applications");
    let (status, text) = mesh.ask_now(&leader, ask, &goal("two"), None).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{text}");
    let problem: Problem = serde_json::from_str(&text).unwrap();
    assert!(problem.error.contains("majority"), "{problem:?}");
    let stale = async || {
        let path = "/v1/applications?consistent=false";
        let (status, list): (_, List<Application>) = mesh.get(&leader, path).await;
        assert_eq!((status, list.stale), (StatusCode::OK, true));
        assert_eq!(list.items.len(), 1);
        list.age_ms.unwrap()
    };
    // It heard its majority last before the change was refused, and grows older.
    let age = stale().await;
    assert!((1_000..60_000).contains(&age), "{age} ms");
    assert!(stale().await >= age);
    let (_, status): (_, Status) = mesh.get(&leader, "/v1/status").await;
    assert!(status.stale);

    mesh.start_lead(&x).await;
    let limit = Duration::from_secs(20);
    wait_for("the change to be taken again", limit, async || {
        apply(&mesh, &leader, "two").await.0 == StatusCode::OK
    })
    .await;
    mesh.end().await;
}

/// Without a canvass it would raise the term again and again, and unseat the leader once it is heard.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lead_that_heard_nobody_comes_back_without_an_election() {
    undisturbed(async || {
        let mesh = TestMesh::start(&["a", "b", "c"]).await;
        let leader = mesh.leader().await;
        let [deaf, other] = mesh.others(&leader);
        let term = async || mesh.get::<Status>(&leader, "/v1/status").await.1.term;
        let before = term().await;

        mesh.hears(&deaf, false);
        let since = Stopwatch::start();
        let mut number = 0;
        while since.had() < UNHEARD {
            number += 1;
            let (status, _) = apply(&mesh, &other, &format!("app{number}")).await;
            assert_eq!(status, StatusCode::OK, "change {number}");
        }
        mesh.hears(&deaf, true);
        wait_for("it to catch up", LIMIT, async || {
            let path = "/v1/applications?consistent=false";
            let (_, list): (_, List<Application>) = mesh.get(&deaf, path).await;
            list.items.len() == number
        })
        .await;
        let now = (mesh.leader().await, term().await);
        mesh.end().await;
        ensure(now == (leader, before), format!("an election: {now:?}"))
    })
    .await;
}

struct Case<'a> {
    ask: &'a str,
    body: &'a str,
    status: u16,
    parts: &'a [&'a str],
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_names_the_field_the_value_and_the_way_out() {
    let mesh = TestMesh::start(&["a"]).await;
    mesh.leader().await;
    let bad_unit = goal("one").replace("100m", "100x");
    let case = |ask, body, status, parts| Case {
        ask,
        body,
        status,
        parts,
    };
    let cases = [
        case(
            "POST /v1/applications",
            &bad_unit,
            400,
            &["100x", "cpu", "\"line\":"],
        ),
        case("POST /v1/applications", "{", 400, &["error"]),
        case(
            "DELETE /v1/applications/shop/none",
            "",
            404,
            &["no application shop/none", "weft get applications"],
        ),
        case(
            "GET /v1/explain/shop/none/web",
            "",
            404,
            &["no service shop/none/web", "hint"],
        ),
        case(
            "POST /v1/migrations",
            r#"{"slot":"web","to":"edge"}"#,
            400,
            &["\"field\":\"slot\"", "\"value\":\"web\""],
        ),
        case(
            "GET /v1/nothing",
            "",
            404,
            &["/v1/nothing", "/openapi.json"],
        ),
        case("GET /v1/nodes?consistent=perhaps", "", 400, &["consistent"]),
    ];
    for case in cases {
        let (method, path) = case.ask.split_once(' ').unwrap();
        let (status, text) = mesh.ask("a", method, path, case.body).await;
        assert_eq!(status.as_u16(), case.status, "{}: {text}", case.ask);
        serde_json::from_str::<Problem>(&text).unwrap();
        for part in case.parts {
            assert!(text.contains(part), "{}: {part:?} in {text}", case.ask);
        }
    }
    let (status, text) = mesh.ask_as("agent", "a", "GET", "/v1/status").await;
    assert_eq!(status, StatusCode::FORBIDDEN, "{text}");
    assert!(text.contains("weft://demo/agent/edge"), "{text}");
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dry_run_changes_nothing() {
    let mesh = TestMesh::start(&["a"]).await;
    mesh.leader().await;
    let path = "/v1/applications?dry_run=true";
    let (status, answer): (_, ApplyResponse) = mesh.post("a", path, &goal("one")).await;
    assert_eq!(status, StatusCode::OK);
    assert!(answer.dry_run);
    assert_eq!(answer.applications[0].result, ApplyResult::Created);
    assert!(names(&mesh, "a").await.is_empty());
    mesh.end().await;
}
