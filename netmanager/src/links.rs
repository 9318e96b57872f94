//! The node endpoint and its routes, by rtnetlink.
//!
//! ```text
//!  host process --> weft0 (the addresses) ==veth== weft1 --TCX ingress--> the programs
//!                     ^ plain redirect into weft1 <-----------------------'
//!
//!  rule: to MESH lookup TABLE      table TABLE: MESH via GATEWAY dev weft0 src OWN metric 10
//!                                               unreachable MESH           metric 1000
//! ```
//!
//! Host processes, host-network pods and probes reach VIPs through it. The gateway is a permanent neighbour
//! that nobody has to answer for. The guards are routes without a device, so that they stay when the pair is
//! set down or removed and no packet of the mesh ever leaves by a default route. Everything is idempotent:
//! [`Links::ensure_node`] adds what is missing and leaves what is right alone.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures::{StreamExt, TryStreamExt};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_route::{
    address::AddressAttribute,
    link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteType},
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use rtnetlink::{
    Handle, IpVersion, LinkUnspec, LinkVeth, MulticastGroup, RouteMessageBuilder, new_connection,
    new_multicast_connection,
};
use tokio::{sync::watch, task::JoinHandle};

use crate::{plan::NodeEndpoint, routes::ForeignRoute};

/// Our routing table, our rules' priority and our routes' protocol number: "WF", and a number that nobody
/// registered in `/etc/iproute2/rt_protos`.
const TABLE: u32 = 0x5746;
const RULE_PRIORITY: u32 = 5_746;
const PROTOCOL: RouteProtocol = RouteProtocol::Other(157);
const METRIC: u32 = 10;
const GUARD_METRIC: u32 = 1_000;
/// Next hops that exist as permanent neighbours only (link-local, RFC 3927 and RFC 4291).
const GATEWAY4: Ipv4Addr = Ipv4Addr::new(169, 254, 87, 70);
const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x5746);
/// Errors of the kernel that say "it is there", "there is none".
const EEXIST: i32 = 17;
const ENODEV: i32 = 19;

/// Why the host's network could not be changed or read.
#[derive(Debug, thiserror::Error)]
pub enum LinksError {
    /// No netlink socket.
    #[error("failed to open a netlink socket")]
    Open(#[source] io::Error),
    /// The kernel refused.
    #[error("failed to {what}")]
    Netlink {
        /// What was tried.
        what: String,
        /// Why.
        #[source]
        source: rtnetlink::Error,
    },
    /// The pair is not there right after it was made.
    #[error("link {0} is not there: it was removed while it was set up")]
    Gone(String),
}

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

/// A link as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub ifindex: u32,
    /// Its name.
    pub name: String,
    /// Its MAC address; zero where it has none.
    pub mac: [u8; 6],
    /// Its MTU, bytes.
    pub mtu: u32,
    /// Whether it is set up.
    pub is_up: bool,
}

/// A connection to rtnetlink.
#[derive(Debug)]
pub struct Links {
    handle: Handle,
    connection: JoinHandle<()>,
}

impl Drop for Links {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Links {
    /// Connects, in the network namespace of this thread.
    ///
    /// # Errors
    /// When there is no netlink socket to be had.
    pub fn connect() -> Result<Self, LinksError> {
        let (connection, handle, _) = new_connection().map_err(LinksError::Open)?;
        Ok(Self {
            handle,
            connection: tokio::spawn(connection),
        })
    }

    /// Every link.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn list(&self) -> Result<Vec<Link>, LinksError> {
        self.handle
            .link()
            .get()
            .execute()
            .map_ok(|message| link_of(&message))
            .try_collect()
            .await
            .map_err(|source| failed("list links", source))
    }

    /// The link of this name.
    ///
    /// # Errors
    /// When the kernel refuses for another reason than that there is none.
    pub async fn by_name(&self, name: &str) -> Result<Option<Link>, LinksError> {
        let found: Result<Vec<Link>, _> = self
            .handle
            .link()
            .get()
            .match_name(name)
            .execute()
            .map_ok(|message| link_of(&message))
            .try_collect()
            .await;
        match found {
            Ok(links) => Ok(links.into_iter().next()),
            Err(error) if errno(&error) == Some(ENODEV) => Ok(None),
            Err(source) => Err(failed(format!("find link {name}"), source)),
        }
    }

