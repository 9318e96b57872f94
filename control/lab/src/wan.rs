//! The WAN: a forwarder that holds each packet for the one-way delay between its sites.
//!
//! ```text
//!  router-cloud ---\                              /--- router-fog
//!                   >-- policy route --> TUN `wan` --- main table
//!  router-edge  ---/         (this program reads, waits, writes back)
//! ```
//!
//! Kernels without netem are common, so the lab brings its own and behaves alike everywhere. The device is
//! made by the lab and outlives this program: while it is down packets are dropped, never let through early.

mod line;

use std::{
    collections::BTreeMap,
    io::{self, ErrorKind},
    os::fd::AsFd,
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, ppoll},
    sys::time::TimeSpec,
};
use tun_rs::{DeviceBuilder, SyncDevice};

use self::line::Line;
use crate::{error::LabError, folder::Lab, spec::Spec};

/// The TUN device in the WAN's namespace.
pub const DEVICE: &str = "wan";
/// The largest packet, bytes: that of an Ethernet LAN, and room.
const LARGEST: usize = 2048;

/// The lines between all sites.
struct Wan {
    lines: BTreeMap<(u8, u8), Line>,
}

impl Wan {
    fn new(spec: &Spec) -> Self {
        let numbers: Vec<_> = spec.sites.iter().map(|site| site.number).collect();
        Self::between(&numbers, |from, to| spec.delay(from, to))
    }

    fn between(sites: &[u8], delay: impl Fn(u8, u8) -> Duration) -> Self {
        let pairs = sites
            .iter()
            .flat_map(|from| sites.iter().map(move |to| (*from, *to)));
        Self {
            lines: pairs
                .map(|(from, to)| ((from, to), Line::new(delay(from, to))))
                .collect(),
        }
    }

    /// Takes a packet onto the line between its sites; one that is not from a site to a site is dropped.
    fn take(&mut self, packet: &[u8], now: Duration) {
        if let Some(line) = sites(packet).and_then(|pair| self.lines.get_mut(&pair)) {
            line.push(packet, now);
        }
    }

    /// When the next packet arrives at the other end.
    fn next(&self) -> Option<Duration> {
        self.lines.values().filter_map(Line::next).min()
    }
}

/// The numbers of the sites that an IPv4 packet goes from and to, by the third octets of its addresses.
fn sites(packet: &[u8]) -> Option<(u8, u8)> {
    let header: &[u8; 20] = packet.first_chunk()?;
    let is_lan = |octets: &[u8]| octets[..2] == [100, 64];
    (header[0] >> 4 == 4 && is_lan(&header[12..]) && is_lan(&header[16..]))
        .then_some((header[14], header[18]))
}

/// Forwards until it is killed.
pub(crate) fn run(lab: &str) -> Result<(), LabError> {
    let spec = Lab::find(Some(lab))?.manifest()?.spec;
    tracing::info!(delays = ?spec.delays, "forwarding");
    forward(&mut Wan::new(&spec))
}

/// Forwards between sites that are all so far apart, by the device of the namespace of who calls, as long as there is one.
///
/// # Errors
/// When there is none.
pub fn forward_between(sites: &[u8], one_way: Duration) -> Result<(), LabError> {
    forward(&mut Wan::between(sites, |_, _| one_way))
}

fn forward(wan: &mut Wan) -> Result<(), LabError> {
    let device = DeviceBuilder::new()
        .name(DEVICE)
        .inherit_enable_state()
        .build_sync()
        .and_then(|device| device.set_nonblocking(true).map(|()| device))
        .map_err(LabError::file("/dev/net/tun"))?;
    pass(&device, wan).map_err(LabError::file("/dev/net/tun"))
}

fn pass(device: &SyncDevice, wan: &mut Wan) -> io::Result<()> {
    let start = Instant::now();
    let mut buffer = vec![0; LARGEST];
    let mut reported = Duration::ZERO;
    loop {
        wait(
            device,
            wan.next().map(|due| due.saturating_sub(start.elapsed())),
        )?;
        loop {
            match device.recv(&mut buffer) {
                Ok(length) => wan.take(&buffer[..length], start.elapsed()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let now = start.elapsed();
        for line in wan.lines.values_mut() {
            while let Some(packet) = line.pop(now) {
                // The kernel refuses what it would drop anyway (the far side is gone).
                let _ = device.send(&packet);
            }
        }
        if now > reported + Duration::from_secs(1) {
            reported = now;
            for (pair, line) in &mut wan.lines {
                let dropped = line.take_dropped();
                if dropped > 0 {
                    tracing::warn!(?pair, dropped, "a line is full");
                }
            }
        }
    }
}

/// Waits until the device has a packet or the time is over.
fn wait(device: &SyncDevice, time: Option<Duration>) -> io::Result<()> {
    let mut descriptors = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
    match ppoll(&mut descriptors, time.map(TimeSpec::from), None) {
        Ok(_) | Err(nix::Error::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
        let mut packet = vec![0; 28];
        packet[0] = 0x45;
        packet[12..16].copy_from_slice(&source);
        packet[16..20].copy_from_slice(&destination);
        packet
    }

    #[test]
    fn a_packet_waits_as_long_as_its_sites_are_apart() {
        let mut wan = Wan::new(&Spec::default());
        wan.take(&packet([100, 64, 1, 11], [100, 64, 3, 11]), Duration::ZERO);
        assert_eq!(wan.next(), Some(Duration::from_millis(15)));
        wan.take(&packet([100, 64, 3, 11], [100, 64, 2, 11]), Duration::ZERO);
        assert_eq!(wan.next(), Some(Duration::from_millis(5)));
    }

    #[test]
    fn what_is_not_between_two_sites_is_dropped() {
        let mut wan = Wan::new(&Spec::default());
        for (source, destination) in [
            ([100, 127, 1, 0], [100, 64, 3, 11]),
            ([100, 64, 1, 11], [192, 0, 2, 1]),
            ([100, 64, 9, 1], [100, 64, 1, 1]),
        ] {
            wan.take(&packet(source, destination), Duration::ZERO);
        }
        let mut version6 = packet([100, 64, 1, 11], [100, 64, 3, 11]);
        version6[0] = 0x60;
        wan.take(&version6, Duration::ZERO);
        wan.take(&[0x45; 19], Duration::ZERO);
        assert_eq!(wan.next(), None);
    }
}
