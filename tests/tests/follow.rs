//! The agent stream from the node's end, against a door with real TLS and gRPC.

#![expect(
    clippy::unwrap_used,
    reason = "a step of a test that fails, fails the test, here as in its body"
)]

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use netmanager_api::{
    conditions::{BackendLoad, Conditions},
    stream::{FromNode, Hello, ToNode},
    table::{Mesh, Node, Revision, Table},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::timeout,
};
use weft_netmanager::follow::{self, FollowError, Inbox, Outbox, client_tls, follow};

#[path = "follow/agent.rs"]
mod agent;

use agent::{Agent, Authority};

const SOON: Duration = Duration::from_secs(20);
/// An agent takes a node that is silent for so long for dead.
const SILENCE: Duration = Duration::from_secs(3);
const ANYWHERE: &str = "127.0.0.1:0";

fn table(index: u64) -> Table {
    Table {
        revision: Revision {
            incarnation: 1,
            index,
        },
        mesh: Mesh {
            prefix6: "fd12:3456:789a::/48".parse().unwrap(),
            prefix4: None,
            seed: 1,
        },
        node: Node {
            number: 4,
            blocks4: Vec::new(),
            carbon_g_kwh: None,
        },
        peers: Vec::new(),
        services: Vec::new(),
        spliced: Vec::new(),
    }
}

/// A following node: what it was told, what it has to say, and its task.
struct Follower {
    tables: mpsc::Receiver<Table>,
    conditions: watch::Receiver<Conditions>,
    outbox: watch::Sender<Outbox>,
    _task: JoinHandle<()>,
}

fn start(authority: &Authority, address: SocketAddr) -> Follower {
    let agent = follow::Agent {
        address: address.to_string(),
        node: "n1".into(),
        credentials: authority.issue("node/edge/n1"),
    };
    let hello = Hello {
        node: "n1".into(),
        public_key: "key".into(),
        tunnel_port: 1,
        underlay: Vec::new(),
        applied: None,
        version: "0".into(),
    };
    let (outbox, said) = watch::channel(Outbox {
        hello: Some(hello),
        ..Outbox::default()
    });
    let (sender, tables) = mpsc::channel(4);
    let (told, conditions) = watch::channel(Conditions::default());
    let inbox = Inbox {
        tables: sender,
        conditions: told,
    };
    Follower {
        tables,
        conditions,
        outbox,
        _task: tokio::spawn(follow(agent, said, inbox)),
    }
}

async fn heard(agent: &mut Agent) -> FromNode {
    timeout(SOON, agent.said.recv()).await.unwrap().unwrap()
}

/// The next word that `wanted` takes; measurements are repeated between the others.
async fn hear<T>(agent: &mut Agent, wanted: impl Fn(FromNode) -> Option<T>) -> T {
    loop {
        if let Some(found) = wanted(heard(agent).await) {
            return found;
        }
    }
}

#[tokio::test]
async fn tables_come_in_and_what_is_applied_goes_out() {
    let authority = Authority::new();
    let folder = authority.issue("agent/edge");
    let mut agent = Agent::open(&folder, ANYWHERE.parse().unwrap()).await;
    let mut follower = start(&authority, agent.address);
    assert!(matches!(heard(&mut agent).await, FromNode::Hello(hello) if hello.node == "n1"));
    let told = ToNode::Table(Box::new(table(3)));
    agent.tell.send(Ok(told)).await.unwrap();
    let got = timeout(SOON, follower.tables.recv()).await.unwrap();
    assert_eq!(got, Some(table(3)));
    let load = BackendLoad {
        addr6: "fd12:3456:789a::1:0:7".parse().unwrap(),
        percent: 40,
    };
    let conditions = Conditions {
        loads: vec![load],
        ..Conditions::default()
    };
    let told = ToNode::Conditions(conditions.clone());
    agent.tell.send(Ok(told)).await.unwrap();
    let changed = timeout(SOON, follower.conditions.changed()).await.unwrap();
    assert!(changed.is_ok());
    assert_eq!(*follower.conditions.borrow(), conditions);
    follower
        .outbox
        .send_modify(|outbox| outbox.applied = Some(table(3).revision));
    let applied = hear(&mut agent, |word| match word {
        FromNode::Applied { revision } => Some(revision),
        _ => None,
    });
    assert_eq!(applied.await, table(3).revision);
}

#[tokio::test]
async fn a_node_without_news_repeats_itself_so_that_it_is_not_taken_for_dead() {
    let authority = Authority::new();
    let mut agent = Agent::open(&authority.issue("agent/edge"), ANYWHERE.parse().unwrap()).await;
    let _follower = start(&authority, agent.address);
    let (mut in_time, mut late) = (0, 0);
    while in_time < 3 {
        let since = Instant::now();
        let measured = hear(&mut agent, |word| {
            matches!(word, FromNode::Measured(_)).then_some(())
        });
        measured.await;
        match since.elapsed() < SILENCE {
            true => in_time += 1,
            // Where the machine stands still everybody is late.
            false => late += 1,
        }
        assert!(late < 3, "{in_time} words in time, and {late} late");
    }
}

#[tokio::test]
async fn a_node_dials_again_when_its_agent_comes_back_and_says_what_it_applied() {
    let authority = Authority::new();
    let folder = authority.issue("agent/edge");
    let mut agent = Agent::open(&folder, ANYWHERE.parse().unwrap()).await;
    let follower = start(&authority, agent.address);
    heard(&mut agent).await;
    let address = agent.address;
    drop(agent);
    follower
        .outbox
        .send_modify(|outbox| outbox.applied = Some(table(9).revision));
    let mut agent = Agent::open(&folder, address).await;
    let applied = hear(&mut agent, |word| match word {
        FromNode::Hello(hello) => Some(hello.applied),
        _ => None,
    });
    assert_eq!(applied.await, Some(table(9).revision));
}

#[tokio::test]
async fn the_agent_of_another_cluster_and_a_lead_are_not_followed() {
    let authority = Authority::new();
    for role in ["agent/cloud", "lead/a", "node/edge/n2"] {
        let mut agent = Agent::open(&authority.issue(role), ANYWHERE.parse().unwrap()).await;
        let _follower = start(&authority, agent.address);
        let refused = timeout(SOON, agent.refused.recv()).await.unwrap();
        assert!(refused.is_some(), "{role}");
        assert!(agent.said.try_recv().is_err(), "{role} heard something");
    }
}

#[tokio::test]
async fn credentials_of_another_node_or_role_are_refused_by_name() {
    let authority = Authority::new();
    for role in ["node/edge/n2", "agent/edge", "user/admin"] {
        let agent = follow::Agent {
            address: ANYWHERE.into(),
            node: "n1".into(),
            credentials: authority.issue(role),
        };
        let error = client_tls(&agent).unwrap_err();
        assert!(
            matches!(error, FollowError::WrongNode { .. }),
            "{role}: {error}"
        );
        assert!(error.to_string().contains(role), "{error}");
    }
}
