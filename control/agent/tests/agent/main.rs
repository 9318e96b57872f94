//! An agent between a fake lead, fake nodes and a fake driver, over real TLS on loopback.
#![expect(clippy::unwrap_used, reason = "a test fails where it panics")]

mod authority;
mod doors;
mod fake;
mod join;
#[path = "../../../lead/tests/group/log.rs"]
mod log;
mod renewal;

use std::{
    collections::BTreeMap,
    net::{Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use control_api::stream::{Assignments, FromAgent, ToAgent};
use control_core::{
    assignment::{Assignment, Run, Want},
    goal::{Bytes, Cpu, Requests, Writers},
    report::{InstanceId, Phase, Report},
};
use netmanager_api::{
    conditions::{Conditions, Coordinate, NodePlace},
    identity::{Credentials, Revoked},
    stream::{Endpoint, FromNode, InstanceRef, Measured},
    table::{Mesh, Node, Peer, Revision, Table},
};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use weft_agent::{Agent, AgentError, config::Config, driver::State};

use crate::{
    authority::Authority,
    fake::{FakeDriver, FakeLead, FakeNode, Told, hello, soon},
    log::Log,
};

const CONFIG: &str = "
cluster: edge
facts: { tier: edge, region: AT, cpu_price_ueur_h: 1, cpu_power_mw: 1, carbon_g_kwh: 1 }
driver:
  local:
    run_dir: /nowhere
    cni_plugin: /nowhere
    nodes:
      - { name: n1, cni_socket: /nowhere, cpu: 1, memory: 1Gi }
      - { name: n2, cni_socket: /nowhere, cpu: 1, memory: 1Gi }
";
/// Long enough that no test waits for it.
const LEASE: Duration = Duration::from_secs(60);

/// An agent that runs until it is dropped.
struct Running {
    door: SocketAddr,
    driver: FakeDriver,
    shutdown: CancellationToken,
    serving: JoinHandle<Result<(), AgentError>>,
}

impl Running {
    async fn start(
        authority: &Authority,
        leads: Vec<SocketAddr>,
        state: Option<PathBuf>,
        driver: FakeDriver,
    ) -> Self {
        Self::start_as(authority.issue("agent/edge"), leads, state, driver).await
    }

    async fn start_as(
        credentials: Credentials,
        leads: Vec<SocketAddr>,
        state: Option<PathBuf>,
        driver: FakeDriver,
    ) -> Self {
        Log::start();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let door = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let agent = Agent {
            config: Config::parse(CONFIG, Path::new("agent.yaml")).unwrap(),
            credentials,
            leads,
            listener,
            state,
            driver: driver.clone(),
        };
        let serving = tokio::spawn(agent.serve(shutdown.clone()));
        Self {
            door,
            driver,
            shutdown,
            serving,
        }
    }

    async fn end(self) {
        self.shutdown.cancel();
        soon("the agent's end", self.serving)
            .await
            .unwrap()
            .unwrap();
    }
}

fn id(epoch: u64) -> InstanceId {
    InstanceId {
        service: "shop/app/web".to_owned(),
        instance: 0,
        epoch,
    }
}

fn run(writers: Writers) -> Want {
    Want::Run(Box::new(Run {
        image: None,
        command: vec!["true".to_owned()],
        env: BTreeMap::new(),
        hosts: Vec::new(),
        requests: Requests {
            cpu: Cpu::milli(600),
            memory: Bytes::new(1 << 20),
            gpus: 0,
        },
        ports: Vec::new(),
        writers,
    }))
}

fn orders<const N: usize>(index: u64, list: [(InstanceId, Want); N]) -> ToAgent {
    let order = |(id, want)| Assignment {
        id,
        want,
        grace_ms: 5000,
    };
    ToAgent::Assignments(Assignments {
        revision: (0, index),
        list: list.into_iter().map(order).collect(),
        revoked: Revoked::default(),
    })
}

fn tables(index: u64) -> ToAgent {
    let table = |number| Table {
        revision: revision(index),
        mesh: Mesh {
            prefix6: "fd00:1:2::/48".parse().unwrap(),
            prefix4: None,
            seed: 5,
        },
        node: Node {
            number,
            blocks4: Vec::new(),
            carbon_g_kwh: None,
        },
        peers: Vec::new(),
        services: Vec::new(),
        spliced: Vec::new(),
    };
    ToAgent::Tables(BTreeMap::from([
        ("n1".to_owned(), table(1)),
        ("n2".to_owned(), table(2)),
    ]))
}

/// The same for n1, with node 9 as a peer.
fn table_with_a_peer(index: u64) -> ToAgent {
    let ToAgent::Tables(mut tables) = tables(index) else {
        unreachable!("tables are tables");
    };
    tables.retain(|node, _| node == "n1");
    for table in tables.values_mut() {
        table.peers.push(Peer {
            number: 9,
            name: "fog/n1".to_owned(),
            public_key: "key".to_owned(),
            endpoint: None,
            blocks4: Vec::new(),
            carbon_g_kwh: None,
        });
    }
    ToAgent::Tables(tables)
}

fn place(node: u32, far: i32) -> NodePlace {
    let coordinate = Coordinate {
        at_us: [far, 0, 0],
        height_us: 50,
        error_permille: 100,
    };
    NodePlace { node, coordinate }
}

fn revision(index: u64) -> Revision {
    Revision {
        incarnation: 0,
        index,
    }
}

/// A node that has applied the table of `index`.
async fn ready_node(authority: &Authority, door: SocketAddr, name: &str, index: u64) -> FakeNode {
    let credentials = authority.issue(&format!("node/edge/{name}"));
    let mut node = FakeNode::dial(door, &credentials, hello(name))
        .await
        .unwrap();
    assert_eq!(node.table().await, Some(revision(index)));
    node.stands(revision(index)).await;
    node
}

fn attached(epoch: u64) -> FromNode {
    FromNode::Endpoints {
        endpoints: vec![Endpoint {
            number: 2,
            addr6: "fd00:1:2::2".parse().unwrap(),
            addr4: None,
            instance: Some(InstanceRef {
                service: "shop/app/web".to_owned(),
                instance: 0,
                epoch,
            }),
        }],
    }
}

fn phase(report: &Report, epoch: u64) -> Option<Phase> {
    let mut instances = report.instances.iter();
    let of = instances.find(|instance| instance.id == id(epoch));
    of.map(|instance| instance.phase)
}

/// Brings instance 1 of a new agent to `Ready` on n1.
async fn bring_up(
    authority: &Authority,
    agent: &Running,
    lead: &mut FakeLead,
    writers: Writers,
    lease: Duration,
) -> (fake::AgentStream, FakeNode) {
    let mut stream = lead.stream().await;
    stream.welcome(7, lease).await;
    stream.say(tables(10)).await;
    let node = ready_node(authority, agent.door, "n1", 10).await;
    let ready = |report: &Report| report.nodes["n1"].ready;
    stream.report("a ready node", ready).await;
    stream.say(orders(11, [(id(1), run(writers))])).await;
    agent.driver.reaches(&id(1), State::Starting).await;
    agent.driver.set(&id(1), State::Serving);
    node.say(attached(1)).await;
    let ready = |report: &Report| phase(report, 1) == Some(Phase::Ready);
    stream.report("a ready instance", ready).await;
    (stream, node)
}

#[tokio::test]
async fn an_instance_goes_from_its_order_to_ready_and_to_stopped() {
    let authority = Authority::new();
    let mut lead = FakeLead::start(&authority.issue("lead/a")).await;
    let leads = vec![lead.address];
    let agent = Running::start(&authority, leads, None, FakeDriver::new()).await;
    let (mut stream, _node) = bring_up(&authority, &agent, &mut lead, Writers::Many, LEASE).await;
    assert_eq!(stream.hello.cluster, "edge");
    assert_eq!(stream.hello.session, None);
    stream.say(orders(12, [(id(1), Want::Stop)])).await;
    agent.driver.reaches(&id(1), State::Stopping).await;
    agent.driver.set(&id(1), State::Gone);
    let stopped = |report: &Report| phase(report, 1) == Some(Phase::Stopped);
    stream.report("a stopped instance", stopped).await;
    stream.say(orders(13, [])).await;
    let forgotten = |report: &Report| report.instances.is_empty();
    stream.report("a forgotten instance", forgotten).await;
    let grace = Duration::from_secs(5);
    assert_eq!(
        agent.driver.told(),
        [
            Told::Run(id(1), "n1".to_owned()),
            Told::Stop(id(1), grace),
            Told::Forget(id(1)),
        ]
    );
    agent.end().await;
}

#[tokio::test]
async fn load_and_places_go_to_the_lead_and_those_of_its_peers_to_a_node() {
    let authority = Authority::new();
    let mut lead = FakeLead::start(&authority.issue("lead/a")).await;
    let leads = vec![lead.address];
    let agent = Running::start(&authority, leads, None, FakeDriver::new()).await;
    let (mut stream, mut node) =
        bring_up(&authority, &agent, &mut lead, Writers::Many, LEASE).await;
    stream.say(table_with_a_peer(12)).await;
    assert_eq!(node.table().await, Some(revision(12)));
    let own = place(1, 7_000);
    let measured = FromNode::Measured(Measured {
        coordinate: Some(own.coordinate),
        ..Measured::default()
    });
    let speaks = node.says.clone();
    let speaking = tokio::spawn(async move {
        let mut second_passes = tokio::time::interval(Duration::from_secs(1));
        loop {
            second_passes.tick().await;
            if speaks.send(measured.clone()).await.is_err() {
                return;
            }
        }
    });
    let told = stream.next("load and place", |message| match message {
        FromAgent::Conditions(told) if !told.loads.is_empty() && !told.nodes.is_empty() => {
            Some(told)
        }
        _ => None,
    });
    let told = told.await;
    assert_eq!(told.nodes, [own]);
    assert_eq!(
        told.loads[0].addr6,
        "fd00:1:2::2".parse::<Ipv6Addr>().unwrap()
    );
    // Half a processor of the 0.6 that it asked for.
    assert!((60..=99).contains(&told.loads[0].percent), "{told:?}");
    let mesh = Conditions {
        nodes: vec![place(8, 1_000), place(9, 2_000)],
        ..told
    };
    stream.say(ToAgent::Conditions(mesh)).await;
    let heard = node.conditions(|heard| (!heard.nodes.is_empty()).then(|| heard.nodes.clone()));
    assert_eq!(heard.await, [place(9, 2_000)], "what its table names");
    speaking.abort();
    agent.end().await;
}

#[tokio::test]
async fn when_its_lead_dies_the_agent_goes_on_with_the_next_one() {
    let authority = Authority::new();
    let mut first = FakeLead::start(&authority.issue("lead/a")).await;
    let mut second = FakeLead::start(&authority.issue("lead/b")).await;
    let leads = vec![first.address, second.address];
    let agent = Running::start(&authority, leads, None, FakeDriver::new()).await;
    // The agent may start with either.
    let started = tokio::select! {
        stream = first.stream() => stream,
        stream = second.stream() => {
            std::mem::swap(&mut first, &mut second);
            stream
        }
    };
    started.welcome(7, LEASE).await;
    started.say(orders(11, [])).await;
    started.say(tables(12)).await;
    let node = ready_node(&authority, agent.door, "n1", 12).await;
    first.die(started).await;
    let mut next = second.stream().await;
    assert_eq!(next.hello.session, Some(7));
    assert_eq!(next.hello.revision, Some((0, 12)));
    next.welcome(7, LEASE).await;
    // Orders of a lead that lags behind are not taken; the newer ones are.
    next.say(orders(10, [(id(9), run(Writers::Many))])).await;
    next.say(orders(13, [(id(1), run(Writers::Many))])).await;
    agent.driver.reaches(&id(1), State::Starting).await;
    assert_eq!(agent.driver.told(), [Told::Run(id(1), "n1".to_owned())]);
    next.report("a report", |report| phase(report, 1).is_some())
        .await;
    drop(node);
    agent.end().await;
}

#[tokio::test]
async fn a_cluster_that_was_given_up_stops_its_copies_before_it_starts_anything() {
    let authority = Authority::new();
    let mut lead = FakeLead::start(&authority.issue("lead/a")).await;
    let leads = vec![lead.address];
    let agent = Running::start(&authority, leads, None, FakeDriver::new()).await;
    let (stream, _node) = bring_up(&authority, &agent, &mut lead, Writers::Many, LEASE).await;
    drop(stream);
    let mut again = lead.stream().await;
    again.welcome(8, LEASE).await;
    let list = [(id(1), Want::Stop), (id(2), run(Writers::Many))];
    again.say(orders(20, list)).await;
    agent.driver.reaches(&id(1), State::Stopping).await;
    let stopped = Told::Stop(id(1), Duration::from_millis(1500));
    assert_eq!(agent.driver.told().last(), Some(&stopped));
    let waits = |report: &Report| phase(report, 2) == Some(Phase::Starting);
    again.report("a waiting instance", waits).await;
    assert_eq!(agent.driver.told().last(), Some(&stopped));
    agent.driver.set(&id(1), State::Gone);
    agent.driver.reaches(&id(2), State::Starting).await;
    agent.end().await;
}

#[tokio::test]
async fn an_instance_with_one_writer_is_fenced_when_renewals_are_not_counted() {
    let authority = Authority::new();
    let mut lead = FakeLead::start(&authority.issue("lead/a")).await;
    let leads = vec![lead.address];
    let agent = Running::start(&authority, leads, None, FakeDriver::new()).await;
    // Long enough to bring it up, also where the machine stands still for a while.
    let lease = Duration::from_secs(8);
    let (stream, _node) = bring_up(&authority, &agent, &mut lead, Writers::One, lease).await;
    // From here on nobody counts: the stream is up and says nothing.
    agent.driver.reaches(&id(1), State::Stopping).await;
    agent.driver.set(&id(1), State::Gone);
    drop(stream);
    let mut again = lead.stream().await;
    again.welcome(7, LEASE).await;
    let stopped = |report: &Report| phase(report, 1) == Some(Phase::Stopped);
    again.report("a fenced instance", stopped).await;
    assert_eq!(agent.driver.told().len(), 2, "{:?}", agent.driver.told());
    agent.end().await;
}

#[tokio::test]
async fn a_lead_that_does_not_renew_is_left_for_another() {
    let authority = Authority::new();
    let mut lead = FakeLead::start(&authority.issue("lead/a")).await;
    let leads = vec![lead.address];
    let agent = Running::start(&authority, leads, None, FakeDriver::new()).await;
    // An agent that slept through its lease leaves before it asks for a renewal.
    loop {
        let mut mute = lead.stream().await;
        mute.welcome(7, Duration::from_millis(300)).await;
        if mute.asks_for_renewal().await {
            break;
        }
    }
    let again = lead.stream().await;
    assert_eq!(again.hello.session, Some(7));
    agent.end().await;
}

#[tokio::test]
async fn a_restarted_agent_without_leads_goes_on_with_what_it_kept() {
    let authority = Authority::new();
    let mut lead = FakeLead::start(&authority.issue("lead/a")).await;
    let leads = vec![lead.address];
    let driver = FakeDriver::new();
    let state = Some(authority.state());
    let agent = Running::start(&authority, leads.clone(), state.clone(), driver.clone()).await;
    let (stream, node) = bring_up(&authority, &agent, &mut lead, Writers::Many, LEASE).await;
    stream.say(tables(30)).await;
    let mut node = node;
    assert_eq!(node.table().await, Some(revision(30)));
    lead.die(stream).await;
    agent.end().await;
    assert_eq!(node.table().await, None, "the stream ended with the agent");
    let agent = Running::start(&authority, leads, state, driver.clone()).await;
    // The node gets its table from an agent that never saw a lead.
    let _node = ready_node(&authority, agent.door, "n1", 30).await;
    // Its process ends for good: the agent runs it again, for nobody told it to stop.
    driver.set(&id(1), State::Gone);
    driver.reaches(&id(1), State::Starting).await;
    let run = Told::Run(id(1), "n1".to_owned());
    assert_eq!(driver.told(), [run.clone(), run]);
    agent.end().await;
}

#[tokio::test]
async fn instances_of_a_node_that_died_are_run_on_the_other_one() {
    let authority = Authority::new();
    let mut lead = FakeLead::start(&authority.issue("lead/a")).await;
    let leads = vec![lead.address];
    let agent = Running::start(&authority, leads, None, FakeDriver::new()).await;
    let (mut stream, first) = bring_up(&authority, &agent, &mut lead, Writers::Many, LEASE).await;
    let _second = ready_node(&authority, agent.door, "n2", 10).await;
    drop(first);
    agent.driver.set(&id(1), State::Restarting);
    let away =
        |report: &Report| !report.nodes["n1"].ready && phase(report, 1) == Some(Phase::NotReady);
    stream.report("a lost node", away).await;
    agent.driver.reaches(&id(1), State::Stopping).await;
    agent.driver.set(&id(1), State::Gone);
    agent.driver.reaches(&id(1), State::Starting).await;
    assert_eq!(
        agent.driver.told().last(),
        Some(&Told::Run(id(1), "n2".to_owned()))
    );
    agent.end().await;
}

#[tokio::test]
async fn an_agent_with_the_certificate_of_another_cluster_does_not_start() {
    let authority = Authority::new();
    let agent = Agent {
        config: Config::parse(CONFIG, Path::new("agent.yaml")).unwrap(),
        credentials: authority.issue("agent/fog"),
        leads: vec!["127.0.0.1:1".parse().unwrap()],
        listener: TcpListener::bind("127.0.0.1:0").await.unwrap(),
        state: None,
        driver: FakeDriver::new(),
    };
    let error = agent.serve(CancellationToken::new()).await.unwrap_err();
    assert!(matches!(error, AgentError::Role { .. }), "{error}");
    assert!(error.to_string().contains("weft://m/agent/fog"), "{error}");
}
