//! The agent stream, joins and renewals as they look on the wire: one golden file per message, and each reads back as it was.

use std::{collections::BTreeMap, net::IpAddr};

use control_api::join::{Certificate, JoinRequest, Joined, RenewRequest};
use control_api::stream::{Assignments, FromAgent, Hello, ToAgent, Welcome};
use control_core::{
    assignment::{Assignment, HostLine, Run, Want},
    goal::{Bytes, Cpu, Port, Protocol, Requests, Writers},
    report::{
        ClusterFacts, EndpointFact, InstanceId, InstanceReport, NodeReport, Phase, Report, Tier,
    },
};
use netmanager_api::{
    conditions::{BackendLoad, Conditions, Coordinate, NodePlace},
    table::{Mesh, Node, Revision, Table},
};
use serde::{Serialize, de::DeserializeOwned};

fn golden<T>(name: &str, message: &T)
where
    T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let text = serde_json::to_string(message).expect("messages are JSON");
    let back: T = serde_json::from_str(&text).expect("a message reads back");
    assert_eq!(&back, message);
    insta::assert_json_snapshot!(name, message);
}

fn id(epoch: u64) -> InstanceId {
    InstanceId {
        service: "shop/bookinfo/reviews-v1".to_owned(),
        instance: 0,
        epoch,
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn conditions() -> Conditions {
    Conditions {
        nodes: vec![NodePlace {
            node: 2,
            coordinate: Coordinate {
                at_us: [12_000, -3_400, 0],
                height_us: 350,
                error_permille: 120,
            },
        }],
        loads: vec![BackendLoad {
            addr6: "fd12:3456:789a::2:0:7".parse().expect("an address"),
            percent: 85,
        }],
    }
}

#[test]
fn what_an_agent_says_has_a_golden_file() {
    golden(
        "from_agent_hello",
        &FromAgent::Hello(Hello {
            cluster: "edge".to_owned(),
            facts: ClusterFacts {
                tier: Tier::Edge,
                region: "AT".to_owned(),
                labels: BTreeMap::from([("site".to_owned(), "graz".to_owned())]),
                cpu_price_ueur_h: 40_000,
                memory_price_ueur_h: 5000,
                egress_price_ueur_gib: 80_000,
                cpu_power_mw: 9000,
                carbon_g_kwh: 120,
                prefixes: vec!["10.42.0.0/16".parse().expect("a prefix")],
            },
            session: Some(7),
            revision: Some((0, 41)),
            version: "0.1.0".to_owned(),
        }),
    );
    golden(
        "from_agent_conditions",
        &FromAgent::Conditions(conditions()),
    );
    golden("from_agent_alive", &FromAgent::Alive { sequence: 3 });
}

#[test]
fn a_report_has_a_golden_file() {
    let node = NodeReport {
        ready: true,
        cpu_milli: 2000,
        memory_bytes: 4 << 30,
        gpus: 0,
        public_key: "cHVibGljIGtleQ==".to_owned(),
        tunnel: Some("192.0.2.1:51900".parse().expect("a socket address")),
        underlay: vec![ip("192.0.2.1")],
        used4: vec!["10.16.0.2".parse().expect("an address")],
        applied: (0, 41),
        rtt_us: BTreeMap::from([(2, 20_000)]),
        reached: vec![id(4)],
        draining_flows: vec![(id(3), 16)],
    };
    let ready = InstanceReport {
        id: id(4),
        node: "edge-1".to_owned(),
        phase: Phase::Ready,
        endpoint: Some(EndpointFact {
            addr6: "fd00::1:2".parse().expect("an address"),
            addr4: Some("10.16.0.2".parse().expect("an address")),
        }),
        reason: String::new(),
    };
    let refused = InstanceReport {
        id: id(5),
        node: String::new(),
        phase: Phase::Refused,
        endpoint: None,
        reason: "no node has that".to_owned(),
    };
    golden(
        "from_agent_report",
        &FromAgent::Report(Report {
            nodes: BTreeMap::from([("edge-1".to_owned(), node)]),
            instances: vec![ready, refused],
        }),
    );
}

#[test]
fn what_a_lead_says_has_a_golden_file() {
    let welcome = Welcome {
        session: 7,
        lease_ms: 10_000,
    };
    golden("to_agent_welcome", &ToAgent::Welcome(welcome));
    golden("to_agent_conditions", &ToAgent::Conditions(conditions()));
    golden("to_agent_renewed", &ToAgent::Renewed { sequence: 3 });
    let run = Run {
        image: None,
        command: vec!["bookinfo".to_owned(), "reviews".to_owned()],
        env: BTreeMap::from([("WEFT_EPOCH".to_owned(), "4".to_owned())]),
        hosts: vec![HostLine {
            address: ip("10.25.0.3"),
            names: vec!["closest.ratings".to_owned()],
        }],
        requests: Requests {
            cpu: Cpu::milli(250),
            memory: Bytes::new(64 << 20),
            gpus: 0,
        },
        ports: vec![Port {
            name: "http".parse().expect("a name"),
            protocol: Protocol::Tcp,
            port: 80,
            target_port: 8080,
            follow: false,
        }],
        writers: Writers::One,
    };
    let order = |epoch, want| Assignment {
        id: id(epoch),
        want,
        grace_ms: 5000,
    };
    golden(
        "to_agent_assignments",
        &ToAgent::Assignments(Assignments {
            revision: (0, 41),
            list: vec![order(3, Want::Stop), order(4, Want::Run(Box::new(run)))],
            revoked: netmanager_api::identity::Revoked::default(),
        }),
    );
    let table = Table {
        revision: Revision {
            incarnation: 0,
            index: 41,
        },
        mesh: Mesh {
            prefix6: "fd00:1:2::/48".parse().expect("a prefix"),
            prefix4: Some("10.16.0.0/12".parse().expect("a prefix")),
            seed: 5,
        },
        node: Node {
            number: 1,
            blocks4: vec!["10.16.0.0/27".parse().expect("a prefix")],
            carbon_g_kwh: None,
        },
        peers: Vec::new(),
        services: Vec::new(),
        spliced: Vec::new(),
    };
    let tables = BTreeMap::from([("edge-1".to_owned(), table)]);
    golden("to_agent_tables", &ToAgent::Tables(tables));
}

#[test]
fn what_is_said_to_join_and_to_renew_has_a_golden_file() {
    let (request, chain) = ("a request".to_owned(), "a chain".to_owned());
    golden(
        "join_request",
        &JoinRequest {
            cluster: "edge".to_owned(),
            secret: "5".repeat(64),
            request: request.clone(),
        },
    );
    golden(
        "joined",
        &Joined {
            chain: chain.clone(),
            authorities: "authorities".to_owned(),
        },
    );
    golden("renew_request", &RenewRequest { request });
    golden("certificate", &Certificate { chain });
}
