//! From the pieces of a table to the entries of the maps.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ebpf_common::layout::{
    self, Addr, BACKEND_DRAINING, BACKEND_LIVE, ENDPOINT_PLAIN_REDIRECT, ENDPOINT_SPLICE,
    PROTO_ICMP, PROTO_ICMP6, PROTO_TCP, PROTO_UDP, VIP_FOLLOW, VIP_ITSELF_PORT, VipKey,
};
use netmanager_api::table::{self, BackendState, Protocol, Table};

use crate::policy::{self, Candidate, Chosen, Sight, View, Wanted};

/// What the desired state is made of.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// The node's table.
    pub table: &'a Arc<Table>,
    /// The node's own endpoint.
    pub node: &'a NodeEndpoint,
    /// The attached pods.
    pub pods: &'a [PodEndpoint],
    /// How this node sees its peers.
    pub sight: &'a Sight,
    /// The tunnel device, while there is one.
    pub tunnel: Option<TunnelDevice>,
    /// How many TCP connections one pod may have, and half as many UDP flows; 0 is no limit.
    pub quota: u32,
}

/// The node endpoint as it stands on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeEndpoint {
    /// The link on which its packets arrive, the far end of the pair.
    pub ifindex: u32,
    /// MAC address of the end that holds the addresses.
    pub mac: [u8; 6],
    /// MAC address of the end at `ifindex`.
    pub host_mac: [u8; 6],
    /// Its IPv6 address.
    pub addr6: Ipv6Addr,
    /// Its IPv4 address.
    pub addr4: Option<Ipv4Addr>,
}

/// An attached pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodEndpoint {
    /// The endpoint's number on this node.
    pub number: u32,
    /// The host-side link.
    pub ifindex: u32,
    /// The pod's end's MAC address.
    pub mac: [u8; 6],
    /// The host-side link's MAC address.
    pub host_mac: [u8; 6],
    /// Its IPv6 address.
    pub addr6: Ipv6Addr,
    /// Its IPv4 address.
    pub addr4: Option<Ipv4Addr>,
    /// The service that it is an instance of, if any.
    pub service: Option<String>,
}

/// The tunnel device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TunnelDevice {
    /// Its index.
    pub ifindex: u32,
    /// The largest inner packet it takes, bytes.
    pub mtu: u32,
}

pub(super) fn addr(address: Ipv6Addr) -> Addr {
    Addr::from_v6(address.to_bits())
}

fn addr_v4(address: Option<Ipv4Addr>) -> Addr {
    address.map_or_else(Addr::default, |address| Addr::from_v4(address.to_bits()))
}

/// What the mesh and this node are.
pub(super) fn config(inputs: &Inputs<'_>) -> layout::Config {
    let mesh = &inputs.table.mesh;
    layout::Config {
        seed: mesh.seed,
        mesh6: addr(mesh.prefix6.network()),
        mesh4: addr_v4(mesh.prefix4.map(|prefix| prefix.network())),
        node6: addr(inputs.node.addr6),
        node4: addr_v4(inputs.node.addr4),
        mesh4_len: mesh
            .prefix4
            .map_or(0, |prefix| u32::from(prefix.prefix_len())),
        node: inputs.table.node.number,
        tunnel_ifindex: inputs.tunnel.map_or(0, |tunnel| tunnel.ifindex),
        tunnel_mtu: inputs.tunnel.map_or(0, |tunnel| tunnel.mtu),
        flags: 0,
        hold_until_s: 0,
    }
}

/// The node's own endpoint, then the pods'.
pub(super) fn endpoints(inputs: &Inputs<'_>) -> impl Iterator<Item = layout::Endpoint> {
    let node = inputs.node;
    let own = layout::Endpoint {
        addr6: addr(node.addr6),
        addr4: addr_v4(node.addr4),
        number: ebpf_common::addr::NODE_ENDPOINT,
        ifindex: node.ifindex,
        flags: ENDPOINT_PLAIN_REDIRECT,
        quota: 0,
        mac: node.mac,
        host_mac: node.host_mac,
        pad: 0,
    };
    let asks_splicing = move |pod: &PodEndpoint| {
        let service = pod.service.as_ref();
        service.is_some_and(|service| inputs.table.spliced.contains(service))
    };
    let pods = inputs.pods.iter().map(move |pod| layout::Endpoint {
        addr6: addr(pod.addr6),
        addr4: addr_v4(pod.addr4),
        number: pod.number,
        ifindex: pod.ifindex,
        flags: if asks_splicing(pod) {
            ENDPOINT_SPLICE
        } else {
            0
        },
        quota: inputs.quota,
        mac: pod.mac,
        host_mac: pod.host_mac,
        pad: 0,
    });
    std::iter::once(own).chain(pods)
}

