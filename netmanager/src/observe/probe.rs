//! One marked packet, sent where a pod would send it.
//!
//! The mark ([`LOG_MARK`]) is in the packet itself, so that every node's programs report it, whatever they sample:
//! in the sequence number of a TCP SYN, or of an ICMP echo. A SYN that is answered is reset at once by the
//! sender's own kernel, which knows nothing of it; the application sees no connection. A datagram would reach the
//! application, so none is sent.

use std::{
    fs::File,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd,
    path::PathBuf,
    thread,
};

use ebpf_common::layout::LOG_MARK;
use netmanager_api::observe::{FlowEvent, Trace, Verdict};
use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
    sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, sendto,
        socket,
    },
};

/// A trace, and the probe that was asked for.
#[derive(Clone, Debug)]
pub struct Traced {
    /// What would happen.
    pub trace: Trace,
    /// What to send.
    pub probe: Option<Plan>,
}

/// What to send, and from where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The pod's network namespace; `None` is the node's own.
    pub netns: Option<PathBuf>,
    /// Whether it is a TCP SYN; else an ICMP echo.
    pub is_tcp: bool,
    /// From; for an echo the port is its identifier.
    pub from: SocketAddr,
    /// Whither; for an echo without port.
    pub to: SocketAddr,
    /// The node of the backend that the trace named, where it is another.
    pub elsewhere: Option<String>,
}

/// Why nothing was sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProbeError {
    /// The namespace cannot be entered.
    #[error(
        "failed to enter the pod's network namespace {path}: it is gone, or CAP_SYS_ADMIN is missing"
    )]
    Netns {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel does not send it.
    #[error("failed to {what} the probe from {from}")]
    Send {
        /// What was tried.
        what: &'static str,
        /// From where.
        from: IpAddr,
        /// Why.
        #[source]
        source: Errno,
    },
}

impl Plan {
    /// Whether an event is of this probe.
    #[must_use]
    pub fn is_seen_in(&self, event: &FlowEvent) -> bool {
        let ends = (event.from.address, event.to.address);
        event.probe && (ends == (self.from, self.to) || ends == (self.to, self.from))
    }

    /// Whether an event is the answer's arrival, or a refusal: there is nothing more to wait for.
    #[must_use]
    pub fn is_answered_by(&self, event: &FlowEvent) -> bool {
        event.verdict == Verdict::Refused
            || event.verdict == Verdict::Delivered && event.from.address == self.to
    }

    /// What to say at the end.
    #[must_use]
    pub fn note(&self, answered: bool) -> String {
        let elsewhere = self.elsewhere.as_ref().map(|node| {
            format!("; not shown: what {node} saw (there: weft flows --follow --verdict delivered)")
        });
        let end = if answered {
            "the probe's end was seen"
        } else {
            "no answer within 2 s"
        };
        format!("{end}{}", elsewhere.unwrap_or_default())
    }
}

/// Sends the probe.
///
/// # Errors
/// When the namespace cannot be entered or the kernel does not send.
pub(super) fn send(plan: &Plan) -> Result<(), ProbeError> {
    let Some(path) = &plan.netns else {
        return send_here(plan);
    };
    // A thread of its own: it changes its namespace and ends.
    thread::scope(|scope| {
        scope
            .spawn(|| {
                let failed = |source| ProbeError::Netns {
                    path: path.clone(),
                    source,
                };
                let file = File::open(path).map_err(failed)?;
                setns(file, CloneFlags::CLONE_NEWNET).map_err(|errno| failed(errno.into()))?;
                send_here(plan)
            })
            .join()
            .expect("sending does not panic")
    })
}

