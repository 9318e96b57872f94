//! The node endpoint and its routes, by rtnetlink.
//!
//! ```text
//!  host process --> weft0 (the addresses) ==veth== weft1 --TCX ingress--> the programs
//!                     ^ plain redirect into weft1 <-----------------------'
//!
//!  rules: iif lo to MESH lookup TABLE    table TABLE: MESH via GATEWAY dev weft0 src OWN metric 10
//!         from MESH to MESH blackhole                 unreachable MESH           metric 1000
//!         to MESH lookup TABLE
//! ```
//!
//! Host processes, host-network pods and probes reach VIPs through it. The gateway is a permanent neighbour
//! that nobody has to answer for. The guards are routes without a device, so that they stay when the pair is
//! set down or removed and no packet of the mesh ever leaves by a default route. Only the host's own processes
//! may say that they are the node: a packet that the host would forward, of an unattached pod or from the underlay,
//! has no source in the mesh. Everything is idempotent:
//! [`Links::ensure_node`] adds what is missing and leaves what is right alone.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures::TryStreamExt;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_route::{
    address::{AddressAttribute, AddressHeaderFlags},
    link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute},
    route::{RouteMessage, RouteProtocol, RouteType},
};
use rtnetlink::{LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::{EEXIST, Link, Links, LinksError, errno, failed, table_of};
use crate::plan::NodeEndpoint;

/// Our routing table and our routes' protocol number: "WF", and a number that nobody registered in
/// `/etc/iproute2/rt_protos`.
pub(super) const TABLE: u32 = 0x5746;
pub(super) const PROTOCOL: RouteProtocol = RouteProtocol::Other(157);
const METRIC: u32 = 10;
const GUARD_METRIC: u32 = 1_000;
/// Next hops that exist as permanent neighbours only (link-local, RFC 3927 and RFC 4291).
const GATEWAY4: Ipv4Addr = Ipv4Addr::new(169, 254, 87, 70);
const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x5746);
/// What the node endpoint should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeWish {
    /// The end with the addresses.
    pub name: String,
    /// The end with the program.
    pub peer: String,
    /// Largest packet, bytes.
    pub mtu: u32,
    /// The mesh's IPv6 prefix.
    pub mesh6: Ipv6Net,
    /// Its IPv4 prefix.
    pub mesh4: Option<Ipv4Net>,
    /// The endpoint's IPv6 address.
    pub addr6: Ipv6Addr,
    /// Its IPv4 address.
    pub addr4: Option<Ipv4Addr>,
}

impl NodeWish {
    /// The mesh's prefixes.
    #[must_use]
    pub fn prefixes(&self) -> Vec<IpNet> {
        std::iter::once(IpNet::V6(self.mesh6))
            .chain(self.mesh4.map(IpNet::V4))
            .collect()
    }
}

impl Links {
    /// Makes the node endpoint, its routes, rules and guards, or what is missing of them.
    ///
    /// # Errors
    /// When the kernel refuses; what was made so far stays, and calling again goes on.
    pub async fn ensure_node(&self, wish: &NodeWish) -> Result<NodeEndpoint, LinksError> {
        self.ensure_guards(&wish.prefixes()).await?;
        let (own, peer) = self.ensure_pair(wish).await?;
        loosen_reverse_path(&wish.name);
        self.ensure_addresses(own.ifindex, wish).await?;
        self.ensure_routes(own.ifindex, peer.mac, wish).await?;
        Ok(NodeEndpoint {
            ifindex: peer.ifindex,
            mac: own.mac,
            host_mac: peer.mac,
            addr6: wish.addr6,
            addr4: wish.addr4,
        })
    }

