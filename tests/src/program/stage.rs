//! One node of a small mesh, with pods, backends and services, for the programs to run on.
//!
//! ```text
//!  node 3 (this one)                             node 7
//!    node endpoint 1   client 2   backends 3, 4    backend 2
//! ```
//!
//! Backend index = 10 + number of the local endpoint; the remote one is [`REMOTE_BACKEND`].

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ebpf_common::{
    addr::{Mesh4, Mesh6, NODE_ENDPOINT, Name4, Name6, Policy},
    layout::{
        BACKEND_LIVE, Backend, Config, Endpoint, PROTO_ICMP, PROTO_ICMP6, PROTO_TCP, PROTO_UDP,
        VIP_ITSELF_PORT, Vip, VipKey,
    },
};

use super::{Node, Outcome, REDIRECTED, Sizes, addr, endpoint, packet::Packet};

/// This node's number.
pub const NODE: u32 = 3;
/// The number of the other node.
pub const REMOTE_NODE: u32 = 7;
/// The client pod's endpoint number.
pub const CLIENT: u32 = 2;
/// The index of the backend on the other node.
pub const REMOTE_BACKEND: u32 = 20;
/// The largest packet that the tunnel takes.
pub const TUNNEL_MTU: u32 = 1420;
/// The port that every service of the stage declares.
pub const PORT: u16 = 80;
/// The port that its backends listen on.
pub const TARGET: u16 = 8080;

/// The address families, to run a test in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];
}

/// The mesh's IPv6 space.
#[must_use]
pub fn mesh6() -> Mesh6 {
    Mesh6::new(0xfd12_3456_789a << 80).expect("a unique local /48")
}

/// The mesh's IPv4 space.
#[must_use]
pub fn mesh4() -> Mesh4 {
    Mesh4::new(u32::from(Ipv4Addr::new(10, 16, 0, 0)), 12).expect("a /12")
}

/// The address of an endpoint.
#[must_use]
pub fn endpoint_address(family: Family, node: u32, endpoint: u32) -> IpAddr {
    match family {
        Family::V4 => {
            let offset = node * 32 + endpoint;
            let bits = mesh4().encode(Name4::Endpoint { offset });
            IpAddr::V4(bits.expect("an endpoint number below 32").into())
        }
        Family::V6 => {
            let name = Name6::Endpoint { node, endpoint };
            IpAddr::V6(Ipv6Addr::from(mesh6().encode(name)))
        }
    }
}

/// The address of a VIP.
#[must_use]
pub fn vip_address(family: Family, policy: Policy, service: u16) -> IpAddr {
    match family {
        Family::V4 => {
            let number = u32::from(service);
            let bits = mesh4().encode(Name4::Vip { policy, number });
            IpAddr::V4(bits.expect("sixteen bits fit").into())
        }
        Family::V6 => {
            let name = Name6::Vip {
                policy,
                service: u32::from(service),
                instance: 0,
            };
            IpAddr::V6(Ipv6Addr::from(mesh6().encode(name)))
        }
    }
}

/// The stage.
pub struct Stage {
    /// The programs and their maps.
    pub node: Node,
    next_slot: u32,
    quotas: BTreeMap<u32, u32>,
}

impl Default for Stage {
    fn default() -> Self {
        Self::new(Sizes::default())
    }
}

impl Stage {
    /// A node with its endpoints and backends, and no service.
    #[must_use]
    pub fn new(sizes: Sizes) -> Self {
        let mut node = Node::load(sizes);
        node.configure(&Config {
            seed: 0x5eed,
            mesh6: addr(IpAddr::V6(mesh6().base().into())),
            mesh4: addr(IpAddr::V4(mesh4().base().into())),
            node6: addr(endpoint_address(Family::V6, NODE, NODE_ENDPOINT)),
            node4: addr(endpoint_address(Family::V4, NODE, NODE_ENDPOINT)),
            mesh4_len: 12,
            node: NODE,
            tunnel_ifindex: 99,
            tunnel_mtu: TUNNEL_MTU,
            flags: 0,
            hold_until_s: 0,
        });
        for number in [NODE_ENDPOINT, CLIENT, 3, 4] {
            node.attach(&Self::endpoint(number));
            node.backend(10 + number, &Self::local_backend(number));
        }
        node.backend(REMOTE_BACKEND, &Self::remote_backend());
        Self {
            node,
            next_slot: 0,
            quotas: BTreeMap::new(),
        }
    }

    /// A local endpoint.
    #[must_use]
    pub fn endpoint(number: u32) -> Endpoint {
        endpoint(
            number,
            endpoint_address(Family::V4, NODE, number),
            endpoint_address(Family::V6, NODE, number),
        )
    }

