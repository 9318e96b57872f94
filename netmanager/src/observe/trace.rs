//! What the programs would do with a packet of an endpoint to a VIP, told without sending one.
//!
//! The maps are read as they stand and walked in the programs' order (`ebpf/src/pod.rs`, `ebpf/src/vip.rs`),
//! with the same code where it is pure: the address codec, the hash, the pick. What depends on how much of
//! something is used at the moment (a full flow table, a quota, a free source port) is not foreseen.

use std::{collections::BTreeMap, net::SocketAddr};

use ebpf_common::{
    addr::{Mesh4, Mesh6, Name4, Name6, Policy},
    layout::{
        self, Addr, BACKEND_LIVE, Config, Endpoint, FLOW_FIN_BACKEND, FLOW_FIN_CLIENT,
        FLOW_FORWARD, FLOW_RST, Flow, FlowKey, PATH_FLOOR, PROTO_ICMP, PROTO_ICMP6, PROTO_TCP,
        PROTO_UDP, VIP_FOLLOW, VIP_ITSELF_PORT, Vip, VipKey,
    },
    pick,
    reason::Reason,
};
use netmanager_api::observe::{Backend, Outcome, Trace, TraceRequest, Way};

use super::{Names, told::ip};

/// The maps as a trace needs them; `None` where there is no such element.
pub trait Maps {
    /// An entry of `VIPS`.
    fn vip(&self, key: &VipKey) -> Option<Vip>;
    /// An element of `SLOTS`.
    fn slot(&self, index: u32) -> Option<u32>;
    /// An element of `BACKENDS`.
    fn backend(&self, index: u32) -> Option<layout::Backend>;
    /// What `LOCAL` and `PEERS` know of an endpoint's address.
    fn place(&self, address: &Addr) -> Place;
    /// A flow's entry, in the table that counts.
    fn flow(&self, key: &FlowKey) -> Option<Flow>;
}

/// What is known of an endpoint's address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The number of the local endpoint that has it.
    pub endpoint: Option<u32>,
    /// What the path to its node carries, where that was measured to be less than the tunnel takes, bytes.
    pub path_mtu: Option<u32>,
}

/// Who asks, and in which mesh.
#[derive(Clone, Copy, Debug)]
pub struct Asker<'a> {
    /// What the mesh and this node are.
    pub config: &'a Config,
    /// The sender.
    pub endpoint: &'a Endpoint,
    /// The names on this node.
    pub names: &'a Names,
}

/// Says what would become of the packet.
///
/// # Errors
/// When the request contradicts itself; the message names the field, the value and the way out.
pub fn trace(maps: &impl Maps, asker: Asker<'_>, request: &TraceRequest) -> Result<Trace, String> {
    let question = Question::of(asker, request)?;
    let tracer = Tracer { maps, asker };
    let policy = policy_of(asker.config, &question.key.dst);
    let known = tracer.itself(&question.key.dst);
    let outcome = tracer
        .outcome(&question, policy)
        .unwrap_or_else(|reason| refused(reason, &question));
    Ok(Trace {
        node: asker.names.node.clone(),
        from: request.from.clone(),
        source: SocketAddr::new(ip(&question.key.src), request.sport.unwrap_or(0)),
        to: SocketAddr::new(request.to, u16::from_be(question.key.dport_be)),
        protocol: request.protocol.to_uppercase(),
        service: known
            .and_then(|vip| asker.names.vips.get(&vip.counter))
            .map(|vip| vip.service.to_string()),
        policy: match policy {
            Named::Vip(policy) => Some(policy.name().to_owned()),
            _ => None,
        },
        outcome,
    })
}

/// What a destination names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Named {
    Vip(Policy),
    Endpoint,
    Foreign,
}

/// The packet, checked.
struct Question {
    key: FlowKey,
    has_port: bool,
}

impl Question {
    fn of(asker: Asker<'_>, request: &TraceRequest) -> Result<Self, String> {
        let is_v4 = request.to.is_ipv4();
        let icmp = if is_v4 { PROTO_ICMP } else { PROTO_ICMP6 };
        let (proto, port) = match (request.protocol.as_str(), request.port) {
            ("tcp", Some(port)) => (PROTO_TCP, port),
            ("udp", Some(port)) => (PROTO_UDP, port),
            ("icmp", None) => (icmp, 0),
            ("icmp", Some(port)) => {
                return Err(format!("port {port}: ICMP has none; leave it out of --to"));
            }
            ("tcp" | "udp", None) => {
                let (protocol, to) = (&request.protocol, request.to);
                return Err(format!(
                    "no port for {protocol}: give one (--to {}), or --proto icmp",
                    SocketAddr::new(to, 80)
                ));
            }
            (other, _) => return Err(format!("protocol {other:?}: it is tcp, udp or icmp")),
        };
        let src = if is_v4 {
            asker.endpoint.addr4
        } else {
            asker.endpoint.addr6
        };
        if src == Addr::default() {
            let from = &request.from;
            let (has, other) = if is_v4 { (4, 6) } else { (6, 4) };
            return Err(format!(
                "{from} has no IPv{has} address: trace the VIP's IPv{other} address"
            ));
        }
        let dst = match request.to {
            std::net::IpAddr::V4(v4) => Addr::from_v4(v4.to_bits()),
            std::net::IpAddr::V6(v6) => Addr::from_v6(v6.to_bits()),
        };
        Ok(Self {
            key: FlowKey {
                src,
                dst,
                sport_be: request.sport.unwrap_or(0).to_be(),
                dport_be: port.to_be(),
                endpoint: asker.endpoint.number,
                proto,
                direction: FLOW_FORWARD,
                pad: 0,
            },
            has_port: request.sport.is_some(),
        })
    }
}

