//! Links, addresses and routes of the host, by rtnetlink.
//!
//! Reading is here; the node endpoint is made in [`node`].

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures::{StreamExt, TryStreamExt};
use ipnet::IpNet;
use netlink_packet_route::{
    address::AddressAttribute,
    link::{LinkAttribute, LinkFlags, LinkMessage},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteType},
};
use rtnetlink::{
    Handle, MulticastGroup, RouteMessageBuilder, new_connection, new_multicast_connection,
};
use tokio::{sync::watch, task::JoinHandle};

use crate::routes::ForeignRoute;

mod node;
mod rules;

pub use node::NodeWish;
use node::PROTOCOL;

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

fn failed(what: impl Into<String>, source: rtnetlink::Error) -> LinksError {
    LinksError::Netlink {
        what: what.into(),
        source,
    }
}