    /// MTU of the link that holds `address`, or else of the one with the default route; 1500 where neither is
    /// known.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn underlay_mtu(&self, address: Option<IpAddr>) -> Result<u32, LinksError> {
        let links = self.list().await?;
        let addresses: Vec<_> = self
            .handle
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|source| failed("list addresses", source))?;
        let holder = addresses.iter().find(|message| {
            message.attributes.iter().any(|attribute| {
                matches!(attribute, AddressAttribute::Address(found) if Some(*found) == address)
            })
        });
        let ifindex = match holder {
            Some(message) => Some(message.header.index),
            None => self.default_route_device().await?,
        };
        Ok(links
            .iter()
            .find(|link| Some(link.ifindex) == ifindex)
            .map_or(1_500, |link| link.mtu))
    }

    /// The addresses of the link with the default route, IPv4 first; none where there is no such route.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn underlay_addresses(&self) -> Result<Vec<IpAddr>, LinksError> {
        let Some(device) = self.default_route_device().await? else {
            return Ok(Vec::new());
        };
        let messages: Vec<_> = self
            .handle
            .address()
            .get()
            .set_link_index_filter(device)
            .execute()
            .try_collect()
            .await
            .map_err(|source| failed("list addresses", source))?;
        let mut found: Vec<IpAddr> = messages
            .iter()
            .flat_map(|message| &message.attributes)
            .filter_map(|attribute| match attribute {
                AddressAttribute::Address(IpAddr::V6(address))
                    if address.is_unicast_link_local() =>
                {
                    None
                }
                AddressAttribute::Address(address) => Some(*address),
                _ => None,
            })
            .collect();
        found.sort_by_key(IpAddr::is_ipv6);
        Ok(found)
    }

    async fn default_route_device(&self) -> Result<Option<u32>, LinksError> {
        let routes = self.routes().await?;
        Ok(routes
            .iter()
            .filter(|route| route.header.destination_prefix_length == 0)
            .find(|route| route.header.kind == RouteType::Unicast)
            .and_then(device_of))
    }

    /// The routes that are not ours and not of `own` devices.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn foreign_routes(&self, own: &[u32]) -> Result<Vec<ForeignRoute>, LinksError> {
        let links = self.list().await?;
        let name = |ifindex| {
            let link = links.iter().find(|link| Some(link.ifindex) == ifindex);
            link.map(|link| link.name.clone()).unwrap_or_default()
        };
        Ok(self
            .routes()
            .await?
            .iter()
            .filter(|route| route.header.protocol != PROTOCOL)
            .filter(|route| device_of(route).is_none_or(|device| !own.contains(&device)))
            .filter_map(|route| {
                Some(ForeignRoute {
                    prefix: prefix_of(route)?,
                    device: name(device_of(route)),
                    table: table_of(route),
                })
            })
            .collect())
    }

    async fn routes(&self) -> Result<Vec<RouteMessage>, LinksError> {
        let mut all = Vec::new();
        let requests = [
            RouteMessageBuilder::<Ipv4Addr>::new().build(),
            RouteMessageBuilder::<Ipv6Addr>::new().build(),
        ];
        for request in requests {
            let routes: Vec<RouteMessage> = self
                .handle
                .route()
                .get(request)
                .execute()
                .try_collect()
                .await
                .map_err(|source| failed("list routes", source))?;
            all.extend(routes);
        }
        Ok(all)
    }

    /// Makes the node endpoint, its routes, rules and guards, or what is missing of them.
    ///
    /// # Errors
    /// When the kernel refuses; what was made so far stays, and calling again goes on.
    pub async fn ensure_node(&self, wish: &NodeWish) -> Result<NodeEndpoint, LinksError> {
        self.ensure_guards(wish).await?;
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
                let nodad = netlink_packet_route::address::AddressHeaderFlags::Nodad;
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

    /// The guards come first and need no device; then the rules that lead to them.
    async fn ensure_guards(&self, wish: &NodeWish) -> Result<(), LinksError> {
        let guard6 = RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(wish.mesh6.network(), wish.mesh6.prefix_len());
        let mut guards = vec![guard(guard6)];
        if let Some(mesh4) = wish.mesh4 {
            let guard4 = RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(mesh4.network(), mesh4.prefix_len());
            guards.push(guard(guard4));
        }
        for guard in guards {
            let result = self.handle.route().add(guard).execute().await;
            ignore_existing(result).map_err(|source| failed("guard the mesh prefixes", source))?;
        }
        let mesh6 = IpNet::V6(wish.mesh6);
        let wanted: Vec<IpNet> = std::iter::once(mesh6)
            .chain(wish.mesh4.map(IpNet::V4))
            .collect();
        for version in [IpVersion::V4, IpVersion::V6] {
            self.remove_stale_rules(version, &wanted).await?;
        }
        for prefix in wanted {
            let request = self
                .handle
                .rule()
                .add()
                .table_id(TABLE)
                .priority(RULE_PRIORITY);
            let request = request.action(RuleAction::ToTable);
            let result = match prefix {
                IpNet::V4(net) => {
                    let request = request.v4();
                    request
                        .destination_prefix(net.network(), net.prefix_len())
                        .execute()
                        .await
                }
                IpNet::V6(net) => {
                    let request = request.v6();
                    request
                        .destination_prefix(net.network(), net.prefix_len())
                        .execute()
                        .await
                }
            };
            ignore_existing(result)
                .map_err(|source| failed(format!("make the rule for {prefix}"), source))?;
        }
        Ok(())
    }

    async fn remove_stale_rules(
        &self,
        version: IpVersion,
        wanted: &[IpNet],
    ) -> Result<(), LinksError> {
        let rules: Vec<RuleMessage> = self
            .handle
            .rule()
            .get(version)
            .execute()
            .try_collect()
            .await
            .map_err(|source| failed("list rules", source))?;
        for rule in rules {
            let is_ours = rule.attributes.contains(&RuleAttribute::Table(TABLE))
                && rule
                    .attributes
                    .contains(&RuleAttribute::Priority(RULE_PRIORITY));
            let prefix = rule
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    RuleAttribute::Destination(address) => {
                        IpNet::new(*address, rule.header.dst_len).ok()
                    }
                    _ => None,
                });
            if is_ours && prefix.is_none_or(|prefix| !wanted.contains(&prefix)) {
                let result = self.handle.rule().del(rule).execute().await;
                result.map_err(|source| failed("remove an old rule", source))?;
            }
        }
        Ok(())
    }

    /// Removes the node endpoint, rules and guards. Goes on after an error and gives the first.
    ///
    /// # Errors
    /// When the kernel refuses for another reason than that there is nothing.
    pub async fn remove_node(&self, name: &str) -> Result<(), LinksError> {
        let mut first = Ok(());
        for version in [IpVersion::V4, IpVersion::V6] {
            first = first.and(self.remove_stale_rules(version, &[]).await);
        }
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

/// Counts up whenever a link or an address of this network namespace changed.
///
/// # Errors
/// When there is no netlink socket to be had.
pub fn watch_links() -> Result<(watch::Receiver<u64>, JoinHandle<()>), LinksError> {
    let groups = [
        MulticastGroup::Link,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
    ];
    let (connection, _, mut messages) =
        new_multicast_connection(&groups).map_err(LinksError::Open)?;
    let (sender, receiver) = watch::channel(0);
    let task = tokio::spawn(async move {
        let connection = tokio::spawn(connection);
        while messages.next().await.is_some() {
            sender.send_modify(|count| *count += 1);
        }
        connection.abort();
    });
    Ok((receiver, task))
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

fn link_of(message: &LinkMessage) -> Link {
    let mut link = Link {
        ifindex: message.header.index,
        name: String::new(),
        mac: [0; 6],
        mtu: 0,
        is_up: message.header.flags.contains(LinkFlags::Up),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(mac) => {
                link.mac = mac.as_slice().try_into().unwrap_or_default();
            }
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            _ => {}
        }
    }
    link
}

fn device_of(route: &RouteMessage) -> Option<u32> {
    route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Oif(device) => Some(*device),
            _ => None,
        })
}

fn table_of(route: &RouteMessage) -> u32 {
    route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Table(table) => Some(*table),
            _ => None,
        })
        .unwrap_or(u32::from(route.header.table))
}

fn prefix_of(route: &RouteMessage) -> Option<IpNet> {
    let length = route.header.destination_prefix_length;
    route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => {
                IpNet::new((*address).into(), length).ok()
            }
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => {
                IpNet::new((*address).into(), length).ok()
            }
            _ => None,
        })
}

fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.code.map(|code| code.get().abs()),
        _ => None,
    }
}

fn ignore_existing(result: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    match result {
        Err(error) if errno(&error) == Some(EEXIST) => Ok(()),
        result => result,
    }
}

fn failed(what: impl Into<String>, source: rtnetlink::Error) -> LinksError {
    LinksError::Netlink {
        what: what.into(),
        source,
    }
}
