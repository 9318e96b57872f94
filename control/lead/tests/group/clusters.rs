//! Emptying a cluster, using it again, and taking it out of the mesh.

use std::time::Duration;

use control_api::{
    http::{Changed, Cluster, List},
    stream::FromAgent,
};
use control_core::{
    assignment::Want,
    command::LEVEL,
    report::{InstanceReport, Phase},
};
use http::StatusCode;
use tokio::time::sleep;

use crate::{
    agents::{TestAgent, report, running},
    apply,
    backup::status,
    mesh::{LIMIT, TestMesh},
    stopwatch::{Stopwatch, ensure, undisturbed},
};

/// How often the clusters are looked at.
const LOOK: Duration = Duration::from_millis(20);

/// What a cluster's agent says: its node's key and address are its own.
fn say(cluster: &str, instances: Vec<InstanceReport>) -> FromAgent {
    let mut said = report(instances);
    if let (FromAgent::Report(report), "fog") = (&mut said, cluster) {
        for node in report.nodes.values_mut() {
            node.public_key = "Zm9n".to_owned();
            node.tunnel = Some("192.0.2.2:51900".parse().unwrap());
            node.underlay = vec!["192.0.2.2".parse().unwrap()];
        }
    }
    said
}

/// An agent that is connected and has reported its node.
async fn join(mesh: &TestMesh, cluster: &str) -> Result<TestAgent, String> {
    let follow = TestAgent::follow(mesh, "a", cluster, None).await;
    let (agent, _) = follow.map_err(|status| status.to_string())?;
    agent.stay_alive();
    agent.say(say(cluster, Vec::new())).await?;
    Ok(agent)
}

async fn clusters(mesh: &TestMesh) -> Vec<Cluster> {
    let (status, list): (_, List<Cluster>) = mesh.get("a", "/v1/clusters").await;
    assert_eq!(status, StatusCode::OK);
    list.items
}

/// Asks for a change of a cluster.
async fn change(mesh: &TestMesh, method: &str, path: &str) -> Result<bool, (StatusCode, String)> {
    let path = format!("/v1/clusters/{path}");
    let (status, text) = mesh.ask("a", method, &path, "").await;
    if status != StatusCode::OK {
        return Err((status, text));
    }
    let changed: Changed = serde_json::from_str(&text).unwrap();
    Ok(changed.changed)
}

/// Waits until the list of clusters is so.
async fn until(mesh: &TestMesh, what: &str, so: impl Fn(&[Cluster]) -> bool) -> Result<(), String> {
    let watch = Stopwatch::start();
    loop {
        let clusters = clusters(mesh).await;
        if so(&clusters) {
            return Ok(());
        }
        ensure(watch.had() < LIMIT, format!("not {what}: {clusters:?}"))?;
        sleep(LOOK).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_is_drained_used_again_and_forgotten_once_it_is_lost() {
    undisturbed(async || {
        let mesh = TestMesh::start(&["a"]).await;
        mesh.leader().await;
        let watch = Stopwatch::start();
        while status(&mesh, "a").await.level < LEVEL {
            ensure(watch.had() < LIMIT, "the level is not raised")?;
            sleep(LOOK).await;
        }
        let mut edge = join(&mesh, "edge").await?;
        let mut fog = join(&mesh, "fog").await?;
        until(&mesh, "ready", |list| list.iter().all(|it| it.ready == 1)).await?;
        assert_eq!(apply(&mesh, "a", "one").await.0, StatusCode::OK);
        // Of two that cost the same the first by name.
        edge.hear("a run", |it| it.to_run().len() == 1).await?;
        let old = edge.to_run().remove(0);
        edge.say(say("edge", vec![running(&old)])).await?;

        assert_eq!(change(&mesh, "POST", "edge/drain").await, Ok(true));
        assert_eq!(change(&mesh, "POST", "edge/drain").await, Ok(false));
        fog.hear("a run", |it| it.to_run().len() == 1).await?;
        // Make before break.
        ensure(edge.to_run() == [old.clone()], "it is stopped first")?;
        let new = fog.to_run().remove(0);
        fog.say(say("fog", vec![running(&new)])).await?;
        let stops = |it: &TestAgent| {
            let mut list = it.assignments.list.iter();
            list.any(|it| it.id == old && matches!(it.want, Want::Stop))
        };
        edge.hear("a stop", stops).await?;
        let stopped = InstanceReport {
            phase: Phase::Stopped,
            ..running(&old)
        };
        edge.say(say("edge", vec![stopped])).await?;
        let empty = |list: &[Cluster]| list[0].bindings == 0;
        until(&mesh, "empty", empty).await?;
        ensure(
            clusters(&mesh).await[0].drained_since_ms.is_some(),
            "drained",
        )?;

        assert_eq!(change(&mesh, "DELETE", "edge/drain").await, Ok(true));
        assert_eq!(clusters(&mesh).await[0].drained_since_ms, None);
        let (status, _) = change(&mesh, "POST", "moon/drain").await.unwrap_err();
        assert_eq!(status, StatusCode::NOT_FOUND);
        let (status, text) = change(&mesh, "DELETE", "edge").await.unwrap_err();
        assert_eq!(status, StatusCode::CONFLICT);
        assert!(text.contains("its agent is connected"), "{text}");

        drop(edge);
        until(&mesh, "lost", |list| list[0].state == "lost").await?;
        assert_eq!(change(&mesh, "DELETE", "edge").await, Ok(true));
        let left = clusters(&mesh).await;
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].name, "fog");
        mesh.end().await;
        Ok(())
    })
    .await;
}
