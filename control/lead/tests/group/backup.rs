//! Backup, restore, and recovery from the loss of a majority.

use control_api::http::List;
use control_api::http::{Problem, Restored, Service, Status, Vip};
use control_core::command::LEVEL;
use http::StatusCode;

use crate::{
    apply,
    members::{add, leads},
    mesh::{LIMIT, TestMesh, wait_for},
    names,
};

pub(crate) async fn status(mesh: &TestMesh, lead: &str) -> Status {
    mesh.get(lead, "/v1/status").await.1
}

async fn incarnation(mesh: &TestMesh, lead: &str) -> u64 {
    status(mesh, lead).await.mesh.unwrap().incarnation
}

async fn vips(mesh: &TestMesh, lead: &str, service: &str) -> Vec<Vip> {
    let (_, list): (_, List<Service>) = mesh.get(lead, "/v1/services").await;
    let service = list.items.into_iter().find(|it| it.name == service);
    service.unwrap().vips
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_brings_a_deleted_application_back_with_its_addresses() {
    let mesh = TestMesh::start(&["a", "b", "c"]).await;
    let leader = mesh.leader().await;
    let [asked, _] = mesh.others(&leader);
    let level = async || status(&mesh, &asked).await.level >= 1;
    wait_for("the feature level", LIMIT, level).await;
    assert_eq!(apply(&mesh, &asked, "one").await.0, StatusCode::OK);
    assert_eq!(apply(&mesh, &asked, "two").await.0, StatusCode::OK);
    let before = vips(&mesh, &asked, "shop/one/web").await;
    assert!(!before.is_empty());
    let (code, backup) = mesh.ask(&asked, "GET", "/v1/backup", "").await;
    assert_eq!(code, StatusCode::OK, "{backup}");

    let (code, _) = mesh
        .ask(&asked, "DELETE", "/v1/applications/shop/one", "")
        .await;
    assert_eq!(code, StatusCode::OK);
    assert_eq!(apply(&mesh, &asked, "three").await.0, StatusCode::OK);
    let (code, restored): (_, Restored) = mesh.post(&asked, "/v1/restore", &backup).await;
    assert_eq!((code, restored.incarnation), (StatusCode::OK, 1));
    for lead in ["a", "b", "c"] {
        assert_eq!(names(&mesh, lead).await, ["shop/one", "shop/two"], "{lead}");
        assert_eq!(incarnation(&mesh, lead).await, 1);
    }
    assert_eq!(vips(&mesh, &asked, "shop/one/web").await, before);
    let (_, again): (_, Restored) = mesh.post(&leader, "/v1/restore", &backup).await;
    assert_eq!(again.incarnation, 2);

    let (code, problem): (_, Problem) = mesh.post(&asked, "/v1/restore", "{}").await;
    assert_eq!(code, StatusCode::BAD_REQUEST, "{problem:?}");
    assert!(problem.error.contains("not a backup"), "{problem:?}");
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_of_a_later_feature_level_waits_until_every_lead_has_it() {
    let mesh = TestMesh::start(&["a"]).await;
    mesh.leader().await;
    let level = async || status(&mesh, "a").await.level >= LEVEL;
    wait_for("the feature level", LIMIT, level).await;
    let (_, backup) = mesh.ask("a", "GET", "/v1/backup", "").await;
    mesh.end().await;
    // A lead is away: who knows what level it has?
    let behind = TestMesh::start_some(&["a", "b", "c"], &["a", "b"]).await;
    let leader = behind.leader().await;
    let ask = ("POST", "/v1/restore");
    wait_for("the refusal", LIMIT, async || {
        let (code, text) = behind.ask_now(&leader, ask, &backup, None).await;
        assert_eq!(code, StatusCode::SERVICE_UNAVAILABLE, "{text}");
        text.contains(&format!("feature level {LEVEL}"))
    })
    .await;
    assert_eq!(incarnation(&behind, &leader).await, 0);
    behind.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_survivor_of_three_becomes_a_group_and_grows_again() {
    let mut mesh = TestMesh::start(&["a", "b", "c"]).await;
    let leader = mesh.leader().await;
    assert_eq!(apply(&mesh, &leader, "one").await.0, StatusCode::OK);
    let [survivor, lost] = mesh.others(&leader);
    // It has the change for certain: it answered a consistent read.
    assert_eq!(names(&mesh, &survivor).await, ["shop/one"]);
    for name in [&leader, &lost, &survivor] {
        mesh.stop(name).await;
    }
    mesh.lose_disk(&leader);
    mesh.lose_disk(&lost);

    let recovered = mesh.recover(&survivor);
    assert_eq!(
        (recovered.incarnation, recovered.members),
        (1, vec![survivor.clone()])
    );
    mesh.start_lead(&survivor).await;
    wait_for("it to lead", LIMIT, async || {
        let status = status(&mesh, &survivor).await;
        status.leader.as_ref() == Some(&survivor) && !status.stale
    })
    .await;
    assert_eq!(names(&mesh, &survivor).await, ["shop/one"]);
    assert_eq!(incarnation(&mesh, &survivor).await, 1);
    assert_eq!(leads(&mesh, &survivor).await.len(), 1);

    for name in [&leader, &lost] {
        add(&mut mesh, &survivor, name, None).await;
    }
    assert_eq!(apply(&mesh, &lost, "two").await.0, StatusCode::OK);
    assert_eq!(names(&mesh, &leader).await, ["shop/one", "shop/two"]);
    mesh.stop(&survivor).await;
    wait_for("the others to go on", LIMIT, async || {
        apply(&mesh, &lost, "three").await.0 == StatusCode::OK
    })
    .await;
    mesh.end().await;
}