fn send_here(plan: &Plan) -> Result<(), ProbeError> {
    let failed = |what| {
        move |source| ProbeError::Send {
            what,
            from: plan.from.ip(),
            source,
        }
    };
    let (family, icmp) = if plan.from.is_ipv4() {
        (AddressFamily::Inet, SockProtocol::Icmp)
    } else {
        (AddressFamily::Inet6, SockProtocol::IcmpV6)
    };
    let protocol = if plan.is_tcp { SockProtocol::Tcp } else { icmp };
    let raw = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)
        .map_err(failed("make a socket for"))?;
    // A raw socket has no ports.
    let bare = |address: SocketAddr| SockaddrStorage::from(SocketAddr::new(address.ip(), 0));
    bind(raw.as_raw_fd(), &bare(plan.from)).map_err(failed("bind"))?;
    let bytes = if plan.is_tcp { syn(plan) } else { echo(plan) };
    sendto(raw.as_raw_fd(), &bytes, &bare(plan.to), MsgFlags::empty()).map_err(failed("send"))?;
    Ok(())
}

/// A SYN without options (RFC 9293 section 3.1), its initial sequence number marked.
fn syn(plan: &Plan) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(20);
    bytes.extend(plan.from.port().to_be_bytes());
    bytes.extend(plan.to.port().to_be_bytes());
    bytes.extend((u32::from(LOG_MARK) << 16).to_be_bytes());
    bytes.extend([0; 4]);
    // Five words of header, SYN, a usual window.
    bytes.extend([5 << 4, 0x02, 0xfa, 0xf0, 0, 0, 0, 0]);
    let mut sum = sum(&bytes) + 6 + bytes.len() as u32;
    for address in [plan.from.ip(), plan.to.ip()] {
        sum += match address {
            IpAddr::V4(v4) => self::sum(&v4.octets()),
            IpAddr::V6(v6) => self::sum(&v6.octets()),
        };
    }
    bytes[16..18].copy_from_slice(&checksum(sum).to_be_bytes());
    bytes
}

/// An echo request (RFC 792, RFC 4443), its sequence number the mark.
fn echo(plan: &Plan) -> Vec<u8> {
    let kind = if plan.from.is_ipv4() { 8 } else { 128 };
    let mut bytes = vec![kind, 0, 0, 0];
    bytes.extend(plan.from.port().to_be_bytes());
    bytes.extend(LOG_MARK.to_be_bytes());
    // ICMPv6's checksum is the kernel's to fill in (RFC 3542 section 3.1).
    if plan.from.is_ipv4() {
        let check = checksum(sum(&bytes));
        bytes[2..4].copy_from_slice(&check.to_be_bytes());
    }
    bytes
}

/// The sum of 16-bit words in network byte order (RFC 1071), not folded.
fn sum(bytes: &[u8]) -> u32 {
    bytes
        .chunks_exact(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum()
}

fn checksum(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(from: &str, to: &str, is_tcp: bool) -> Plan {
        Plan {
            netns: None,
            is_tcp,
            from: from.parse().unwrap(),
            to: to.parse().unwrap(),
            elsewhere: None,
        }
    }

    #[test]
    fn a_probe_is_marked_and_its_checksum_is_right() {
        for (from, to) in [
            ("10.16.0.2:40000", "10.24.0.5:80"),
            (
                "[fd12:3456:789a::1:0:2]:40000",
                "[fd12:3456:789a:1000:0:5::]:80",
            ),
        ] {
            let plan = plan(from, to, true);
            let segment = syn(&plan);
            assert_eq!(segment[4..6], LOG_MARK.to_be_bytes());
            let mut pseudo = sum(&segment) + 6 + 20;
            for address in [plan.from.ip(), plan.to.ip()] {
                pseudo += match address {
                    IpAddr::V4(v4) => sum(&v4.octets()),
                    IpAddr::V6(v6) => sum(&v6.octets()),
                };
            }
            assert_eq!(checksum(pseudo), 0, "a right packet sums to all ones");
        }
        let request = echo(&plan("10.16.0.2:7", "10.24.0.5:0", false));
        assert_eq!(request[6..8], LOG_MARK.to_be_bytes());
        assert_eq!(checksum(sum(&request)), 0);
    }
}
