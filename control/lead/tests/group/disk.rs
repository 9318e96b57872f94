//! A lead with little room on its disk.

use std::time::Duration;

use control_api::http::{List, Node};
use http::StatusCode;
use tokio::time::sleep;

use crate::{
    agents::{TestAgent, report},
    goal,
    mesh::{LIMIT, TestMesh},
    stopwatch::{Stopwatch, ensure, undisturbed},
};

/// Two leases of a cluster.
const LEASES: Duration = Duration::from_secs(4);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_stays_connected_while_its_reports_find_no_room() {
    undisturbed(async || {
        let mut mesh = TestMesh::start(&["a"]).await;
        mesh.leader().await;
        let (agent, welcome) = TestAgent::follow(&mesh, "a", "edge", None).await.unwrap();
        drop(agent);
        mesh.stop("a").await;
        // Short of that, with enough to start.
        let space = rustix::fs::statvfs(mesh.path()).unwrap();
        mesh.reserve = Some(4 * space.f_bavail * space.f_frsize);
        mesh.start_lead("a").await;
        let session = Some(welcome.session);
        let (mut agent, again) = TestAgent::follow(&mesh, "a", "edge", session)
            .await
            .unwrap();
        ensure(again.session == welcome.session, "it was lost meanwhile")?;
        agent.stay_alive();
        let watch = Stopwatch::start();
        loop {
            let ask = ("POST", "/v1/applications");
            let (status, text) = mesh.ask_now("a", ask, &goal("one"), None).await;
            if status == StatusCode::SERVICE_UNAVAILABLE && text.contains("have room") {
                break;
            }
            ensure(watch.had() < LIMIT, "changes are taken")?;
            sleep(Duration::from_millis(20)).await;
        }
        agent.say(report(Vec::new())).await?;
        let watch = Stopwatch::start();
        while watch.had() < LEASES {
            agent.is_renewed("a renewal").await?;
        }
        assert!(!agent.has_ended().await);
        let (status, nodes): (_, List<Node>) = mesh.get("a", "/v1/nodes").await;
        assert_eq!(status, StatusCode::OK);
        assert!(nodes.items.is_empty(), "the report waits: {nodes:?}");
        mesh.end().await;
        Ok(())
    })
    .await;
}
