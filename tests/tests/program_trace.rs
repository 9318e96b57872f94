//! What a trace says is what the program then does.

use std::{cell::RefCell, collections::BTreeMap, net::IpAddr};

use ebpf_common::{
    addr::Policy,
    layout::{
        Addr, BACKEND_DRAINING, Backend, Config, Endpoint, Flow, FlowKey, PROTO_TCP, Vip, VipKey,
    },
};
use netmanager_api::observe::{Outcome, Trace, TraceRequest, Way};
use proptest::prelude::*;
use weft_netmanager::observe::{
    Names,
    trace::{self, Asker, Maps, Place},
};
use weft_tests::program::{
    REDIRECTED,
    packet::{Packet, SYN},
    stage::{
        CLIENT, Family, NODE, PORT, REMOTE_BACKEND, Stage, endpoint_address, receiver, vip_address,
    },
};

/// Every backend of the stage: two local ones, the client itself, and the remote one.
const BACKENDS: [u32; 4] = [13, 14, 10 + CLIENT, REMOTE_BACKEND];

/// The maps of a load, read as a NetManager reads its own.
struct Loaded<'a>(RefCell<&'a mut Stage>);

impl Maps for Loaded<'_> {
    fn vip(&self, key: &VipKey) -> Option<Vip> {
        self.0.borrow_mut().node.entry::<20, 20, _>("VIPS", key)
    }
    fn slot(&self, index: u32) -> Option<u32> {
        self.0.borrow_mut().node.element::<4, _>("SLOTS", index)
    }
    fn backend(&self, index: u32) -> Option<Backend> {
        let mut stage = self.0.borrow_mut();
        stage.node.element::<48, _>("BACKENDS", index)
    }
    fn place(&self, address: &Addr) -> Place {
        let node = &mut self.0.borrow_mut().node;
        let endpoint: Option<Endpoint> = node.entry::<16, 64, _>("LOCAL", address);
        Place {
            endpoint: endpoint.map(|endpoint| endpoint.number),
            path_mtu: None,
        }
    }
    fn flow(&self, key: &FlowKey) -> Option<Flow> {
        let node = &mut self.0.borrow_mut().node;
        let connection = (key.proto == PROTO_TCP)
            .then(|| node.flow("FLOWS", key))
            .flatten();
        connection.or_else(|| node.flow("FLOWS_LRU", key))
    }
}

fn ask(stage: &mut Stage, request: &TraceRequest) -> Trace {
    let config: Config = stage.node.element::<96, _>("CONFIG", 0).expect("it is set");
    let names = Names::default();
    let endpoint = Stage::endpoint(CLIENT);
    let asker = Asker {
        config: &config,
        endpoint: &endpoint,
        names: &names,
    };
    trace::trace(&Loaded(RefCell::new(stage)), asker, request).expect("a right request")
}

/// One packet that a client may send.
#[derive(Clone, Copy, Debug)]
struct Shot {
    family: Family,
    policy: Policy,
    service: u16,
    /// TCP, UDP or an echo.
    protocol: u8,
    port: u16,
    sport: u16,
}

fn shots() -> impl Strategy<Value = Shot> {
    let policies = [Policy::Balanced, Policy::Closest, Policy::Sticky];
    (
        prop::bool::ANY,
        prop::sample::select(policies.to_vec()),
        5..8u16,
        0..3u8,
        prop::sample::select(vec![PORT, PORT, PORT, 81]),
        1..u16::MAX,
    )
        .prop_map(|(is_v4, policy, service, protocol, port, sport)| Shot {
            family: if is_v4 { Family::V4 } else { Family::V6 },
            policy,
            service,
            protocol,
            port,
            sport,
        })
}

impl Shot {
    fn to(&self) -> IpAddr {
        vip_address(self.family, self.policy, self.service)
    }

    fn packet(&self) -> Packet {
        let from = endpoint_address(self.family, NODE, CLIENT);
        match self.protocol {
            0 => Packet::tcp((from, self.sport), (self.to(), self.port), SYN, 7, 0),
            1 => Packet::udp((from, self.sport), (self.to(), self.port), b"?"),
            _ => Packet::echo(from, self.to(), self.sport),
        }
    }

    fn request(&self) -> TraceRequest {
        TraceRequest {
            from: "client".into(),
            to: self.to(),
            port: (self.protocol < 2).then_some(self.port),
            protocol: ["tcp", "udp", "icmp"][usize::from(self.protocol)].into(),
            sport: Some(self.sport),
            probe: false,
        }
    }
}

/// What the program did: the reason, or the receiving endpoint (0 is the tunnel) and the port there.
fn did(stage: &mut Stage, shot: &Shot) -> Result<(u32, IpAddr, u16), String> {
    let before: BTreeMap<_, _> = stage.node.counts().into_iter().collect();
    let packet = shot.packet();
    let outcome = stage.send(CLIENT, &packet);
    let counts = stage.node.counts().into_iter();
    if let Some((reason, _)) = counts
        .into_iter()
        .find(|(name, count)| before.get(name) != Some(count))
    {
        return Err(reason.to_owned());
    }
    assert_eq!(outcome.action, REDIRECTED);
    let seen = Packet::parse(&outcome.bytes[14..]).expect("a right packet");
    Ok((receiver(&outcome.bytes), seen.dst, seen.dport))
}

/// What a trace says, in the same words.
fn says(trace: &Trace) -> Result<(u32, IpAddr, u16), String> {
    let backend = match &trace.outcome {
        Outcome::Refused { reason, .. } => return Err(reason.clone()),
        Outcome::Opens { backend, .. } => backend,
        // The shots' SYNs repeat their sequence number: they are of the flow that is there.
        Outcome::Existing { backend, .. } => backend,
        Outcome::Depends { .. } => panic!("the port was given: {trace}"),
    };
    let endpoint = match backend.way {
        Way::Local { endpoint } => endpoint,
        Way::Tunnel { .. } => 0,
        Way::Nowhere => panic!("{trace}"),
    };
    Ok((endpoint, backend.address.ip(), backend.address.port()))
}

fn stage(slots: &[Vec<usize>]) -> Stage {
    let mut stage = Stage::default();
    for (service, slots) in (5..7).zip(slots) {
        for policy in [Policy::Balanced, Policy::Closest, Policy::Sticky] {
            let backends: Vec<u32> = slots.iter().map(|&slot| BACKENDS[slot]).collect();
            stage.service(policy, service, &backends);
        }
    }
    stage
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    #[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
    fn a_trace_names_the_backend_that_the_program_picks(
        slots in prop::collection::vec(prop::collection::vec(0..BACKENDS.len(), 0..9), 2),
        gone in prop::collection::vec((0..BACKENDS.len(), prop::bool::ANY), 0..3),
        shots in prop::collection::vec(shots(), 300),
    ) {
        let mut stage = stage(&slots);
        for shot in &shots[..100] {
            let said = says(&ask(&mut stage, &shot.request()));
            prop_assert_eq!(said, did(&mut stage, shot), "{:?}", shot);
        }
        // Some die and some drain, under the flows that are there.
        for (number, drains) in gone {
            let index = BACKENDS[number];
            let mut backend: Backend = stage.node.element::<48, _>("BACKENDS", index).expect("it is there");
            backend.flags = if drains { BACKEND_DRAINING } else { 0 };
            stage.node.backend(index, &backend);
        }
        for shot in &shots {
            let said = says(&ask(&mut stage, &shot.request()));
            prop_assert_eq!(said, did(&mut stage, shot), "{:?}", shot);
        }
    }
}
