//! Looks for inner packets in clear on the underlay.
//!
//! A frame is in clear when an address of the mesh stands where addresses stand (IPv4, ARP, what an ICMP error
//! quotes), when the mesh's IPv6 prefix stands anywhere in it, or when it carries the [`MARKER`] of a test's
//! payload. What a tunnel carries is encrypted: 48 bits of it are the prefix by chance once in 10^14 bytes.

use std::{
    collections::BTreeSet,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket,
            sockopt::{RcvBufForce, ReceiveTimeout},
        },
        time::TimeVal,
    },
};

use super::service::{prefix4, prefix6};
use crate::{Netns, traffic::MARKER};

/// Bytes that may wait to be looked at: a burst at the speed of a veth for a good tenth of a second.
const BACKLOG: usize = 64 << 20;
const ETHERNET_LEN: usize = 14;

/// A running watch over all links of a namespace.
#[derive(Debug)]
pub struct Watch {
    stop: Arc<AtomicBool>,
    frames: Arc<AtomicU64>,
    seen: Arc<Mutex<BTreeSet<String>>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Watches every frame on every link of `netns`, also those that come later.
    ///
    /// # Panics
    /// When the capability is missing.
    #[must_use]
    pub fn start(netns: &Netns) -> Self {
        let fd = netns.run(open);
        let (stop, frames, seen) = (
            Arc::<AtomicBool>::default(),
            Arc::<AtomicU64>::default(),
            Arc::<Mutex<BTreeSet<String>>>::default(),
        );
        let (stopped, counted, found) = (stop.clone(), frames.clone(), seen.clone());
        let thread = thread::spawn(move || look(&fd, &stopped, &counted, &found));
        Self {
            stop,
            frames,
            seen,
            thread: Some(thread),
        }
    }

    /// How many frames were looked at.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.frames.load(Ordering::Relaxed)
    }

    /// What was in clear so far, each kind once.
    ///
    /// # Panics
    /// When the watch itself failed.
    #[must_use]
    pub fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().iter().cloned().collect()
    }

    /// Forgets what was seen so far: a test has shown that it is.
    ///
    /// # Panics
    /// When the watch itself failed.
    pub fn forgive(&self) {
        self.seen.lock().unwrap().clear();
    }

    /// Looks at what is still waiting, and ends; what was in clear, each kind once.
    ///
    /// # Panics
    /// When the watch itself failed.
    pub fn stop(&mut self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
        self.seen()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn open() -> OwnedFd {
    let fd = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::EthAll,
    )
    .unwrap();
    setsockopt(&fd, ReceiveTimeout, &TimeVal::new(0, 20_000)).unwrap();
    setsockopt(&fd, RcvBufForce, &BACKLOG).unwrap();
    fd
}

fn look(fd: &OwnedFd, stopped: &AtomicBool, frames: &AtomicU64, seen: &Mutex<BTreeSet<String>>) {
    let mut buffer = vec![0; 1 << 17];
    // What was on the wire before the stop is in the socket: it is emptied once more.
    let mut is_last = false;
    loop {
        match recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(length) => {
                frames.fetch_add(1, Ordering::Relaxed);
                if let Some(what) = in_clear(&buffer[..length]) {
                    seen.lock().unwrap().insert(what);
                }
            }
            // A link of the namespace went down or away.
            Err(Errno::ENETDOWN) => {}
            Err(_) if is_last => return,
            Err(_) => is_last = stopped.load(Ordering::Relaxed),
        }
    }
}

/// What of the mesh an Ethernet frame shows, if it does.
#[must_use]
pub fn in_clear(frame: &[u8]) -> Option<String> {
    let kind = frame.get(12..ETHERNET_LEN)?;
    let body = &frame[ETHERNET_LEN..];
    let found = match kind {
        [0x08, 0x06] => [14, 24].into_iter().find_map(|at| mesh4(body, at)),
        [0x08, 0x00] => in_ipv4(body),
        _ => None,
    };
    if let Some(address) = found {
        return Some(format!(
            "{address} in a frame of type {kind:02x?}: {}",
            head(frame)
        ));
    }
    let prefix = &prefix6().network().octets()[..6];
    if contains(frame, prefix) {
        return Some(format!("the mesh's IPv6 prefix: {}", head(frame)));
    }
    contains(frame, MARKER.as_bytes()).then(|| format!("a test's payload: {}", head(frame)))
}

/// A mesh address in an IPv4 packet's header, or in that of the packet that an ICMP error quotes.
fn in_ipv4(packet: &[u8]) -> Option<std::net::Ipv4Addr> {
    let own = mesh4(packet, 12).or_else(|| mesh4(packet, 16));
    let header = usize::from(packet.first()? & 15) * 4;
    let is_icmp_error =
        packet.get(9) == Some(&1) && matches!(packet.get(header), Some(3 | 11 | 12));
    own.or_else(|| {
        let quoted = packet.get(header + 8..).filter(|_| is_icmp_error)?;
        mesh4(quoted, 12).or_else(|| mesh4(quoted, 16))
    })
}

fn mesh4(bytes: &[u8], at: usize) -> Option<std::net::Ipv4Addr> {
    let octets: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
    Some(octets.into()).filter(|address| prefix4().contains(address))
}

fn contains(bytes: &[u8], pattern: &[u8]) -> bool {
    // Most bytes are not the first: a debug build looks at a megabyte in some milliseconds.
    let mut rest = bytes;
    while let Some(at) = rest.iter().position(|byte| *byte == pattern[0]) {
        rest = &rest[at..];
        if rest.starts_with(pattern) {
            return true;
        }
        rest = &rest[1..];
    }
    false
}

fn head(frame: &[u8]) -> String {
    format!("{:02x?}", &frame[..frame.len().min(64)])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ipv4(src: [u8; 4], dst: [u8; 4], protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend([8, 0, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0]);
        frame.extend(src);
        frame.extend(dst);
        frame.extend(payload);
        frame
    }

    #[test]
    fn every_way_to_show_an_inner_packet_is_seen_and_the_tunnel_is_not() {
        let (outer, inner) = ([198, 18, 1, 2], [10, 24, 0, 5]);
        let quote = [&[3, 4, 0, 0, 0, 0, 0, 0], &ipv4(outer, inner, 6, &[])[14..]].concat();
        let arp = |target: [u8; 4]| {
            let mut frame = vec![2; 12];
            frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
            frame.extend([2; 6].iter().chain(&outer).chain(&[0; 6]).chain(&target));
            frame
        };
        let ipv6 = |address: std::net::Ipv6Addr| {
            let mut frame = vec![2; 12];
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, 17, 64]);
            frame.extend(address.octets().repeat(2));
            frame
        };
        for (frame, clear) in [
            (ipv4(outer, [198, 18, 2, 2], 17, &[10, 24, 0, 5]), false),
            (ipv4(outer, inner, 17, &[]), true),
            (ipv4([10, 16, 0, 2], outer, 17, &[]), true),
            (ipv4(outer, outer, 1, &quote), true),
            (ipv4(outer, outer, 17, MARKER.as_bytes()), true),
            (arp([198, 18, 2, 2]), false),
            (arp(inner), true),
            (ipv6("2001:db8:1::1".parse().unwrap()), false),
            (ipv6(prefix6().network()), true),
        ] {
            assert_eq!(in_clear(&frame).is_some(), clear, "{frame:02x?}");
        }
    }
}
