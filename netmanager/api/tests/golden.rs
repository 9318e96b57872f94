//! The wire, as it is written today: a change of a type shows in the files under `golden/`, and what is in
//! them must go on being read.

#![expect(
    clippy::unwrap_used,
    reason = "a step of a test that fails, fails the test, here as in its body"
)]

use std::{collections::BTreeMap, fmt::Debug, path::Path};

use ebpf_common::addr::Policy;
use netmanager_api::{
    cni::{AttachmentKey, PodRef, Refused, Reply, Request, Reserve, Reserved},
    conditions::{BackendLoad, Conditions, Coordinate, NodePlace},
    observe::{
        Backend as TraceBackend, Filter, FlowEvent, FlowsRequest, Outcome, Place, Request as Ask,
        Said, Trace, TraceRequest, Verdict, Way,
    },
    stream::{DrainingFlows, Endpoint, FromNode, Hello, InstanceRef, Measured, ToNode},
    table::{
        Backend, BackendState, Mesh, Node, Peer, PolicyName, Port, Protocol, Revision, Service,
        Table, Vip,
    },
};
use serde::{Serialize, de::DeserializeOwned};

/// Compares `value` with its golden file, and what the file reads as with `value`.
#[track_caller]
fn golden<T: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, value: &T) {
    insta::with_settings!({ snapshot_path => "golden", prepend_module_to_snapshot => false, omit_expression => true }, {
        insta::assert_json_snapshot!(name, value);
    });
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.snap"));
    let file = std::fs::read_to_string(path).unwrap();
    let (_, json) = file.trim_start_matches("---").split_once("---\n").unwrap();
    assert_eq!(&serde_json::from_str::<T>(json).unwrap(), value, "{name}");
}

fn coordinate() -> Coordinate {
    Coordinate {
        at_us: [12_000, -3_400, 0],
        height_us: 350,
        error_permille: 120,
    }
}

fn revision() -> Revision {
    Revision {
        incarnation: 2,
        index: 417,
    }
}

fn instance() -> InstanceRef {
    InstanceRef {
        service: "shop/bookinfo/reviews".into(),
        instance: 1,
        epoch: 3,
    }
}

fn key() -> AttachmentKey {
    AttachmentKey {
        network: "weft".into(),
        container_id: "c0ffee".into(),
        ifname: "net1".into(),
    }
}

#[test]
fn the_table_is_written_as_before() {
    let backend = |instance, state| Backend {
        instance,
        epoch: 3,
        node: 2,
        addr6: "fd12:3456:789a::2:0:7".parse().unwrap(),
        addr4: Some("10.16.0.39".parse().unwrap()),
        state,
    };
    let table = Table {
        revision: revision(),
        mesh: Mesh {
            prefix6: "fd12:3456:789a::/48".parse().unwrap(),
            prefix4: Some("10.16.0.0/12".parse().unwrap()),
            seed: 81_985_529_216_486_895,
        },
        node: Node {
            number: 1,
            blocks4: vec!["10.16.0.0/27".parse().unwrap()],
            carbon_g_kwh: Some(48),
        },
        peers: vec![Peer {
            number: 2,
            name: "edge/n2".into(),
            public_key: "Wj4gsBNB90G2bCA2ZVEYEELeo32xPomW9L6T/uKuyFg=".into(),
            endpoint: Some("192.0.2.2:27460".parse().unwrap()),
            blocks4: vec!["10.16.0.32/27".parse().unwrap()],
            carbon_g_kwh: Some(48),
        }],
        services: vec![Service {
            name: "shop/bookinfo/reviews".into(),
            number: 5,
            ports: vec![
                Port {
                    protocol: Protocol::Tcp,
                    port: 80,
                    target_port: 8080,
                    follow: false,
                },
                Port {
                    protocol: Protocol::Udp,
                    port: 53,
                    target_port: 5353,
                    follow: true,
                },
            ],
            vips: vec![
                Vip {
                    policy: PolicyName(Policy::Closest),
                    instance: None,
                    addr6: "fd12:3456:789a:1100:0:5::".parse().unwrap(),
                    addr4: Some("10.25.0.5".parse().unwrap()),
                },
                Vip {
                    policy: PolicyName(Policy::Instance),
                    instance: Some(1),
                    addr6: "fd12:3456:789a:1700:0:5:0:1".parse().unwrap(),
                    addr4: None,
                },
            ],
            backends: vec![
                backend(0, BackendState::Ready),
                backend(1, BackendState::Draining),
                backend(2, BackendState::Probing),
            ],
        }],
        spliced: vec!["shop/web/front".into()],
    };
    golden("to_node_table", &ToNode::Table(Box::new(table)));
    let conditions = Conditions {
        nodes: vec![NodePlace {
            node: 2,
            coordinate: coordinate(),
        }],
        loads: vec![BackendLoad {
            addr6: "fd12:3456:789a::2:0:7".parse().unwrap(),
            percent: 85,
        }],
    };
    golden("to_node_conditions", &ToNode::Conditions(conditions));
}