    /// The backend that a local endpoint is, as the stage sets it up.
    #[must_use]
    pub fn local_backend(number: u32) -> Backend {
        backend_of(NODE, number)
    }

    /// The backend on the other node, as the stage sets it up.
    #[must_use]
    pub fn remote_backend() -> Backend {
        backend_of(REMOTE_NODE, 2)
    }

    /// Declares a service's VIP of one policy: [`PORT`] to [`TARGET`] by TCP and UDP, and echo. It is counted under
    /// the service's number.
    pub fn service(&mut self, policy: Policy, service: u16, backends: &[u32]) {
        self.service_with(policy, service, backends, 0);
    }

    /// The same, with `VIP_...` flags.
    pub fn service_with(&mut self, policy: Policy, service: u16, backends: &[u32], flags: u8) {
        let slot_base = self.next_slot;
        self.next_slot += u32::try_from(backends.len()).expect("a few slots");
        self.node.slots(slot_base, backends);
        let slot_count = u32::try_from(backends.len()).expect("a few slots");
        for family in Family::BOTH {
            let icmp = match family {
                Family::V4 => PROTO_ICMP,
                Family::V6 => PROTO_ICMP6,
            };
            for (proto, port, target) in [
                (PROTO_TCP, PORT, TARGET),
                (PROTO_UDP, PORT, TARGET),
                (icmp, VIP_ITSELF_PORT, 0),
            ] {
                let key = VipKey {
                    addr: addr(vip_address(family, policy, service)),
                    port_be: port.to_be(),
                    proto,
                    pad: 0,
                };
                let vip = Vip {
                    slot_base,
                    slot_count,
                    service: u32::from(service),
                    target_port_be: target.to_be(),
                    policy: policy.code(),
                    flags,
                    counter: u32::from(service),
                };
                self.node.declare(&key, &vip);
            }
        }
    }

    /// Gives a local endpoint a quota of flows.
    pub fn limit(&mut self, number: u32, quota: u32) {
        self.quotas.insert(number, quota);
        let endpoint = self.limited(number);
        self.node.attach(&endpoint);
    }

    /// A local endpoint with the quota that it was given.
    #[must_use]
    pub fn limited(&self, number: u32) -> Endpoint {
        Endpoint {
            quota: self.quotas.get(&number).copied().unwrap_or(0),
            ..Self::endpoint(number)
        }
    }

    /// Sends a packet of a local endpoint.
    pub fn send(&mut self, from: u32, packet: &Packet) -> Outcome {
        self.node.from_pod(&self.limited(from), &packet.frame())
    }

    /// Sends a packet of a local endpoint, and reads what is delivered and to which endpoint; panics if it is not.
    /// The hop that the program took off is put back, so that what comes out compares with what went in.
    pub fn deliver(&mut self, from: u32, packet: &Packet) -> (u32, Packet) {
        let outcome = self.send(from, packet);
        let counts = self.node.counts();
        assert_eq!(outcome.action, REDIRECTED, "{packet:?}: {counts:?}");
        let delivered = Packet::parse(&outcome.bytes[14..])
            .unwrap_or_else(|error| panic!("{packet:?} became a bad packet: {error}"));
        (receiver(&outcome.bytes), delivered.hop_back(packet))
    }

    /// The same for a packet that comes out of the tunnel.
    pub fn arrive(&mut self, packet: &Packet) -> (u32, Packet) {
        let outcome = self.node.from_tunnel(&packet.bytes());
        let counts = self.node.counts();
        assert_eq!(outcome.action, REDIRECTED, "{packet:?}: {counts:?}");
        let kind = u16::from_be_bytes([outcome.bytes[12], outcome.bytes[13]]);
        assert_eq!(kind, if packet.src.is_ipv4() { 0x0800 } else { 0x86dd });
        let delivered = Packet::parse(&outcome.bytes[14..])
            .unwrap_or_else(|error| panic!("{packet:?} became a bad packet: {error}"));
        (receiver(&outcome.bytes), delivered.hop_back(packet))
    }
}

/// The number of the endpoint whose MAC address a frame carries; 0 where it still carries the sender's gateway's.
#[must_use]
pub fn receiver(frame: &[u8]) -> u32 {
    match frame[..6] {
        [2, 0, 0, 1, high, low] => u32::from(u16::from_be_bytes([high, low])),
        _ => 0,
    }
}

fn backend_of(node: u32, endpoint: u32) -> Backend {
    Backend {
        addr6: addr(endpoint_address(Family::V6, node, endpoint)),
        addr4: addr(endpoint_address(Family::V4, node, endpoint)),
        node,
        generation: 1,
        flags: BACKEND_LIVE,
        pad: 0,
    }
}
