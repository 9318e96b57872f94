//! Packets out of arbitrary bytes: mostly right ones between places that mean something, some broken.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use arbitrary::{Arbitrary, Result, Unstructured};
use ebpf_common::addr::NODE_ENDPOINT;
use weft_tests::program::{
    packet::{ACK, FIN, PSH, RST, SYN},
    stage::{CLIENT, Family, NODE, PORT, REMOTE_NODE, endpoint_address, vip_address},
    wire,
};

use super::SERVICES;

/// Ports that are declared, listened on, or neither.
const PORTS: [u16; 5] = [80, 8080, 40_000, 53, 0];
/// The kernel refuses test frames above this without fragments of its own kind.
const LARGEST: usize = 1900;

/// Flags of segments that mean something.
const FLAGS: [u8; 8] = [
    SYN,
    SYN | ACK,
    ACK,
    ACK | PSH,
    ACK | FIN,
    ACK | FIN,
    RST,
    ACK | RST,
];

/// What is drawn of a packet.
#[derive(Debug)]
pub(super) struct Drawn {
    v6: bool,
    src: End,
    dst: End,
    kind: Kind,
    ports: [u16; 2],
    mark: u32,
    tos: u8,
    hops: u8,
    extensions: Vec<(u8, [u8; 6])>,
    fragment: Option<(u16, bool)>,
    payload: u16,
    noise: Noise,
}

#[derive(Debug)]
enum End {
    /// The sender's own address, where it is a pod's.
    Own,
    Vip(u8),
    UnknownVip(u16),
    Local(u8),
    Remote(u8),
    Foreign([u8; 16]),
}

#[derive(Debug)]
enum Kind {
    Tcp {
        flags: u8,
        options: Vec<u8>,
    },
    Udp {
        without_checksum: bool,
    },
    EchoRequest,
    EchoReply,
    /// An ICMP error that quotes a packet the other way.
    Error {
        kind: u8,
        code: u8,
        inner: u8,
    },
    Other {
        proto: u8,
    },
}

/// What is wrong with a packet, if something is.
#[derive(Debug)]
enum Noise {
    None,
    Octets([(u16, u8); 3]),
    Cut(u16),
    Grown(u8),
}

// Drawn evenly, hardly a packet would be right in all its parts at once, and nothing would lie behind it.

impl<'a> Arbitrary<'a> for Drawn {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(Self {
            v6: u.arbitrary()?,
            src: End::source(u)?,
            dst: End::destination(u)?,
            kind: u.arbitrary()?,
            ports: [port(u, 40_000)?, port(u, PORT)?],
            mark: u.arbitrary()?,
            tos: u.arbitrary()?,
            hops: if u.ratio(1, 8)? {
                u.int_in_range(0..=3)?
            } else {
                64
            },
            extensions: rarely(u, |u| {
                let count = u.int_in_range(1..=4)?;
                (0..count).map(|_| u.arbitrary()).collect()
            })?
            .unwrap_or_default(),
            fragment: rarely(u, |u| Ok((u.int_in_range(0..=0x1fff)?, u.arbitrary()?)))?,
            payload: if u.ratio(1, 4)? {
                u.int_in_range(0..=1599)?
            } else {
                u.int_in_range(0..=15)?
            },
            noise: rarely(u, Unstructured::arbitrary)?.unwrap_or(Noise::None),
        })
    }
}

impl End {
    fn source(u: &mut Unstructured<'_>) -> Result<Self> {
        if u.ratio(7, 8)? {
            return Ok(Self::Own);
        }
        Self::any(u)
    }

    fn destination(u: &mut Unstructured<'_>) -> Result<Self> {
        if u.ratio(1, 2)? {
            return Ok(Self::Vip(u.arbitrary()?));
        }
        Self::any(u)
    }

    fn any(u: &mut Unstructured<'_>) -> Result<Self> {
        Ok(match u.int_in_range(0..=7)? {
            0 => Self::Own,
            1 => Self::Vip(u.arbitrary()?),
            2 => Self::UnknownVip(u.arbitrary()?),
            3..=4 => Self::Local(u.arbitrary()?),
            5..=6 => Self::Remote(u.arbitrary()?),
            _ => Self::Foreign(u.arbitrary()?),
        })
    }
}

impl<'a> Arbitrary<'a> for Kind {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(match u.int_in_range(0..=15)? {
            0..=6 => Self::Tcp {
                flags: if u.ratio(1, 2)? { SYN } else { flags(u)? },
                options: rarely(u, |u| {
                    let count = u.int_in_range(1..=40)?;
                    (0..count).map(|_| u.arbitrary()).collect()
                })?
                .unwrap_or_default(),
            },
            7..=10 => Self::Udp {
                without_checksum: u.ratio(1, 4)?,
            },
            11..=12 => Self::EchoRequest,
            13 => Self::EchoReply,
            14 => Self::Error {
                kind: *u.choose(&[3, 11, 12, 1, 2, 4, 5])?,
                code: u.int_in_range(0..=5)?,
                inner: u.arbitrary()?,
            },
            _ => Self::Other {
                proto: u.arbitrary()?,
            },
        })
    }
}

