//! Packets as tests write and read them, with a checksum of their own.
//!
//! Reading checks every checksum and length on the way, so that a packet which a program made is either right
//! or refused with what is wrong.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// TCP flags.
pub const FIN: u8 = 0x01;
/// Opens.
pub const SYN: u8 = 0x02;
/// Resets.
pub const RST: u8 = 0x04;
/// Pushes.
pub const PSH: u8 = 0x08;
/// Acknowledges.
pub const ACK: u8 = 0x10;

/// What follows the IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP without options.
    Tcp {
        /// Sequence number.
        seq: u32,
        /// Acknowledgement number.
        ack: u32,
        /// Flags.
        flags: u8,
    },
    /// UDP.
    Udp,
    /// ICMP echo request; its identifier is `sport`.
    EchoRequest,
    /// ICMP echo reply; its identifier is `dport`.
    EchoReply,
    /// Any other ICMP message: its type and code; the payload starts with the header's last four bytes.
    Icmp(u8, u8),
}

/// A packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source address.
    pub src: IpAddr,
    /// Destination address, of the same family.
    pub dst: IpAddr,
    /// Source port.
    pub sport: u16,
    /// Destination port.
    pub dport: u16,
    /// What follows the IP header.
    pub transport: Transport,
    /// DSCP and ECN.
    pub tos: u8,
    /// Time to live or hop limit.
    pub ttl: u8,
    /// What follows the transport header.
    pub payload: Vec<u8>,
}

impl Packet {
    /// A TCP segment.
    #[must_use]
    pub fn tcp(src: (IpAddr, u16), dst: (IpAddr, u16), flags: u8, seq: u32, ack: u32) -> Self {
        Self::new(src, dst, Transport::Tcp { seq, ack, flags })
    }

    /// A UDP datagram.
    #[must_use]
    pub fn udp(src: (IpAddr, u16), dst: (IpAddr, u16), payload: &[u8]) -> Self {
        Self {
            payload: payload.to_vec(),
            ..Self::new(src, dst, Transport::Udp)
        }
    }

    /// An ICMP echo request.
    #[must_use]
    pub fn echo(src: IpAddr, dst: IpAddr, id: u16) -> Self {
        Self {
            payload: b"ping".to_vec(),
            ..Self::new((src, id), (dst, 0), Transport::EchoRequest)
        }
    }

    fn new(src: (IpAddr, u16), dst: (IpAddr, u16), transport: Transport) -> Self {
        Self {
            src: src.0,
            dst: dst.0,
            sport: src.1,
            dport: dst.1,
            transport,
            tos: 0,
            ttl: 64,
            payload: Vec::new(),
        }
    }

    /// The same packet the other way: what an exact echo of it would be.
    #[must_use]
    pub fn mirrored(&self) -> Self {
        Self {
            src: self.dst,
            dst: self.src,
            sport: self.dport,
            dport: self.sport,
            transport: match self.transport {
                Transport::EchoRequest => Transport::EchoReply,
                Transport::EchoReply => Transport::EchoRequest,
                other => other,
            },
            ..self.clone()
        }
    }

    /// What `sent` became, with the hop put back that a program takes off; panics where it took another number.
    #[must_use]
    pub fn hop_back(self, sent: &Self) -> Self {
        assert_eq!(self.ttl, sent.ttl - 1, "one hop: {sent:?}");
        Self {
            ttl: sent.ttl,
            ..self
        }
    }

    /// Source and destination of what answers this.
    #[must_use]
    pub fn mirrored_ends(&self) -> ((IpAddr, u16), (IpAddr, u16)) {
        ((self.dst, self.dport), (self.src, self.sport))
    }

    /// TCP's flags; panics for another protocol.
    #[must_use]
    pub fn flags(&self) -> u8 {
        match self.transport {
            Transport::Tcp { flags, .. } => flags,
            other => panic!("{other:?} has no flags"),
        }
    }

    fn proto(&self) -> u8 {
        match (self.transport, self.src) {
            (Transport::Tcp { .. }, _) => 6,
            (Transport::Udp, _) => 17,
            (_, IpAddr::V4(_)) => 1,
            (_, IpAddr::V6(_)) => 58,
        }
    }