struct Tracer<'a, M> {
    maps: &'a M,
    asker: Asker<'a>,
}

impl<M: Maps> Tracer<'_, M> {
    fn outcome(&self, question: &Question, policy: Named) -> Result<Outcome, Reason> {
        let policy = match policy {
            Named::Foreign => return Err(Reason::NotMesh),
            Named::Endpoint => return Err(Reason::DirectEndpoint),
            Named::Vip(policy) => policy,
        };
        let key = &question.key;
        let flow = question
            .has_port
            .then(|| self.maps.flow(key))
            .flatten()
            .filter(|flow| !is_over(flow));
        let Some(flow) = flow else {
            return if question.has_port || policy == Policy::Sticky {
                self.anew(key, policy)
            } else {
                self.depends(key)
            };
        };
        let place = self.backend_of(&flow);
        if key.proto == PROTO_TCP {
            if place.is_none() {
                return self.anew(key, policy);
            }
        } else if place.is_none_or(|backend| backend.flags & BACKEND_LIVE == 0) {
            match self.follows(key).then(|| self.anew(key, policy)) {
                // Where there is nowhere else to go, a draining backend serves on.
                Some(Err(Reason::NoBackend)) if place.is_some() => {}
                Some(moved) => return moved,
                // A datagram's flow is ended first; the next datagram opens another.
                None if place.is_none() => return Err(Reason::BackendGone),
                None => {}
            }
        }
        let backend = self.backend(key, flow.backend, u16::from_be(flow.port_be), 1_000)?;
        let anew = (key.proto == PROTO_TCP)
            .then(|| self.opens(key, policy).ok())
            .flatten()
            .map(|(_, _, backend)| backend);
        Ok(Outcome::Existing { backend, anew })
    }

    /// A new flow.
    fn anew(&self, key: &FlowKey, policy: Policy) -> Result<Outcome, Reason> {
        let (slot, of, backend) = self.opens(key, policy)?;
        Ok(Outcome::Opens { slot, of, backend })
    }

    /// The slot that a new flow picks, of how many, and whom it names.
    fn opens(&self, key: &FlowKey, policy: Policy) -> Result<(u32, u32, Backend), Reason> {
        let vip = self.lookup(key)?;
        let choice = pick::choice(key, policy, self.asker.config.seed);
        let offset = pick::slot(choice, vip.slot_count).ok_or(Reason::NoBackend)?;
        let (slot, index) = self.from(offset, &vip, key)?;
        let port = u16::from_be(vip.target_port_be);
        Ok((slot, vip.slot_count, self.backend(key, index, port, 1_000)?))
    }

    fn depends(&self, key: &FlowKey) -> Result<Outcome, Reason> {
        let vip = self.lookup(key)?;
        let mut slots = BTreeMap::<u32, u64>::new();
        for offset in 0..vip.slot_count {
            if let Ok((_, index)) = self.from(offset, &vip, key) {
                *slots.entry(index).or_default() += 1;
            }
        }
        if slots.is_empty() {
            return Err(Reason::NoBackend);
        }
        let port = u16::from_be(vip.target_port_be);
        let mut backends = slots
            .into_iter()
            .map(|(index, count)| {
                let share = count * 1_000 / u64::from(vip.slot_count);
                self.backend(key, index, port, share as u32)
            })
            .collect::<Result<Vec<_>, _>>()?;
        backends.sort_by_key(|backend| (1_000 - backend.share, backend.index));
        Ok(Outcome::Depends { backends })
    }

    /// The first slot from `offset` on whose backend lives, and the backend's index.
    fn from(&self, offset: u32, vip: &Vip, key: &FlowKey) -> Result<(u32, u32), Reason> {
        pick::first_live(
            offset,
            vip,
            key.dst.is_v4(),
            |index| self.maps.slot(index),
            |index| self.maps.backend(index),
        )
    }

    /// The declared port, or why there is none.
    fn lookup(&self, key: &FlowKey) -> Result<Vip, Reason> {
        let declared = VipKey {
            addr: key.dst,
            port_be: key.dport_be,
            proto: key.proto,
            pad: 0,
        };
        match (self.maps.vip(&declared), self.itself(&key.dst)) {
            (Some(vip), _) => Ok(vip),
            (None, Some(_)) => Err(Reason::UndeclaredPort),
            (None, None) => Err(Reason::NotLinked),
        }
    }

    /// The VIP's own entry.
    fn itself(&self, address: &Addr) -> Option<Vip> {
        self.maps.vip(&VipKey {
            addr: *address,
            port_be: VIP_ITSELF_PORT,
            proto: if address.is_v4() {
                PROTO_ICMP
            } else {
                PROTO_ICMP6
            },
            pad: 0,
        })
    }

    /// The backend of a flow, if it is the one that was picked and not dead.
    fn backend_of(&self, flow: &Flow) -> Option<layout::Backend> {
        self.maps
            .backend(flow.backend)
            .filter(|backend| backend.generation == flow.generation && backend.flags != 0)
    }

    /// Whether a datagram's flow moves when its backend drains or dies.
    fn follows(&self, key: &FlowKey) -> bool {
        self.lookup(key)
            .is_ok_and(|vip| vip.flags & VIP_FOLLOW != 0)
    }

    fn backend(&self, key: &FlowKey, index: u32, port: u16, share: u32) -> Result<Backend, Reason> {
        let entry = self.maps.backend(index).ok_or(Reason::Internal)?;
        let address = if key.dst.is_v4() {
            entry.addr4
        } else {
            entry.addr6
        };
        let (config, names) = (self.asker.config, self.asker.names);
        let place = self.maps.place(&address);
        let path = place.path_mtu.filter(|mtu| *mtu >= PATH_FLOOR);
        let way = match place.endpoint {
            Some(endpoint) => Way::Local { endpoint },
            None if entry.node == config.node || config.tunnel_ifindex == 0 => Way::Nowhere,
            None => Way::Tunnel {
                mtu: config.tunnel_mtu.min(path.unwrap_or(u32::MAX)),
            },
        };
        let node = if entry.node == config.node {
            names.node.clone()
        } else {
            let peer = names.peers.get(&entry.node);
            peer.cloned()
                .unwrap_or_else(|| format!("node {}", entry.node))
        };
        Ok(Backend {
            index,
            address: SocketAddr::new(ip(&address), port),
            instance: names.backends.get(&index).map(|backend| backend.instance),
            node,
            way,
            share,
        })
    }
}