/// A backend as the kernel has it, but for its generation; `None` where it takes no traffic yet.
pub(super) fn backend(backend: &table::Backend) -> Option<layout::Backend> {
    let flags = match backend.state {
        BackendState::Ready => BACKEND_LIVE,
        BackendState::Draining => BACKEND_DRAINING,
        BackendState::Probing => return None,
    };
    Some(layout::Backend {
        addr6: addr(backend.addr6),
        addr4: addr_v4(backend.addr4),
        node: backend.node,
        generation: 0,
        flags,
        pad: 0,
    })
}

/// The carbon intensity of each node's power, where the table says it.
pub(super) fn carbon(table: &Table) -> BTreeMap<u32, u32> {
    let own = (table.node.number, table.node.carbon_g_kwh);
    let peers = table.peers.iter();
    peers
        .map(|peer| (peer.number, peer.carbon_g_kwh))
        .chain([own])
        .filter_map(|(number, carbon)| Some((number, carbon?)))
        .collect()
}

/// The addresses of a VIP, each with the backend indexes of its run. `chosen` is what the policies remember.
pub(super) fn families(
    vip: &table::Vip,
    candidates: &[(Candidate, bool)],
    inputs: &Inputs<'_>,
    chosen: &mut Chosen,
) -> Vec<(Addr, Vec<u32>)> {
    let wanted = Wanted {
        policy: vip.policy.0,
        instance: vip.instance,
    };
    let view = View {
        here: inputs.table.node.number,
        sight: inputs.sight,
    };
    let slots = |choose: &dyn Fn(bool) -> bool, chosen: &mut Chosen| {
        let candidates: Vec<Candidate> = candidates
            .iter()
            .filter(|(_, has4)| choose(*has4))
            .map(|(candidate, _)| *candidate)
            .collect();
        policy::slots(wanted, &candidates, view, chosen)
    };
    let slots6 = slots(&|_| true, chosen);
    let Some(address) = vip.addr4 else {
        return vec![(addr(vip.addr6), slots6)];
    };
    let slots4 = if candidates.iter().all(|(_, has4)| *has4) {
        slots6.clone()
    } else {
        // IPv4 follows what IPv6 chose and changes nothing of it.
        slots(&|has4| has4, &mut chosen.clone())
    };
    vec![
        (addr(vip.addr6), slots6),
        (Addr::from_v4(address.to_bits()), slots4),
    ]
}

/// The entries of one VIP address: itself, for echoes and refusals, and each declared port.
pub(super) fn vip_entries(
    address: Addr,
    itself: layout::Vip,
    ports: &[table::Port],
) -> impl Iterator<Item = (VipKey, layout::Vip)> {
    let icmp = if address.is_v4() {
        PROTO_ICMP
    } else {
        PROTO_ICMP6
    };
    let own = (
        VipKey {
            addr: address,
            port_be: VIP_ITSELF_PORT,
            proto: icmp,
            pad: 0,
        },
        itself,
    );
    let declared = ports.iter().map(move |port| {
        let proto = match port.protocol {
            Protocol::Tcp => PROTO_TCP,
            Protocol::Udp => PROTO_UDP,
        };
        let key = VipKey {
            addr: address,
            port_be: port.port.to_be(),
            proto,
            pad: 0,
        };
        (
            key,
            layout::Vip {
                target_port_be: port.target_port.to_be(),
                flags: if port.follow && port.protocol == Protocol::Udp {
                    VIP_FOLLOW
                } else {
                    0
                },
                ..itself
            },
        )
    });
    std::iter::once(own).chain(declared)
}
