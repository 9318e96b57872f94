//! Agents' streams on a group of leads.

use std::{
    collections::BTreeMap,
    net::Ipv6Addr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use control_api::{
    http::{Binding, Cluster, List},
    stream::{Assignments, FromAgent, Hello, LeadDoorClient, ToAgent, Welcome},
};
use control_core::{
    assignment::Want,
    report::{
        ClusterFacts, EndpointFact, InstanceId, InstanceReport, NodeReport, Phase, Report, Tier,
    },
};
use http::StatusCode;
use netmanager_api::{
    conditions::{BackendLoad, Conditions, Coordinate, NodePlace},
    table::Table,
};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::{
    apply,
    mesh::{LIMIT, TestMesh},
    stopwatch::{Stopwatch, ensure, undisturbed},
};

/// How often an agent asks for a renewal.
const RENEWS: Duration = Duration::from_millis(250);

fn facts() -> ClusterFacts {
    ClusterFacts {
        tier: Tier::Edge,
        region: "de".to_owned(),
        labels: BTreeMap::new(),
        cpu_price_ueur_h: 30_000,
        memory_price_ueur_h: 4_000,
        egress_price_ueur_gib: 0,
        cpu_power_mw: 4_000,
        carbon_g_kwh: 300,
        prefixes: Vec::new(),
    }
}

fn node() -> NodeReport {
    NodeReport {
        ready: true,
        cpu_milli: 4_000,
        memory_bytes: 8 << 30,
        gpus: 0,
        public_key: "a2V5".to_owned(),
        tunnel: Some("192.0.2.1:51900".parse().unwrap()),
        underlay: vec!["192.0.2.1".parse().unwrap()],
        applied: (0, 0),
        rtt_us: BTreeMap::new(),
        reached: Vec::new(),
        draining_flows: Vec::new(),
        used4: Vec::new(),
    }
}

pub(crate) fn report(instances: Vec<InstanceReport>) -> FromAgent {
    FromAgent::Report(Report {
        nodes: BTreeMap::from([("n1".to_owned(), node())]),
        instances,
    })
}

pub(crate) fn running(id: &InstanceId) -> InstanceReport {
    InstanceReport {
        id: id.clone(),
        node: "n1".to_owned(),
        phase: Phase::Ready,
        endpoint: Some(EndpointFact {
            addr6: Ipv6Addr::LOCALHOST,
            addr4: None,
        }),
        reason: String::new(),
    }
}

/// The agent's side of a stream.
pub(crate) struct TestAgent {
    outbound: mpsc::Sender<FromAgent>,
    inbound: Streaming<ToAgent>,
    tables: BTreeMap<String, Table>,
    pub(crate) assignments: Assignments,
    /// How many renewals it has asked for, and which of them was counted last.
    asked: Arc<AtomicU64>,
    renewed: u64,
    conditions: Conditions,
}

impl TestAgent {
    /// Opens a stream, as soon as the lead is in touch with the others.
    pub(crate) async fn follow(
        mesh: &TestMesh,
        lead: &str,
        cluster: &str,
        session: Option<u64>,
    ) -> Result<(Self, Welcome), Status> {
        let watch = Stopwatch::start();
        loop {
            match Self::follow_now(mesh, lead, cluster, session).await {
                Err(status) if status.code() == Code::Unavailable && watch.had() < LIMIT => {
                    println!("{cluster} dials {lead} again: {status}");
                }
                answer => return answer,
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    async fn follow_now(
        mesh: &TestMesh,
        lead: &str,
        cluster: &str,
        session: Option<u64>,
    ) -> Result<(Self, Welcome), Status> {
        let (outbound, messages) = mpsc::channel(16);
        let hello = Hello {
            cluster: cluster.to_owned(),
            facts: facts(),
            session,
            revision: None,
            version: "test".to_owned(),
        };
        outbound.send(FromAgent::Hello(hello)).await.unwrap();
        let credentials = match cluster {
            "fog" => "agent-fog",
            "dune" => "agent-dune",
            _ => "agent",
        };
        let mut client = LeadDoorClient::new(mesh.channel(credentials, lead));
        let answer = client.follow(ReceiverStream::new(messages)).await?;
        let mut agent = Self {
            outbound,
            inbound: answer.into_inner(),
            tables: BTreeMap::new(),
            assignments: Assignments::default(),
            asked: Arc::default(),
            renewed: 0,
            conditions: Conditions::default(),
        };
        match agent.inbound.message().await? {
            Some(ToAgent::Welcome(welcome)) => Ok((agent, welcome)),
            other => panic!("no welcome but {other:?}"),
        }
    }

    /// Asks for renewals from now on, as an agent does: one that is silent for a lease is lost.
    pub(crate) fn stay_alive(&self) {
        let (outbound, asked) = (self.outbound.downgrade(), self.asked.clone());
        tokio::spawn(async move {
            while let Some(outbound) = outbound.upgrade() {
                let sequence = asked.fetch_add(1, Ordering::Relaxed) + 1;
                if outbound.send(FromAgent::Alive { sequence }).await.is_err() {
                    return;
                }
                drop(outbound);
                sleep(RENEWS).await;
            }
        });
    }

    /// Hears that one of the renewals was counted that it asks for from now on.
    pub(crate) async fn is_renewed(&mut self, what: &str) -> Result<(), String> {
        let before = self.asked.load(Ordering::Relaxed);
        self.hear(what, |it| it.renewed > before).await
    }

    pub(crate) async fn say(&self, message: FromAgent) -> Result<(), String> {
        let said = self.outbound.send(message).await;
        said.map_err(|_| "the stream ended".to_owned())
    }

    /// Hears messages until `enough`; fails where the stream ends, and panics after the limit.
    pub(crate) async fn hear(
        &mut self,
        what: &str,
        mut enough: impl FnMut(&Self) -> bool,
    ) -> Result<(), String> {
        while !enough(self) {
            let message = timeout(LIMIT, self.inbound.message()).await;
            let message = message.unwrap_or_else(|_| panic!("waited for {what}"));
            let message = message.map_err(|status| format!("before {what}: {status}"))?;
            match message.ok_or_else(|| format!("before {what} the stream ended"))? {
                ToAgent::Welcome(_) => panic!("welcome twice"),
                ToAgent::Renewed { sequence } => self.renewed = sequence,
                ToAgent::Tables(tables) => self.tables.extend(tables),
                ToAgent::Assignments(assignments) => self.assignments = assignments,
                ToAgent::Conditions(conditions) => self.conditions = conditions,
            }
        }
        Ok(())
    }

    /// Whether the lead ended the stream; hears messages for a moment.
    pub(crate) async fn has_ended(&mut self) -> bool {
        let message = timeout(Duration::from_millis(100), self.inbound.message());
        matches!(message.await, Ok(Err(_) | Ok(None)))
    }

    /// What the cluster must run.
    pub(crate) fn to_run(&self) -> Vec<InstanceId> {
        let list = self.assignments.list.iter();
        list.filter(|it| matches!(it.want, Want::Run(_)))
            .map(|it| it.id.clone())
            .collect()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_on_a_follower_gets_its_tables_and_assignments_also_from_the_next_leader() {
    undisturbed(async || {
        let mut mesh = TestMesh::start(&["a", "b", "c"]).await;
        let leader = mesh.leader().await;
        let [follower, other] = mesh.others(&leader);
        let (mut agent, welcome) = TestAgent::follow(&mesh, &follower, "edge", None)
            .await
            .unwrap();
        assert_eq!(welcome.lease_ms, 2_000);
        agent.stay_alive();
        agent.say(report(Vec::new())).await?;
        let has_table = |it: &TestAgent| it.tables.contains_key("n1");
        agent.hear("the node's table", has_table).await?;
        agent.is_renewed("the renewal").await?;

        assert_eq!(apply(&mesh, &other, "one").await.0, StatusCode::OK);
        agent.hear("a run", |it| it.to_run().len() == 1).await?;
        let id = agent.to_run().remove(0);
        assert_eq!(id.service, "shop/one/web");
        agent.say(report(vec![running(&id)])).await?;
        let watch = Stopwatch::start();
        while !is_ready(&mesh, &other).await {
            ensure(watch.had() < LIMIT, "the binding is not ready")?;
            sleep(Duration::from_millis(20)).await;
        }

        mesh.stop(&leader).await;
        agent.is_renewed("a renewal by the next leader").await?;
        assert_eq!(apply(&mesh, &other, "two").await.0, StatusCode::OK);
        agent.hear("two runs", |it| it.to_run().len() == 2).await?;
        mesh.end().await;
        Ok(())
    })
    .await;
}

async fn is_ready(mesh: &TestMesh, lead: &str) -> bool {
    let (_, list): (_, List<Binding>) = mesh.get(lead, "/v1/bindings").await;
    list.items.iter().any(|binding| binding.phase == "ready")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_cluster_is_lost_and_comes_back_with_a_new_session() {
    undisturbed(async || {
        let mesh = TestMesh::start(&["a"]).await;
        mesh.leader().await;
        let (mut agent, first) = TestAgent::follow(&mesh, "a", "edge", None).await.unwrap();
        let session = Some(first.session);
        let state = async || {
            let (_, list): (_, List<Cluster>) = mesh.get("a", "/v1/clusters").await;
            list.items[0].state.clone()
        };
        let (_, again) = TestAgent::follow(&mesh, "a", "edge", session)
            .await
            .unwrap();
        let same = again.session == first.session;
        ensure(same && state().await == "ready", "lost too early")?;
        // A leader that slept blames nobody.
        let watch = Stopwatch::start();
        while state().await != "lost" {
            ensure(watch.had() < LIMIT, "it is not lost")?;
            sleep(Duration::from_millis(20)).await;
        }

        // The stream may have ended by itself.
        let _ = agent.say(report(Vec::new())).await;
        assert_eq!(end_of(&mut agent).await.code(), Code::Aborted);
        let (_, next) = TestAgent::follow(&mesh, "a", "edge", session)
            .await
            .unwrap();
        assert_ne!(next.session, first.session);
        ensure(state().await == "ready", "lost at once")?;
        mesh.end().await;
        Ok(())
    })
    .await;
}

/// A node's number, and what its agent says of it.
async fn standing(agent: &mut TestAgent) -> Result<(u32, Conditions), String> {
    agent.say(report(Vec::new())).await?;
    let has_table = |it: &TestAgent| it.tables.contains_key("n1");
    agent.hear("the node's table", has_table).await?;
    let table = &agent.tables["n1"];
    let number = table.node.number;
    let mut words = table.mesh.prefix6.network().segments();
    (words[5], words[7]) = (number as u16, 2);
    let conditions = Conditions {
        nodes: vec![NodePlace {
            node: number,
            coordinate: Coordinate {
                at_us: [1_000 * number as i32, 0, 0],
                height_us: 50,
                error_permille: 90,
            },
        }],
        loads: vec![BackendLoad {
            addr6: words.into(),
            percent: 40,
        }],
    };
    Ok((number, conditions))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_cluster_says_of_itself_reaches_another_on_another_lead_and_no_log() {
    undisturbed(async || {
        let mesh = TestMesh::start(&["a", "b", "c"]).await;
        let leader = mesh.leader().await;
        let [first, second] = mesh.others(&leader);
        let follow = |lead, cluster| TestAgent::follow(&mesh, lead, cluster, None);
        let (mut edge, _) = follow(&first, "edge").await.unwrap();
        let (mut fog, _) = follow(&second, "fog").await.unwrap();
        edge.stay_alive();
        fog.stay_alive();
        let (number, of_edge) = standing(&mut edge).await?;
        let (other, of_fog) = standing(&mut fog).await?;
        let is_peer = |it: &TestAgent| {
            let mut peers = it.tables["n1"].peers.iter();
            peers.any(|peer| peer.number == number)
        };
        fog.hear("a table with the other as a peer", is_peer)
            .await?;
        let index = fog.tables["n1"].revision.index;
        // What it says of the other's node is nobody's news.
        let lies = Conditions {
            nodes: vec![NodePlace {
                node: other,
                ..of_edge.nodes[0]
            }],
            ..Conditions::default()
        };
        let said = of_edge.clone().joined(lies);
        while fog.conditions.nodes != of_edge.nodes {
            assert!(fog.conditions.nodes.len() <= 1, "{:?}", fog.conditions);
            fog.conditions = Conditions::default();
            edge.say(FromAgent::Conditions(said.clone())).await?;
            fog.say(FromAgent::Conditions(of_fog.clone())).await?;
            let mut heard = false;
            let once = |_: &TestAgent| std::mem::replace(&mut heard, true);
            fog.hear("the conditions", once).await?;
        }
        assert!(
            fog.conditions.loads.is_empty(),
            "no table names that backend: {:?}",
            fog.conditions
        );
        let still = fog.tables["n1"].revision.index;
        mesh.end().await;
        ensure(still == index, "a new table")
    })
    .await;
}

/// How a stream ends; everything before is passed over.
async fn end_of(agent: &mut TestAgent) -> Status {
    loop {
        match timeout(LIMIT, agent.inbound.message()).await.unwrap() {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ended without a word"),
            Err(status) => return status,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lead_that_is_cut_off_closes_its_streams_and_another_takes_them() {
    let mut mesh = TestMesh::start(&["a", "b", "c"]).await;
    let leader = mesh.leader().await;
    let [deaf, other] = mesh.others(&leader);
    let (mut agent, welcome) = TestAgent::follow(&mesh, &deaf, "edge", None).await.unwrap();
    let session = Some(welcome.session);

    // A follower that nobody reaches cannot know what is new.
    mesh.hears(&deaf, false);
    let ended = end_of(&mut agent).await;
    assert_eq!(ended.code(), Code::Unavailable, "{ended:?}");
    assert!(ended.message().contains("out of touch"), "{ended:?}");
    let (mut agent, _) = TestAgent::follow(&mesh, &leader, "edge", session)
        .await
        .unwrap();

    // A leader without a majority cannot, either.
    agent.stay_alive();
    mesh.stop(&other).await;
    mesh.stop(&deaf).await;
    let ended = end_of(&mut agent).await;
    assert_eq!(ended.code(), Code::Unavailable, "{ended:?}");
    assert!(ended.message().contains("out of touch"), "{ended:?}");
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_speaks_only_for_its_own_cluster() {
    let mesh = TestMesh::start(&["a"]).await;
    mesh.leader().await;
    let refused = TestAgent::follow(&mesh, "a", "cloud", None).await;
    let status = refused.err().unwrap();
    assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
    assert!(status.message().contains("edge"), "{status:?}");
    let (_, list): (_, List<Cluster>) = mesh.get("a", "/v1/clusters").await;
    assert!(list.items.is_empty());
    mesh.end().await;
}