#[test]
fn what_a_node_says_is_written_as_before() {
    golden(
        "from_node_hello",
        &FromNode::Hello(Hello {
            node: "n1".into(),
            public_key: "Wj4gsBNB90G2bCA2ZVEYEELeo32xPomW9L6T/uKuyFg=".into(),
            tunnel_port: 27_460,
            underlay: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
            applied: Some(revision()),
            version: "0.1.0".into(),
        }),
    );
    golden(
        "from_node_endpoints",
        &FromNode::Endpoints {
            endpoints: vec![Endpoint {
                number: 7,
                addr6: "fd12:3456:789a::1:0:7".parse().unwrap(),
                addr4: Some("10.16.0.7".parse().unwrap()),
                instance: Some(instance()),
            }],
        },
    );
    golden(
        "from_node_applied",
        &FromNode::Applied {
            revision: revision(),
        },
    );
    golden(
        "from_node_measured",
        &FromNode::Measured(Measured {
            rtt_us: BTreeMap::from([(2, 1_250)]),
            unreachable: vec![3],
            reached: vec![instance()],
            draining_flows: vec![DrainingFlows {
                instance: instance(),
                flows: 12,
            }],
            coordinate: Some(coordinate()),
        }),
    );
}

#[test]
fn the_cni_door_speaks_as_before() {
    let wish = Reserve {
        key: key(),
        netns: "/run/netns/pod".into(),
        pod: PodRef {
            namespace: "shop".into(),
            name: "reviews-1".into(),
            uid: "0b6c".into(),
        },
        instance: Some(instance()),
        mac: Some("02:00:00:00:00:07".into()),
    };
    golden("cni_reserve", &Request::Reserve(wish));
    let activate = Request::Activate {
        key: key(),
        host_ifindex: 12,
    };
    golden("cni_activate", &activate);
    golden("cni_release", &Request::Release { key: key() });
    golden("cni_check", &Request::Check { key: key() });
    let gc = Request::Gc {
        network: "weft".into(),
        keep: vec![key()],
    };
    golden("cni_gc", &gc);
    golden("cni_status", &Request::Status);
    let reserved = Reserved {
        endpoint: 7,
        host_ifname: "wfd93fba428b3".into(),
        mac: "02:00:01:00:00:07".into(),
        host_mac: "06:00:01:00:00:07".into(),
        addr6: "fd12:3456:789a::1:0:7".parse().unwrap(),
        addr4: Some("10.16.0.7".parse().unwrap()),
        gateway6: "fd12:3456:789a::1:0:1".parse().unwrap(),
        gateway4: Some("10.16.0.1".parse().unwrap()),
        mesh6: "fd12:3456:789a::/48".parse().unwrap(),
        mesh4: Some("10.16.0.0/12".parse().unwrap()),
        mtu: 1_420,
    };
    golden("cni_reserved", &Reply::Reserved(reserved));
    golden("cni_done", &Reply::Done);
    let refused = Refused {
        code: 11,
        message: "node n1 has no number yet".into(),
    };
    golden("cni_refused", &Reply::Refused(refused));
}