fn policy_of(config: &Config, address: &Addr) -> Named {
    if address.is_v4() {
        let mesh = Mesh4::new(u32::from_be(config.mesh4.v4_be()), config.mesh4_len as u8);
        match mesh.and_then(|mesh| mesh.decode(u32::from_be(address.v4_be()))) {
            Some(Name4::Vip { policy, .. }) => Named::Vip(policy),
            Some(Name4::Endpoint { .. }) => Named::Endpoint,
            None => Named::Foreign,
        }
    } else {
        let mesh = Mesh6::new(config.mesh6.to_bits());
        match mesh.and_then(|mesh| mesh.decode(address.to_bits())) {
            Some(Name6::Vip { policy, .. }) => Named::Vip(policy),
            Some(Name6::Endpoint { .. }) => Named::Endpoint,
            None => Named::Foreign,
        }
    }
}

/// Whether both directions have ended, or the connection was reset.
fn is_over(flow: &Flow) -> bool {
    const BOTH: u32 = FLOW_FIN_CLIENT | FLOW_FIN_BACKEND;
    flow.flags & FLOW_RST != 0 || flow.flags & BOTH == BOTH
}

fn refused(reason: Reason, question: &Question) -> Outcome {
    let why = match reason {
        Reason::NotLinked => {
            "no service that an instance on this node may call has this address: link the services, or grant access"
        }
        Reason::UndeclaredPort => "the service does not declare this port and protocol",
        Reason::NoBackend => "the service has no live backend of this address family",
        Reason::NotMesh => "the address is outside the mesh",
        Reason::DirectEndpoint => "it is an endpoint's address: the way to a service is its VIP",
        Reason::BackendGone => {
            "the flow's backend is gone: the flow is ended, the next packet opens another"
        }
        _ => "the maps contradict each other",
    };
    let answer = match (reason, question.key.proto) {
        (Reason::NotMesh | Reason::Internal, _) => "nothing",
        (_, PROTO_TCP) => "a TCP reset",
        (_, PROTO_UDP) => "ICMP port unreachable",
        _ => "ICMP host unreachable",
    };
    Outcome::Refused {
        reason: reason.name().to_owned(),
        why: why.to_owned(),
        answer: answer.to_owned(),
    }
}

#[cfg(test)]
mod tests;
