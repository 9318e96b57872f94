//! What is there in the pod, and how it differs from what ADD made.

use std::net::IpAddr;

use futures::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::{
    address::AddressAttribute,
    link::{LinkAttribute, LinkFlags},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState},
    route::{RouteAttribute, RouteMessage, RouteType},
};
use netmanager_api::cni::AttachmentKey;
use rtnetlink::{Handle, RouteMessageBuilder};

use super::{PROTOCOL, route_address};
use crate::{
    error::Error,
    mac::Mac,
    pair::{by_name, family, group},
};

/// What an attached pod should have, as its result says.
#[derive(Debug)]
pub(crate) struct Expected {
    pub(crate) mac: Option<String>,
    /// Address and gateway.
    pub(crate) ips: Vec<(IpNet, Option<IpAddr>)>,
}

/// Every way in which the pod's end is not as it should be; runs inside the pod's namespace.
pub(crate) async fn differences(
    netlink: &Handle,
    key: &AttachmentKey,
    expected: &Expected,
) -> Result<Vec<String>, Error> {
    let name = &key.ifname;
    let Some(link) = by_name(netlink, name).await? else {
        return Ok(vec![format!("{name} is gone")]);
    };
    if group(&link) != key.mark() {
        return Ok(vec![format!("{name} is another interface than ours")]);
    }
    let mut differences = Vec::new();
    if !link.header.flags.contains(LinkFlags::Up) {
        differences.push(format!("{name} is down"));
    }
    let mac = link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Address(octets) => {
                Some(Mac(octets.as_slice().try_into().ok()?).to_string())
            }
            _ => None,
        });
    if expected.mac.is_some() && expected.mac != mac {
        differences.push(format!(
            "{name} has the MAC address {}, not {}",
            mac.as_deref().unwrap_or("none"),
            expected.mac.as_deref().unwrap_or("none"),
        ));
    }
    let index = link.header.index;
    let addresses = addresses(netlink, index).await?;
    let routes = routes(netlink).await?;
    let neighbours = permanent_neighbours(netlink, index).await?;
    for (address, gateway) in &expected.ips {
        if !addresses.contains(&address.addr()) {
            differences.push(format!("{name} has lost its address {address}"));
        }
        let Some(gateway) = gateway else { continue };
        if !neighbours.contains(gateway) {
            differences.push(format!("{name} has lost its permanent neighbour {gateway}"));
        }
        let of_family = |route: &&RouteMessage| route.header.address_family == family(*gateway);
        if !routes
            .iter()
            .filter(of_family)
            .any(|route| leads_to(route, index, *gateway))
        {
            differences.push(format!("the route to the mesh via {gateway} is gone"));
        }
        if !routes
            .iter()
            .filter(of_family)
            .any(|route| route.header.kind == RouteType::Unreachable)
        {
            differences.push(format!(
                "the unreachable route behind the one via {gateway} is gone"
            ));
        }
    }
    Ok(differences)
}

fn leads_to(route: &RouteMessage, index: u32, gateway: IpAddr) -> bool {
    route.header.kind == RouteType::Unicast
        && route.attributes.contains(&RouteAttribute::Oif(index))
        && route
            .attributes
            .contains(&RouteAttribute::Gateway(route_address(gateway)))
}

/// Our routes of both families in the pod.
pub(super) async fn routes(netlink: &Handle) -> Result<Vec<RouteMessage>, Error> {
    let mut ours = Vec::new();
    for any in [IpAddr::from([0; 4]), IpAddr::from([0; 16])] {
        let mut ask = RouteMessageBuilder::<IpAddr>::new();
        ask.get_mut().header.address_family = family(any);
        let mut list = netlink.route().get(ask.build()).execute();
        while let Some(route) = list
            .try_next()
            .await
            .map_err(Error::kernel("list the pod's routes"))?
        {
            if route.header.protocol == PROTOCOL {
                ours.push(route);
            }
        }
    }
    Ok(ours)
}

async fn addresses(netlink: &Handle, index: u32) -> Result<Vec<IpAddr>, Error> {
    let mut found = Vec::new();
    let mut list = netlink
        .address()
        .get()
        .set_link_index_filter(index)
        .execute();
    while let Some(address) = list
        .try_next()
        .await
        .map_err(Error::kernel("list the pod's addresses"))?
    {
        found.extend(
            address
                .attributes
                .iter()
                .filter_map(|attribute| match attribute {
                    AddressAttribute::Address(addr) => Some(*addr),
                    _ => None,
                }),
        );
    }
    Ok(found)
}

async fn permanent_neighbours(netlink: &Handle, index: u32) -> Result<Vec<IpAddr>, Error> {
    let mut found = Vec::new();
    let mut list = netlink.neighbours().get().execute();
    while let Some(neighbour) = list
        .try_next()
        .await
        .map_err(Error::kernel("list the pod's neighbours"))?
    {
        if neighbour.header.ifindex != index || neighbour.header.state != NeighbourState::Permanent
        {
            continue;
        }
        found.extend(
            neighbour
                .attributes
                .iter()
                .filter_map(|attribute| match attribute {
                    NeighbourAttribute::Destination(NeighbourAddress::Inet(addr)) => {
                        Some(IpAddr::V4(*addr))
                    }
                    NeighbourAttribute::Destination(NeighbourAddress::Inet6(addr)) => {
                        Some(IpAddr::V6(*addr))
                    }
                    _ => None,
                }),
        );
    }
    Ok(found)
}
