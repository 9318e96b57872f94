//! The pod's end: DESIGN section 4, "A pod's wiring", as data and as netlink.
//!
//! ```text
//!  IFNAME: IPv4 /32, IPv6 /128 nodad, accept_ra 0, rp_filter 2, no link-local address
//!  10.16.0.0/12        via NODE-ENDPOINT dev IFNAME onlink src ADDRESS metric 10
//!  unreachable 10.16.0.0/12                                      metric 4294967295
//!  NODE-ENDPOINT dev IFNAME lladdr HOST-SIDE nud permanent         (and the same for IPv6)
//! ```
//!
//! The guards (`unreachable`) come first and go last. All routes carry protocol [`PROTOCOL`], so they are found
//! again without state. Nothing else in the pod is touched.

mod inspect;

pub(crate) use inspect::{Expected, differences};

use std::{fs, io, net::IpAddr, time::Duration};

use ipnet::IpNet;
use netlink_packet_route::{
    address::{AddressAttribute, AddressFlags, AddressHeaderFlags},
    link::{
        AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InetDevConf, LinkAttribute,
        LinkFlags,
    },
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteType},
};
use netmanager_api::cni::{AttachmentKey, Reserved};
use nix::errno::Errno;
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};

use crate::{
    error::Error,
    mac::Mac,
    pair::{by_name, family, group, is},
};

/// Marks our routes (`rtm_protocol`): "W"; none of the kernel's or iproute2's assigned numbers.
pub(crate) const PROTOCOL: RouteProtocol = RouteProtocol::Other(87);
const MESH_METRIC: u32 = 10;
const GUARD_METRIC: u32 = u32::MAX;
/// How long the pod's end may take to see its carrier after the host side is up; the kernel needs below 1 ms.
const CARRIER_PATIENCE: Duration = Duration::from_secs(2);

/// One family's part of the wiring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Leg {
    pub(crate) address: IpNet,
    pub(crate) gateway: IpAddr,
    pub(crate) mesh: IpNet,
}

/// The families that a reservation gives, IPv4 first.
pub(crate) fn legs(reserved: &Reserved) -> Vec<Leg> {
    let four = match (reserved.addr4, reserved.gateway4, reserved.mesh4) {
        (Some(addr), Some(gateway), Some(mesh)) => Some(Leg {
            address: IpNet::from(IpAddr::V4(addr)),
            gateway: gateway.into(),
            mesh: mesh.into(),
        }),
        _ => None,
    };
    let six = Leg {
        address: IpNet::from(IpAddr::V6(reserved.addr6)),
        gateway: reserved.gateway6.into(),
        mesh: reserved.mesh6.into(),
    };
    four.into_iter().chain([six]).collect()
}

/// Wires the pod's end; runs inside the pod's namespace.
pub(crate) async fn apply(
    netlink: &Handle,
    key: &AttachmentKey,
    legs: &[Leg],
    host_mac: Mac,
) -> Result<(), Error> {
    for leg in legs {
        add_route(netlink, guard(leg.mesh), OnExisting::Keep).await?;
    }
    let name = &key.ifname;
    let link = by_name(netlink, name)
        .await?
        .filter(|link| group(link) == key.mark())
        .ok_or_else(|| Error::Kernel {
            what: format!("find {name} in the pod"),
            why: "somebody removed or replaced it".to_owned(),
        })?;
    let index = link.header.index;
    enable_ipv6(name)?;
    set_sysctl(name, "accept_ra", "0")?;
    set_up(netlink, index, name).await?;
    for leg in legs {
        add_address(netlink, index, leg.address).await?;
        netlink
            .neighbours()
            .add(index, leg.gateway)
            .link_layer_address(&host_mac.0)
            .replace()
            .execute()
            .await
            .map_err(Error::kernel(format!(
                "set {} as a neighbour on {name}",
                leg.gateway
            )))?;
        add_route(netlink, mesh_route(leg, index), OnExisting::Fail).await?;
    }
    Ok(())
}

/// Waits until the pod's end has its carrier, so that the first packet after ADD is not lost.
pub(crate) async fn carrier(netlink: &Handle, name: &str) -> Result<(), Error> {
    let ready = async {
        loop {
            let link = by_name(netlink, name).await?;
            if link.is_some_and(|link| link.header.flags.contains(LinkFlags::LowerUp)) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(CARRIER_PATIENCE, ready)
        .await
        .unwrap_or_else(|_| {
            Err(Error::Kernel {
                what: format!("see the carrier of {name}"),
                why: format!("it is not there after {CARRIER_PATIENCE:?}"),
            })
        })
}

/// Removes the guards once no interface of the mesh is left in the pod; runs inside the pod's namespace.
pub(crate) async fn clear_guards(netlink: &Handle) -> Result<(), Error> {
    let ours = inspect::routes(netlink).await?;
    if ours
        .iter()
        .any(|route| route.header.kind == RouteType::Unicast)
    {
        return Ok(());
    }
    let mut failures = Vec::new();
    for route in ours {
        match netlink.route().del(route).execute().await {
            Err(error) if !is(&error, Errno::ESRCH) => {
                failures.push(Error::kernel("remove an unreachable route from the pod")(
                    error,
                ));
            }
            _ => {}
        }
    }
    Error::gather(failures)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum OnExisting {
    Keep,
    Fail,
}

async fn add_route(
    netlink: &Handle,
    route: RouteMessage,
    on_existing: OnExisting,
) -> Result<(), Error> {
    let what = describe(&route);
    match netlink.route().add(route).execute().await {
        Err(error) if is(&error, Errno::EEXIST) => match on_existing {
            OnExisting::Keep => Ok(()),
            OnExisting::Fail => Err(Error::Config(format!(
                "the pod already has {what}: attach it to the mesh once only"
            ))),
        },
        done => done.map_err(Error::kernel(format!("add {what}"))),
    }
}

fn describe(route: &RouteMessage) -> String {
    let dst = route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(addr)) => Some(addr.to_string()),
            RouteAttribute::Destination(RouteAddress::Inet6(addr)) => Some(addr.to_string()),
            _ => None,
        })
        .unwrap_or_default();
    let kind = match route.header.kind {
        RouteType::Unreachable => "an unreachable route",
        _ => "a route",
    };
    format!("{kind} to {dst}/{}", route.header.destination_prefix_length)
}