    /// The packet from its IP header on.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let mut l4 = self.transport_bytes();
        let at = check_offset(self.proto());
        let sum = transport_sum(self.src, self.dst, self.proto(), &l4);
        let check = match (!fold(sum), self.proto()) {
            (0, 17) => 0xffff,
            (check, _) => check,
        };
        l4[at..at + 2].copy_from_slice(&check.to_be_bytes());
        let mut out = self.ip_header(l4.len());
        out.extend(l4);
        out
    }

    /// The packet in an Ethernet frame from a pod to its gateway.
    #[must_use]
    pub fn frame(&self) -> Vec<u8> {
        framed(&self.bytes())
    }

    fn transport_bytes(&self) -> Vec<u8> {
        let mut l4 = Vec::new();
        let echo = |kind: u8, id: u16| {
            let [high, low] = id.to_be_bytes();
            vec![kind, 0, 0, 0, high, low, 0, 7]
        };
        match (self.transport, self.src) {
            (Transport::Tcp { seq, ack, flags }, _) => {
                l4.extend(self.sport.to_be_bytes());
                l4.extend(self.dport.to_be_bytes());
                l4.extend(seq.to_be_bytes());
                l4.extend(ack.to_be_bytes());
                l4.extend([5 << 4, flags, 0xfa, 0xf0, 0, 0, 0, 0]);
            }
            (Transport::Udp, _) => {
                let len = u16::try_from(8 + self.payload.len()).expect("a datagram's length");
                l4.extend(self.sport.to_be_bytes());
                l4.extend(self.dport.to_be_bytes());
                l4.extend(len.to_be_bytes());
                l4.extend([0, 0]);
            }
            (Transport::EchoRequest, IpAddr::V4(_)) => l4 = echo(8, self.sport),
            (Transport::EchoRequest, IpAddr::V6(_)) => l4 = echo(128, self.sport),
            (Transport::EchoReply, IpAddr::V4(_)) => l4 = echo(0, self.dport),
            (Transport::EchoReply, IpAddr::V6(_)) => l4 = echo(129, self.dport),
            (Transport::Icmp(kind, code), _) => l4.extend([kind, code, 0, 0]),
        }
        l4.extend(&self.payload);
        l4
    }

    fn ip_header(&self, payload: usize) -> Vec<u8> {
        let mut out = Vec::new();
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let total = u16::try_from(20 + payload).expect("a packet's length");
                out.extend([0x45, self.tos]);
                out.extend(total.to_be_bytes());
                out.extend([0x12, 0x34, 0x40, 0, self.ttl, self.proto(), 0, 0]);
                out.extend(src.octets());
                out.extend(dst.octets());
                let check = !fold(sum(&out));
                out[10..12].copy_from_slice(&check.to_be_bytes());
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let payload = u16::try_from(payload).expect("a packet's length");
                out.extend([0x60 | (self.tos >> 4), self.tos << 4, 0xab, 0xcd]);
                out.extend(payload.to_be_bytes());
                out.extend([self.proto(), self.ttl]);
                out.extend(src.octets());
                out.extend(dst.octets());
            }
            _ => panic!("{} and {} are of two families", self.src, self.dst),
        }
        out
    }

    /// Reads a packet from its IP header on.
    ///
    /// # Errors
    ///
    /// What is wrong with it: a length, a checksum, a protocol that this does not know.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let (src, dst, proto, tos, ttl, l4) = match bytes.first().map(|first| first >> 4) {
            Some(4) => parse4(bytes)?,
            Some(6) => parse6(bytes)?,
            _ => return Err("neither IPv4 nor IPv6".into()),
        };
        if l4.len() < 8 {
            return Err(format!("{} bytes after the IP header", l4.len()));
        }
        let none = proto == 17 && l4[6..8] == [0, 0];
        let sum = fold(transport_sum(src, dst, proto, l4));
        if !none && sum != 0xffff {
            return Err(format!("transport checksum is off by {:#x}", !sum));
        }
        let word = |at: usize| u16::from_be_bytes([l4[at], l4[at + 1]]);
        let long = |at: usize| u32::from_be_bytes([l4[at], l4[at + 1], l4[at + 2], l4[at + 3]]);
        let (sport, dport, transport, header) = match (proto, l4[0]) {
            (6, _) if l4.len() < 20 => return Err("short TCP header".into()),
            (6, _) => (
                word(0),
                word(2),
                Transport::Tcp {
                    seq: long(4),
                    ack: long(8),
                    flags: l4[13],
                },
                usize::from(l4[12] >> 4) * 4,
            ),
            (17, _) if usize::from(word(4)) != l4.len() => {
                return Err(format!("UDP says {} bytes of {}", word(4), l4.len()));
            }
            (17, _) => (word(0), word(2), Transport::Udp, 8),
            (1, 8) | (58, 128) => (word(4), 0, Transport::EchoRequest, 8),
            (1, 0) | (58, 129) => (0, word(4), Transport::EchoReply, 8),
            (1 | 58, kind) => (0, 0, Transport::Icmp(kind, l4[1]), 4),
            (other, _) => return Err(format!("protocol {other}")),
        };
        Ok(Self {
            src,
            dst,
            sport,
            dport,
            transport,
            tos,
            ttl,
            payload: l4
                .get(header..)
                .ok_or("header longer than the packet")?
                .to_vec(),
        })
    }
}