impl<'a> Arbitrary<'a> for Noise {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(match u.int_in_range(0..=3)? {
            0..=1 => Self::Octets(u.arbitrary()?),
            2 => Self::Cut(u.arbitrary()?),
            _ => Self::Grown(u.arbitrary()?),
        })
    }
}

/// Mostly flags that mean something.
pub(super) fn flags(u: &mut Unstructured<'_>) -> Result<u8> {
    if u.ratio(7, 8)? {
        return u.choose(&FLAGS).copied();
    }
    u.arbitrary()
}

fn port(u: &mut Unstructured<'_>, usual: u16) -> Result<u16> {
    if u.ratio(3, 4)? {
        return Ok(usual);
    }
    u.choose(&PORTS).copied()
}

fn rarely<'a, T>(
    u: &mut Unstructured<'a>,
    draw: impl FnOnce(&mut Unstructured<'a>) -> Result<T>,
) -> Result<Option<T>> {
    Ok(if u.ratio(1, 8)? { Some(draw(u)?) } else { None })
}

impl Drawn {
    /// The packet that the local endpoint `sender` sends, or that the tunnel brings.
    pub(super) fn bytes(&self, sender: Option<u32>) -> Vec<u8> {
        let own = match sender {
            Some(number) => self.endpoint(NODE, number),
            None => self.endpoint(REMOTE_NODE, 2),
        };
        let (src, dst) = (self.address(&self.src, own), self.address(&self.dst, own));
        let (proto, l4) = self.transport(src, dst);
        let mut out = self.packet(src, dst, proto, &l4);
        out.truncate(LARGEST);
        if out.len() < LARGEST && wire::walk(&out).is_ok() {
            wire::seal(&mut out);
        }
        self.noise.put_on(&mut out);
        out
    }

    fn family(&self) -> Family {
        if self.v6 { Family::V6 } else { Family::V4 }
    }

    fn endpoint(&self, node: u32, number: u32) -> IpAddr {
        endpoint_address(self.family(), node, number)
    }

    fn address(&self, end: &End, own: IpAddr) -> IpAddr {
        match *end {
            End::Own => own,
            End::Vip(number) => {
                let (service, policy, _) = SERVICES[usize::from(number) % SERVICES.len()];
                vip_address(self.family(), policy, service)
            }
            End::UnknownVip(service) => vip_address(
                self.family(),
                ebpf_common::addr::Policy::Balanced,
                service | 0x100,
            ),
            End::Local(number) => {
                let known = [NODE_ENDPOINT, CLIENT, 3, 4, 5];
                self.endpoint(NODE, known[usize::from(number) % known.len()])
            }
            End::Remote(number) => self.endpoint(REMOTE_NODE, 2 + u32::from(number % 2)),
            End::Foreign(octets) => match self.family() {
                Family::V4 => {
                    let [a, b, c, d, ..] = octets;
                    Ipv4Addr::new(a, b, c, d).into()
                }
                Family::V6 => Ipv6Addr::from(octets).into(),
            },
        }
    }

    fn transport(&self, src: IpAddr, dst: IpAddr) -> (u8, Vec<u8>) {
        let [sport, dport] = self.ports;
        let mut out = [sport.to_be_bytes(), dport.to_be_bytes()].concat();
        let payload = usize::from(self.payload);
        let number = self.mark.to_be_bytes();
        let icmp = if self.v6 { 58 } else { 1 };
        let proto = match &self.kind {
            Kind::Tcp { flags, options } => {
                let mut options = options.clone();
                options.resize(options.len().next_multiple_of(4), 0);
                out.extend(number);
                out.extend(number);
                let words = u8::try_from(5 + options.len() / 4).expect("at most forty bytes");
                out.extend([words << 4, *flags, 1, 0, 0, 0, 0, 0]);
                out.extend(options);
                wire::TCP
            }
            Kind::Udp { without_checksum } => {
                let length = u16::try_from(8 + payload).expect("below 2000");
                out.extend(length.to_be_bytes());
                out.extend([0, u8::from(!without_checksum)]);
                wire::UDP
            }
            Kind::EchoRequest | Kind::EchoReply => {
                let request = matches!(self.kind, Kind::EchoRequest);
                let kind = match (self.v6, request) {
                    (false, true) => 8,
                    (false, false) => 0,
                    (true, true) => 128,
                    (true, false) => 129,
                };
                out = vec![kind, 0, 0, 0];
                out.extend(sport.to_be_bytes());
                out.extend(dport.to_be_bytes());
                icmp
            }
            Kind::Error { kind, code, inner } => {
                out = vec![*kind, *code, 0, 0];
                out.extend(number);
                let quoted = [dport.to_be_bytes(), sport.to_be_bytes(), [0, 8], [0, 0]].concat();
                let proto = [6, 17, icmp, *inner][usize::from(*inner) % 4];
                out.extend(self.header(dst, src, proto, 8));
                out.extend(quoted);
                icmp
            }
            Kind::Other { proto } => *proto,
        };
        out.resize(out.len() + payload, 0xa5);
        (proto, out)
    }