fn guard(mesh: IpNet) -> RouteMessage {
    route_to(mesh)
        .kind(RouteType::Unreachable)
        .priority(GUARD_METRIC)
        .build()
}

fn mesh_route(leg: &Leg, index: u32) -> RouteMessage {
    let mut route = route_to(leg.mesh)
        .onlink()
        .output_interface(index)
        .priority(MESH_METRIC)
        .build();
    route.attributes.extend([
        RouteAttribute::Gateway(route_address(leg.gateway)),
        RouteAttribute::PrefSource(route_address(leg.address.addr())),
    ]);
    route
}

fn route_to(dst: IpNet) -> RouteMessageBuilder<IpAddr> {
    let mut builder = RouteMessageBuilder::<IpAddr>::new().protocol(PROTOCOL);
    let message = builder.get_mut();
    message.header.address_family = family(dst.addr());
    message.header.destination_prefix_length = dst.prefix_len();
    message
        .attributes
        .push(RouteAttribute::Destination(route_address(dst.network())));
    builder
}

fn route_address(addr: IpAddr) -> RouteAddress {
    match addr {
        IpAddr::V4(addr) => RouteAddress::Inet(addr),
        IpAddr::V6(addr) => RouteAddress::Inet6(addr),
    }
}

async fn add_address(netlink: &Handle, index: u32, address: IpNet) -> Result<(), Error> {
    let mut add = netlink
        .address()
        .add(index, address.addr(), address.prefix_len());
    if address.addr().is_ipv6() {
        let message = add.message_mut();
        message.header.flags = AddressHeaderFlags::Nodad;
        message
            .attributes
            .push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    add.execute()
        .await
        .map_err(Error::kernel(format!("set the address {address}")))
}

/// Up, with `rp_filter` 2 (by netlink, so that a read-only /proc/sys does not matter) and no link-local address.
async fn set_up(netlink: &Handle, index: u32, name: &str) -> Result<(), Error> {
    let mut conf = InetDevConf::default();
    conf.rp_filter = 2;
    let settings = LinkAttribute::AfSpecUnspec(vec![
        AfSpecUnspec::Inet(vec![AfSpecInet::DevConfRequest(conf)]),
        AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]),
    ]);
    let message = LinkUnspec::new_with_index(index)
        .append_extra_attribute(settings)
        .up()
        .build();
    netlink
        .link()
        .set(message)
        .execute()
        .await
        .map_err(Error::kernel(format!("set {name} up")))
}

/// Switches IPv6 on where the pod's default switched it off.
fn enable_ipv6(name: &str) -> Result<(), Error> {
    match fs::metadata("/proc/sys/net/ipv6") {
        Ok(_) => set_sysctl(name, "disable_ipv6", "0"),
        Err(source) => Err(Error::io(
            "find IPv6 in this kernel (the mesh needs it: boot without ipv6.disable=1)",
            source,
        )),
    }
}

/// Sets an IPv6 setting of an interface; a read-only /proc/sys is no matter where the value is right already.
fn set_sysctl(name: &str, setting: &str, value: &str) -> Result<(), Error> {
    let path = format!("/proc/sys/net/ipv6/conf/{name}/{setting}");
    let have =
        fs::read_to_string(&path).map_err(|source| Error::io(format!("read {path}"), source))?;
    if have.trim() == value {
        return Ok(());
    }
    fs::write(&path, value).map_err(|source| {
        let way_out = match source.kind() {
            io::ErrorKind::ReadOnlyFilesystem => {
                " (/proc/sys is read-only here: let the runtime start the plugin on the host)"
            }
            _ => "",
        };
        Error::io(format!("set {path} to {value}{way_out}"), source)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mesh_without_ipv4_wires_ipv6_alone() {
        let mut reserved = Reserved {
            endpoint: 2,
            host_ifname: "weft2".into(),
            mac: "02:00:00:00:00:02".into(),
            host_mac: "02:00:00:00:00:01".into(),
            addr6: "fd00:1:2:0:0:7:0:2".parse().unwrap(),
            addr4: Some("10.16.0.34".parse().unwrap()),
            gateway6: "fd00:1:2:0:0:7:0:1".parse().unwrap(),
            gateway4: Some("10.16.0.33".parse().unwrap()),
            mesh6: "fd00:1:2::/48".parse().unwrap(),
            mesh4: Some("10.16.0.0/12".parse().unwrap()),
            mtu: 1420,
        };
        let both = legs(&reserved);
        assert_eq!(both.len(), 2);
        assert_eq!(both[0].address, "10.16.0.34/32".parse().unwrap());
        reserved.mesh4 = None;
        let six = legs(&reserved);
        assert_eq!(six, both[1..]);
        assert_eq!(six[0].address, "fd00:1:2:0:0:7:0:2/128".parse().unwrap());
    }
}