/// Bytes in an Ethernet frame from a pod to its gateway.
#[must_use]
pub fn framed(packet: &[u8]) -> Vec<u8> {
    let mut out = vec![2, 0, 0, 9, 9, 9, 2, 0, 0, 8, 8, 8];
    out.extend(if packet.first().is_some_and(|first| first >> 4 == 6) {
        [0x86, 0xdd]
    } else {
        [0x08, 0x00]
    });
    out.extend(packet);
    out
}

type Ip<'a> = (IpAddr, IpAddr, u8, u8, u8, &'a [u8]);

fn parse4(bytes: &[u8]) -> Result<Ip<'_>, String> {
    let header = bytes.first_chunk::<20>().ok_or("short IPv4 header")?;
    let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
    if header[0] != 0x45 || total != bytes.len() {
        return Err(format!("IPv4 says {total} bytes of {}", bytes.len()));
    }
    if fold(sum(header)) != 0xffff {
        return Err("IPv4 header checksum".into());
    }
    let address = |at: usize| {
        let octets = [header[at], header[at + 1], header[at + 2], header[at + 3]];
        IpAddr::V4(Ipv4Addr::from(octets))
    };
    Ok((
        address(12),
        address(16),
        header[9],
        header[1],
        header[8],
        &bytes[20..],
    ))
}

fn parse6(bytes: &[u8]) -> Result<Ip<'_>, String> {
    let header = bytes.first_chunk::<40>().ok_or("short IPv6 header")?;
    let payload = usize::from(u16::from_be_bytes([header[4], header[5]]));
    if payload + 40 != bytes.len() {
        return Err(format!("IPv6 says {payload} bytes of {}", bytes.len() - 40));
    }
    let address = |at: usize| {
        let octets: [u8; 16] = header[at..at + 16].try_into().expect("sixteen octets");
        IpAddr::V6(Ipv6Addr::from(octets))
    };
    let tos = header[0] << 4 | header[1] >> 4;
    Ok((
        address(8),
        address(24),
        header[6],
        tos,
        header[7],
        &bytes[40..],
    ))
}

pub(super) fn check_offset(proto: u8) -> usize {
    match proto {
        6 => 16,
        17 => 6,
        _ => 2,
    }
}

pub(super) fn transport_sum(src: IpAddr, dst: IpAddr, proto: u8, l4: &[u8]) -> u64 {
    let tail = l4.len() as u64 + u64::from(proto);
    let pseudo = match (src, dst) {
        (IpAddr::V4(_), _) if proto == 1 => 0,
        (IpAddr::V4(src), IpAddr::V4(dst)) => sum(&src.octets()) + sum(&dst.octets()) + tail,
        (IpAddr::V6(src), IpAddr::V6(dst)) => sum(&src.octets()) + sum(&dst.octets()) + tail,
        _ => panic!("{src} and {dst} are of two families"),
    };
    pseudo + sum(l4)
}

/// The sum of the big-endian words; an odd last byte is the high half of one (RFC 1071).
pub(super) fn sum(bytes: &[u8]) -> u64 {
    bytes
        .chunks(2)
        .map(|pair| u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0)))
        .sum()
}

pub(super) fn fold(mut sum: u64) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).expect("folded to sixteen bits")
}
