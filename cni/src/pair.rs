//! The veth pair, seen from the host: made in one step with its other end inside the pod, found by its mark.

use futures::TryStreamExt;
use netlink_packet_route::{
    AddressFamily,
    link::{
        AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute,
        LinkInfo, LinkMessage,
    },
};
use netmanager_api::cni::{AttachmentKey, Reserved};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth};

use crate::{error::Error, mac::Mac, netns::Netns};

/// Makes the pair: host side here and down, the other end inside `netns` under its final name. Both ends have
/// their mark, MAC address and MTU from the start. Returns the host side's index.
pub(crate) async fn create(
    netlink: &Handle,
    netns: &Netns,
    key: &AttachmentKey,
    reserved: &Reserved,
) -> Result<u32, Error> {
    let mac = |what: &str, text: &str| {
        text.parse::<Mac>().map_err(|why| {
            Error::Protocol(format!("the NetManager gave a {what} that is none: {why}"))
        })
    };
    let (host_mac, pod_mac) = (
        mac("host_mac", &reserved.host_mac)?,
        mac("mac", &reserved.mac)?,
    );
    let peer = LinkMessageBuilder::<LinkUnspec>::new()
        .name(&key.ifname)
        .address(pod_mac.0.to_vec())
        .mtu(reserved.mtu)
        .link_group(key.mark())
        .setns_by_fd(netns.raw_fd())
        .build();
    let pair = LinkVeth::new(&reserved.host_ifname, &key.ifname)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .address(host_mac.0.to_vec())
        .mtu(reserved.mtu)
        .link_group(key.mark())
        .build();
    let what = format!(
        "make the veth pair {} and {} in the pod",
        reserved.host_ifname, key.ifname
    );
    netlink
        .link()
        .add(pair)
        .execute()
        .await
        .map_err(Error::kernel(what))?;
    let host = by_name(netlink, &reserved.host_ifname)
        .await?
        .filter(|link| group(link) == key.mark())
        .ok_or_else(|| Error::Kernel {
            what: format!("find {} again", reserved.host_ifname),
            why: "somebody removed or replaced it".to_owned(),
        })?;
    Ok(host.header.index)
}

/// Sets the host side up, without an IPv6 address of its own.
pub(crate) async fn set_up(netlink: &Handle, index: u32) -> Result<(), Error> {
    let no_link_local =
        LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(
            In6AddrGenMode::None,
        )])]);
    let message = LinkUnspec::new_with_index(index)
        .append_extra_attribute(no_link_local)
        .up()
        .build();
    netlink
        .link()
        .set(message)
        .execute()
        .await
        .map_err(Error::kernel(format!("set link {index} up")))
}

/// Removes every pair of `marks` whose host side is here, and with it its other end wherever that is.
pub(crate) async fn remove(netlink: &Handle, marks: &[u32]) -> Result<(), Error> {
    let mut links = netlink.link().get().execute();
    let mut ours = Vec::new();
    while let Some(link) = links
        .try_next()
        .await
        .map_err(Error::kernel("list the links"))?
    {
        if is_veth(&link) && marks.contains(&group(&link)) {
            ours.push(link.header.index);
        }
    }
    let mut failures = Vec::new();
    for index in ours {
        failures.extend(remove_one(netlink, index).await.err());
    }
    Error::gather(failures)
}

/// Removes one link; succeeds when it is gone.
pub(crate) async fn remove_one(netlink: &Handle, index: u32) -> Result<(), Error> {
    match netlink.link().del(index).execute().await {
        Err(error) if is(&error, nix::errno::Errno::ENODEV) => Ok(()),
        done => done.map_err(Error::kernel(format!("remove link {index}"))),
    }
}

/// The link of a name in the socket's namespace.
pub(crate) async fn by_name(netlink: &Handle, name: &str) -> Result<Option<LinkMessage>, Error> {
    let mut links = netlink.link().get().match_name(name).execute();
    match links.try_next().await {
        Err(error) if is(&error, nix::errno::Errno::ENODEV) => Ok(None),
        found => found.map_err(Error::kernel(format!("look for {name}"))),
    }
}

/// The link's group.
pub(crate) fn group(link: &LinkMessage) -> u32 {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Group(group) => Some(*group),
            _ => None,
        })
        .unwrap_or_default()
}

fn is_veth(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| {
        matches!(attribute, LinkAttribute::LinkInfo(infos)
            if infos.contains(&LinkInfo::Kind(InfoKind::Veth)))
    })
}

/// Whether the kernel answered with `errno`.
pub(crate) fn is(error: &rtnetlink::Error, errno: nix::errno::Errno) -> bool {
    matches!(error, rtnetlink::Error::NetlinkError(message)
        if message.to_io().raw_os_error() == Some(errno as i32))
}

/// The family of an address.
pub(crate) fn family(addr: std::net::IpAddr) -> AddressFamily {
    if addr.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    }
}