    fn header(&self, src: IpAddr, dst: IpAddr, proto: u8, payload: usize) -> Vec<u8> {
        let (tos, ttl) = (self.tos, self.hops);
        let mark = self.mark.to_be_bytes();
        let mut out = Vec::new();
        match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let total = u16::try_from(20 + payload).unwrap_or(u16::MAX);
                out.extend([0x45, tos]);
                out.extend(total.to_be_bytes());
                out.extend([mark[0], mark[1], mark[2] & 0x40, 0, ttl, proto, 0, 0]);
                out.extend(src.octets());
                out.extend(dst.octets());
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let payload = u16::try_from(payload).unwrap_or(u16::MAX);
                out.extend([0x60 | tos >> 4, tos << 4, mark[0], mark[1]]);
                out.extend(payload.to_be_bytes());
                out.extend([proto, ttl]);
                out.extend(src.octets());
                out.extend(dst.octets());
            }
            _ => unreachable!("both are of the drawn family"),
        }
        out
    }

    fn packet(&self, src: IpAddr, dst: IpAddr, proto: u8, l4: &[u8]) -> Vec<u8> {
        let extensions = &self.extensions;
        let mut out;
        if self.v6 {
            let mut chain: Vec<(u8, [u8; 6])> = extensions
                .iter()
                .map(|&(kind, body)| ([0, 43, 60, 51, 135, 60][usize::from(kind) % 6], body))
                .collect();
            if let Some((offset, more)) = self.fragment {
                let word = (offset << 3 | u16::from(more)).to_be_bytes();
                chain.push((wire::FRAGMENT, [word[0], word[1], 0, 0, 0, 9]));
            }
            let mut numbers: Vec<u8> = chain.iter().map(|&(kind, _)| kind).collect();
            numbers.push(proto);
            out = self.header(src, dst, numbers[0], 8 * chain.len() + l4.len());
            for ((_, body), next) in chain.iter().zip(&numbers[1..]) {
                out.extend([*next, 0]);
                out.extend(body);
            }
        } else {
            let options: Vec<u8> = extensions
                .iter()
                .flat_map(|&(kind, [a, b, ..])| [kind, 4, a, b])
                .collect();
            out = self.header(src, dst, proto, options.len() + l4.len());
            out[0] += u8::try_from(options.len() / 4).expect("at most four");
            if let Some((offset, more)) = self.fragment {
                let word = offset & 0x1fff | u16::from(more) << 13;
                out[6..8].copy_from_slice(&word.to_be_bytes());
            }
            out.extend(options);
        }
        out.extend(l4);
        out
    }
}

impl Noise {
    fn put_on(&self, packet: &mut Vec<u8>) {
        packet.resize(packet.len().max(40), 0);
        match self {
            Self::None => {}
            Self::Octets(changes) => {
                for (at, value) in changes {
                    let at = usize::from(*at) % packet.len().min(120);
                    packet[at] ^= value;
                }
            }
            // Shorter than an IP header, the kernel does not take it for a test.
            Self::Cut(to) => packet.truncate(40 + usize::from(*to) % packet.len()),
            Self::Grown(by) => packet.resize(packet.len() + usize::from(*by), 0x5a),
        }
    }
}

/// What answers a packet exactly.
pub(super) fn answer(seen: &[u8], flags: u8) -> Vec<u8> {
    again(&wire::mirrored(seen), flags)
}

/// A packet once more, with other flags if it is a segment.
pub(super) fn again(packet: &[u8], flags: u8) -> Vec<u8> {
    let mut out = packet.to_vec();
    let Ok(layout) = wire::check(&out) else {
        return out;
    };
    if layout.proto == wire::TCP && layout.fragment.is_none() {
        out[layout.l4.start + 13] = flags;
        wire::seal(&mut out);
    }
    out
}

/// A packet in two fragments, where it can be cut.
pub(super) fn cut(packet: &[u8], at: u8) -> Vec<Vec<u8>> {
    match wire::check(packet) {
        Ok(layout) if layout.fragment.is_none() && layout.l4.len() > 8 => {
            let places = (layout.l4.len() - 1) / 8;
            let place = 8 * (1 + usize::from(at) % places);
            wire::fragments(packet, place, u32::from(at)).to_vec()
        }
        _ => vec![packet.to_vec()],
    }
}
