//! What is on the wire of a link.

#![expect(
    clippy::unwrap_used,
    reason = "a step of a test that fails, fails the test, here as in its body"
)]

use std::{
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use crate::Netns;
use nix::{
    net::if_::if_nametoindex,
    sys::{
        socket::{
            AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt,
            socket, sockopt,
        },
        time::TimeVal,
    },
};

/// Takes every frame of one link, both ways.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    frames: JoinHandle<Vec<Vec<u8>>>,
}

impl Capture {
    /// Begins; every frame from now on is taken.
    ///
    /// # Panics
    /// When the device is not there or the capability is missing.
    #[must_use]
    pub fn start(netns: &Netns, device: &str) -> Self {
        let (fd, index) = netns.run(|| {
            let fd = socket(
                AddressFamily::Packet,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::EthAll,
            )
            .unwrap();
            setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::new(0, 20_000)).unwrap();
            (fd, if_nametoindex(device).unwrap() as usize)
        });
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let frames = thread::spawn(move || {
            let mut frames = Vec::new();
            let mut buffer = vec![0; 1 << 16];
            // What was on the wire before the stop is in the socket: it is emptied once more.
            let mut last = false;
            loop {
                match recvfrom::<LinkAddr>(fd.as_raw_fd(), &mut buffer) {
                    Ok((len, Some(from))) if from.ifindex() == index => {
                        frames.push(buffer[..len].to_vec());
                    }
                    Ok(_) => {}
                    Err(_) if last => return frames,
                    Err(_) => last = stopped.load(Ordering::Relaxed),
                }
            }
        });
        Self { stop, frames }
    }

    /// Ends, and gives the frames in their order.
    ///
    /// # Panics
    /// When the capture itself failed.
    #[must_use]
    pub fn stop(self) -> Vec<Vec<u8>> {
        self.stop.store(true, Ordering::Relaxed);
        self.frames.join().unwrap()
    }
}

/// What a frame carries.
#[derive(Debug, PartialEq, Eq)]
pub enum Outer {
    /// A UDP datagram.
    Udp {
        /// Its source port.
        source: u16,
        /// Its destination port.
        target: u16,
    },
    /// ARP, neighbour discovery and group membership of the underlay itself.
    Housekeeping,
    /// Anything else.
    Other,
}

/// Says what an Ethernet frame carries, by its outermost headers.
#[must_use]
pub fn outer(frame: &[u8]) -> Outer {
    let udp = |header: &[u8]| Outer::Udp {
        source: u16::from_be_bytes([header[0], header[1]]),
        target: u16::from_be_bytes([header[2], header[3]]),
    };
    let (ethernet, packet) = frame.split_at(14);
    match [ethernet[12], ethernet[13]] {
        [0x08, 0x06] => Outer::Housekeeping,
        [0x08, 0x00] if packet[9] == 17 => udp(&packet[usize::from(packet[0] & 15) * 4..]),
        [0x86, 0xdd] => match (packet[6], packet[40]) {
            (17, _) => udp(&packet[40..]),
            (58, 133..=136) => Outer::Housekeeping,
            // MLD reports come with a hop-by-hop option (RFC 3810 section 5).
            (0, 58) => Outer::Housekeeping,
            _ => Outer::Other,
        },
        _ => Outer::Other,
    }
}