    async fn ensure_pair(&self, wish: &NodeWish) -> Result<(Link, Link), LinksError> {
        if self.by_name(&wish.name).await?.is_none() {
            let result = self
                .handle
                .link()
                .add(LinkVeth::new(&wish.name, &wish.peer).mtu(wish.mtu).build())
                .execute()
                .await;
            ignore_existing(result)
                .map_err(|source| failed(format!("make the veth pair {}", wish.name), source))?;
        }
        let mut ends = Vec::with_capacity(2);
        for name in [&wish.name, &wish.peer] {
            let gone = || LinksError::Gone(name.clone());
            let link = self.by_name(name).await?.ok_or_else(gone)?;
            if !link.is_up || link.mtu != wish.mtu {
                let change = LinkUnspec::new_with_index(link.ifindex)
                    .mtu(wish.mtu)
                    // No link-local address of its own, so no router solicitations into the programs.
                    .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(
                        vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)],
                    )]))
                    .up()
                    .build();
                self.handle
                    .link()
                    .set(change)
                    .execute()
                    .await
                    .map_err(|source| failed(format!("set {name} up"), source))?;
            }
            ends.push(link);
        }
        let peer = ends.pop().expect("two ends were pushed");
        let own = ends.pop().expect("two ends were pushed");
        Ok((own, peer))
    }

    async fn ensure_addresses(&self, ifindex: u32, wish: &NodeWish) -> Result<(), LinksError> {
        let present: Vec<_> = self
            .handle
            .address()
            .get()
            .set_link_index_filter(ifindex)
            .execute()
            .try_collect()
            .await
            .map_err(|source| failed(format!("list the addresses of {}", wish.name), source))?;
        let wanted: Vec<IpAddr> = std::iter::once(wish.addr6.into())
            .chain(wish.addr4.map(IpAddr::from))
            .collect();
        let mut found = Vec::new();
        for message in present {
            let address = message
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    AddressAttribute::Address(address) => Some(*address),
                    _ => None,
                });
            match address {
                Some(address) if wanted.contains(&address) => found.push(address),
                Some(IpAddr::V6(address)) if address.is_unicast_link_local() => {}
                _ => {
                    let result = self.handle.address().del(message).execute().await;
                    result.map_err(|source| {
                        failed(format!("remove an old address from {}", wish.name), source)
                    })?;
                }
            }
        }
        for address in wanted
            .into_iter()
            .filter(|address| !found.contains(address))
        {
            let length = if address.is_ipv4() { 32 } else { 128 };
            let mut request = self
                .handle
                .address()
                .add(ifindex, address, length)
                .replace();
            if address.is_ipv6() {
                let nodad = AddressHeaderFlags::Nodad;
                request.message_mut().header.flags |= nodad;
            }
            request
                .execute()
                .await
                .map_err(|source| failed(format!("give {address} to {}", wish.name), source))?;
        }
        Ok(())
    }

    async fn ensure_routes(
        &self,
        ifindex: u32,
        gateway_mac: [u8; 6],
        wish: &NodeWish,
    ) -> Result<(), LinksError> {
        let routes6 = RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(wish.mesh6.network(), wish.mesh6.prefix_len())
            .gateway(GATEWAY6)
            .pref_source(wish.addr6);
        let mut routes = vec![(IpAddr::from(GATEWAY6), ours(routes6, ifindex))];
        if let (Some(mesh4), Some(addr4)) = (wish.mesh4, wish.addr4) {
            let route4 = RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(mesh4.network(), mesh4.prefix_len())
                .gateway(GATEWAY4)
                .pref_source(addr4);
            routes.push((GATEWAY4.into(), ours(route4, ifindex)));
        }
        for (gateway, route) in routes {
            self.handle
                .neighbours()
                .add(ifindex, gateway)
                .link_layer_address(&gateway_mac)
                .replace()
                .execute()
                .await
                .map_err(|source| failed(format!("make {gateway} a neighbour"), source))?;
            self.handle
                .route()
                .add(route)
                .replace()
                .execute()
                .await
                .map_err(|source| failed(format!("route the mesh to {}", wish.name), source))?;
        }
        Ok(())
    }

    /// Makes the guards of these prefixes of the mesh, which need no device, then the rules that lead to them; rules
    /// for other prefixes go.
    ///
    /// # Errors
    /// When the kernel refuses; what was made so far stays, and calling again goes on.
    pub async fn ensure_guards(&self, prefixes: &[IpNet]) -> Result<(), LinksError> {
        for prefix in prefixes {
            let (network, length) = (prefix.network(), prefix.prefix_len());
            let route = match network {
                IpAddr::V4(network) => guard(
                    RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(network, length),
                ),
                IpAddr::V6(network) => guard(
                    RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(network, length),
                ),
            };
            let result = self.handle.route().add(route).execute().await;
            ignore_existing(result).map_err(|source| failed(format!("guard {prefix}"), source))?;
        }
        self.ensure_rules(prefixes).await
    }

    /// Removes the node endpoint, rules and guards. Goes on after an error and gives the first.
    ///
    /// # Errors
    /// When the kernel refuses for another reason than that there is nothing.
    pub async fn remove_node(&self, name: &str) -> Result<(), LinksError> {
        let mut first = self.remove_rules().await;
        for route in self.routes().await? {
            if route.header.protocol == PROTOCOL && table_of(&route) == TABLE {
                let result = self.handle.route().del(route).execute().await;
                first = first.and(result.map_err(|source| failed("remove a route", source)));
            }
        }
        if let Some(link) = self.by_name(name).await? {
            let result = self.handle.link().del(link.ifindex).execute().await;
            first = first.and(result.map_err(|source| failed(format!("remove {name}"), source)));
        }
        first
    }
}

/// Lets answers come in where the host checks reverse paths strictly. The effective setting is the larger of
/// all's and the link's, so that the link's own 2 (loose) wins over a strict 1. A read-only /proc/sys is no
/// failure: the routes are symmetric and pass the strict check too.
fn loosen_reverse_path(name: &str) {
    let path = format!("/proc/sys/net/ipv4/conf/{name}/rp_filter");
    let is_loose = fs::read_to_string(&path).is_ok_and(|value| value.trim() == "2");
    if !is_loose && let Err(error) = fs::write(&path, "2") {
        tracing::debug!(path, %error, "left rp_filter as it is");
    }
}

fn ours<T>(route: RouteMessageBuilder<T>, ifindex: u32) -> RouteMessage {
    route
        .table_id(TABLE)
        .protocol(PROTOCOL)
        .priority(METRIC)
        .output_interface(ifindex)
        .onlink()
        .build()
}

fn guard<T>(route: RouteMessageBuilder<T>) -> RouteMessage {
    route
        .table_id(TABLE)
        .protocol(PROTOCOL)
        .priority(GUARD_METRIC)
        .kind(RouteType::Unreachable)
        .build()
}

pub(super) fn ignore_existing(
    result: Result<(), rtnetlink::Error>,
) -> Result<(), rtnetlink::Error> {
    match result {
        Err(error) if errno(&error) == Some(EEXIST) => Ok(()),
        result => result,
    }
}
