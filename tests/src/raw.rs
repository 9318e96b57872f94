//! Frames put on a link as they are.

#![expect(
    clippy::unwrap_used,
    reason = "a step of a test that fails, fails the test, here as in its body"
)]

use std::os::fd::{AsRawFd, OwnedFd};

use nix::{
    ifaddrs::getifaddrs,
    net::if_::if_nametoindex,
    sys::{
        socket::{
            AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvfrom, sendto,
            setsockopt, socket, sockopt::ReceiveTimeout,
        },
        time::TimeVal,
    },
};

use crate::Netns;

/// Sends a frame out of `device`, which has Ethernet.
///
/// # Panics
/// When the device is not there or down, or the capability is missing.
pub fn send(netns: &Netns, device: &str, frame: &[u8]) {
    netns.run(|| {
        // The safe way to an address of a link is to be told it.
        let links: Vec<_> = getifaddrs().unwrap().collect();
        let to: LinkAddr = links
            .iter()
            .filter(|link| link.interface_name == device)
            .find_map(|link| link.address.as_ref()?.as_link_addr().copied())
            .unwrap_or_else(|| panic!("{device} is not in {}", netns.name()));
        sendto(open().as_raw_fd(), frame, &to, MsgFlags::empty()).unwrap();
    });
}

/// A device without Ethernet, into which packets are sent from their IP header on.
#[derive(Debug)]
pub struct Tunnel {
    fd: OwnedFd,
    to: LinkAddr,
}

impl Tunnel {
    /// Finds `device`, over which `traffic` makes a packet pass.
    ///
    /// # Panics
    /// When the device is not there or no packet passes.
    pub fn find(netns: &Netns, device: &str, traffic: impl FnOnce()) -> Self {
        // Such a link is not listed with an address; a packet that is heard on it has one.
        let (fd, index) = netns.run(|| {
            let flags = SockFlag::SOCK_CLOEXEC;
            let all = SockProtocol::EthAll;
            let fd = socket(AddressFamily::Packet, SockType::Raw, flags, all).unwrap();
            (fd, if_nametoindex(device).unwrap() as usize)
        });
        setsockopt(&fd, ReceiveTimeout, &TimeVal::new(3, 0)).unwrap();
        traffic();
        loop {
            let (_, from) = recvfrom::<LinkAddr>(fd.as_raw_fd(), &mut [0; 128]).unwrap();
            if let Some(to) = from.filter(|from| from.ifindex() == index) {
                let fd = netns.run(open);
                return Self { fd, to };
            }
        }
    }

    /// Sends a packet into it.
    ///
    /// # Panics
    /// When the device is gone.
    pub fn send(&self, packet: &[u8]) {
        sendto(self.fd.as_raw_fd(), packet, &self.to, MsgFlags::empty()).unwrap();
    }
}

/// A socket that only sends.
fn open() -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC;
    socket(AddressFamily::Packet, SockType::Raw, flags, None).unwrap()
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
