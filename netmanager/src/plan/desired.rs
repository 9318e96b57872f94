//! From a table to the content of the maps.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use ebpf_common::layout::{
    self, Addr, BACKEND_DRAINING, BACKEND_LIVE, ENDPOINT_PLAIN_REDIRECT, PROTO_ICMP, PROTO_ICMP6,
    PROTO_TCP, PROTO_UDP, VIP_ITSELF_PORT, VipKey,
};
use netmanager_api::table::{self, BackendState, Protocol, Table};

use super::{KernelState, Memory, Shortage};
use crate::policy::{self, Candidate, Sight, Wanted};

/// What the desired state is made of.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// The node's table.
    pub table: &'a Table,
    /// The node's own endpoint.
    pub node: &'a NodeEndpoint,
    /// The attached pods.
    pub pods: &'a [PodEndpoint],
    /// How this node sees its peers.
    pub sight: &'a Sight,
    /// The tunnel device, while there is one.
    pub tunnel: Option<TunnelDevice>,
    /// How many established flows one pod may have; 0 is no limit.
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
}

/// The tunnel device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TunnelDevice {
    /// Its index.
    pub ifindex: u32,
    /// The largest inner packet it takes, bytes.
    pub mtu: u32,
}

/// The content of the maps for `inputs`. `memory` gives and takes back indexes and runs.
///
/// # Errors
/// When a map is too small for the table; nothing should be written then.
pub fn desired(
    inputs: &Inputs<'_>,
    memory: &mut Memory,
    now: Duration,
) -> Result<KernelState, Shortage> {
    let mut state = KernelState {
        config: Some(config(inputs)),
        ..KernelState::default()
    };
    add_endpoints(inputs, &mut state);
    add_vips(inputs, memory, &mut state, now)?;
    memory.write_into(&mut state);
    Ok(state)
}

fn addr(address: Ipv6Addr) -> Addr {
    Addr::from_v6(address.to_bits())
}

fn addr_v4(address: Option<Ipv4Addr>) -> Addr {
    address.map_or_else(Addr::default, |address| Addr::from_v4(address.to_bits()))
}

fn config(inputs: &Inputs<'_>) -> layout::Config {
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
        pad: 0,
    }
}

fn add_endpoints(inputs: &Inputs<'_>, state: &mut KernelState) {
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
    let pods = inputs.pods.iter().map(|pod| layout::Endpoint {
        addr6: addr(pod.addr6),
        addr4: addr_v4(pod.addr4),
        number: pod.number,
        ifindex: pod.ifindex,
        flags: 0,
        quota: inputs.quota,
        mac: pod.mac,
        host_mac: pod.host_mac,
        pad: 0,
    });
    for endpoint in std::iter::once(own).chain(pods) {
        state.endpoints.insert(endpoint.ifindex, endpoint);
        state.local.insert(endpoint.addr6, endpoint);
        if endpoint.addr4 != Addr::default() {
            state.local.insert(endpoint.addr4, endpoint);
        }
    }
}

fn add_vips(
    inputs: &Inputs<'_>,
    memory: &mut Memory,
    state: &mut KernelState,
    now: Duration,
) -> Result<(), Shortage> {
    let mut live = BTreeSet::new();
    let mut used = BTreeSet::new();
    let mut vips = BTreeSet::new();
    let mut near = std::mem::take(&mut memory.near);
    near.retain(|number, _| {
        inputs
            .table
            .services
            .iter()
            .any(|service| service.number == *number)
    });
    for service in &inputs.table.services {
        let candidates = hold_backends(service, memory, &mut live, now)?;
        let near = near.entry(service.number).or_default();
        for vip in &service.vips {
            let wanted = Wanted {
                policy: vip.policy.0,
                instance: vip.instance,
            };
            let vip6 = addr(vip.addr6);
            vips.insert(vip6);
            let counter = memory.counters.hold(vip6);
            let here = inputs.table.node.number;
            let v6: Vec<Candidate> = candidates.iter().map(|(candidate, _)| *candidate).collect();
            let slots6 = policy::slots(wanted, &v6, here, inputs.sight, near);
            let families = [
                Some((vip6, slots6)),
                vip.addr4.map(|address| {
                    let v4: Vec<Candidate> = candidates
                        .iter()
                        .filter(|(_, has4)| *has4)
                        .map(|(c, _)| *c)
                        .collect();
                    // IPv4 follows the band that IPv6 chose; its own must not widen or narrow it.
                    let slots4 = policy::slots(wanted, &v4, here, inputs.sight, &mut near.clone());
                    (Addr::from_v4(address.to_bits()), slots4)
                }),
            ];
            for (address, slots) in families.into_iter().flatten() {
                let slot_base = memory.run(&slots, now)?;
                if !slots.is_empty() {
                    used.insert(slot_base);
                }
                let entry = layout::Vip {
                    slot_base,
                    slot_count: slots.len() as u32,
                    service: service.number,
                    target_port_be: 0,
                    policy: wanted.policy.code(),
                    flags: 0,
                    counter,
                };
                state
                    .vips
                    .extend(vip_entries(address, entry, &service.ports));
            }
        }
    }
    memory.near = near;
    memory.counters.rest_all_but(&vips, now);
    memory.bury_all_but(&live, now);
    memory.rest_all_but(&used, now);
    Ok(())
}

/// Gives every backend of a service its index; those that new flows may pick are returned, with whether they
/// have an IPv4 address.
fn hold_backends(
    service: &table::Service,
    memory: &mut Memory,
    live: &mut BTreeSet<u32>,
    now: Duration,
) -> Result<Vec<(Candidate, bool)>, Shortage> {
    let mut candidates = BTreeMap::new();
    for backend in &service.backends {
        let flags = match backend.state {
            BackendState::Ready => BACKEND_LIVE,
            BackendState::Draining => BACKEND_DRAINING,
            BackendState::Probing => continue,
        };
        let entry = layout::Backend {
            addr6: addr(backend.addr6),
            addr4: addr_v4(backend.addr4),
            node: backend.node,
            generation: 0,
            flags,
            pad: 0,
        };
        let index = memory.hold(entry, now)?;
        live.insert(index);
        if backend.state == BackendState::Ready {
            let candidate = Candidate {
                index,
                identity: backend.addr6.to_bits(),
                instance: backend.instance,
                epoch: backend.epoch,
                node: backend.node,
            };
            candidates.insert(candidate.identity, (candidate, backend.addr4.is_some()));
        }
    }
    Ok(candidates.into_values().collect())
}

/// The entries of one VIP address: itself, for echoes and refusals, and each declared port.
fn vip_entries(
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
                ..itself
            },
        )
    });
    std::iter::once(own).chain(declared)
}
