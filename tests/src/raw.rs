//! Frames put on a link as they are.

#![expect(
    clippy::unwrap_used,
    reason = "a step of a test that fails, fails the test, here as in its body"
)]

use std::os::fd::AsRawFd;

use nix::{
    ifaddrs::getifaddrs,
    sys::socket::{
        AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, SockaddrLike, sendto, socket,
    },
};

use crate::Netns;

/// Sends a frame out of `device`; where that has no Ethernet (a tunnel), a packet from its IP header on.
///
/// # Panics
/// When the device is not there or down, or the capability is missing.
pub fn send(netns: &Netns, device: &str, frame: &[u8]) {
    netns.run(|| {
        let raw = SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Packet, SockType::Raw, raw, None).unwrap();
        // The one safe way to an address of a link is to be told it.
        let links: Vec<_> = getifaddrs().unwrap().collect();
        let to: LinkAddr = links
            .iter()
            .filter(|link| link.interface_name == device)
            .find_map(|link| link.address.as_ref()?.as_link_addr().copied())
            .unwrap_or_else(|| panic!("{device} is not in {}", netns.name()));
        assert!(to.len() > 0);
        sendto(fd.as_raw_fd(), frame, &to, MsgFlags::empty()).unwrap();
    });
}

/// An Ethernet frame.
#[must_use]
pub fn ethernet(to: [u8; 6], from: [u8; 6], kind: u16, body: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), body].concat()
}

/// EtherTypes.
pub const ETH_P_IP: u16 = 0x0800;
/// See [`ETH_P_IP`].
pub const ETH_P_ARP: u16 = 0x0806;
/// See [`ETH_P_IP`].
pub const ETH_P_IPV6: u16 = 0x86dd;

/// The EtherType of an IP packet.
#[must_use]
pub fn kind_of(packet: &[u8]) -> u16 {
    match packet.first().map(|first| first >> 4) {
        Some(6) => ETH_P_IPV6,
        _ => ETH_P_IP,
    }
}