#[test]
fn the_observe_door_speaks_as_before() {
    let flows = FlowsRequest {
        filter: Filter {
            service: Some("bookinfo/reviews".into()),
            pod: Some("shop/client".into()),
            verdict: Some(Verdict::Refused),
        },
        sample_every: 10,
        per_second: 500,
    };
    golden("observe_flows", &Ask::Flows(flows));
    let trace = TraceRequest {
        from: "shop/client".into(),
        to: "10.24.0.5".parse().unwrap(),
        port: Some(80),
        protocol: "tcp".into(),
        sport: Some(40_000),
        probe: true,
    };
    golden("observe_trace", &Ask::Trace(trace));
    let place = |address: &str, pod: Option<&str>| Place {
        address: address.parse().unwrap(),
        pod: pod.map(str::to_owned),
    };
    let event = FlowEvent {
        time_ms: 1_795_000_000_000,
        node: "n1".into(),
        verdict: Verdict::Ended,
        reason: Some("not_linked".into()),
        protocol: "TCP".into(),
        from: place("10.16.0.2:40000", Some("shop/client")),
        to: place("10.24.0.5:80", None),
        service: Some("shop/bookinfo/reviews".into()),
        policy: Some("balanced".into()),
        translated_to: Some("10.16.0.39:8080".parse().unwrap()),
        instance: Some(1),
        backend_node: Some(2),
        age_s: Some(7),
        probe: true,
    };
    golden("observed_flow", &Said::Flow(Box::new(event)));
    let following = Said::Following {
        sample_every: 10,
        per_second: 500,
    };
    golden("observed_following", &following);
    let lost = Said::Lost {
        limited: 3,
        full: 1,
    };
    golden("observed_lost", &lost);
    golden(
        "observed_cut",
        &Said::Cut {
            why: "too slow".into(),
        },
    );
    let probed = Said::Probed {
        answered: true,
        note: "the probe's end was seen".into(),
    };
    golden("observed_probed", &probed);
    let message = "only root may use the observe door".into();
    golden("observed_refused", &Said::Refused { message });
    let backend = |way| TraceBackend {
        index: 4,
        address: "10.16.0.39:8080".parse().unwrap(),
        instance: Some(1),
        node: "edge/n2".into(),
        way,
        share: 1_000,
    };
    let outcomes = [
        (
            "observed_trace_refused",
            Outcome::Refused {
                reason: "not_linked".into(),
                why: "link the services".into(),
                answer: "a TCP reset".into(),
            },
        ),
        (
            "observed_trace_existing",
            Outcome::Existing {
                backend: backend(Way::Local { endpoint: 7 }),
                anew: Some(backend(Way::Nowhere)),
            },
        ),
        (
            "observed_trace_opens",
            Outcome::Opens {
                slot: 2,
                of: 3,
                backend: backend(Way::Tunnel { mtu: 1_420 }),
            },
        ),
        (
            "observed_trace_depends",
            Outcome::Depends {
                backends: vec![backend(Way::Tunnel { mtu: 1_420 })],
            },
        ),
    ];
    for (name, outcome) in outcomes {
        let trace = Trace {
            node: "n1".into(),
            from: "shop/client".into(),
            source: "10.16.0.2:40000".parse().unwrap(),
            to: "10.24.0.5:80".parse().unwrap(),
            protocol: "TCP".into(),
            service: Some("shop/bookinfo/reviews".into()),
            policy: Some("balanced".into()),
            outcome,
        };
        golden(name, &Said::Trace(Box::new(trace)));
    }
}
