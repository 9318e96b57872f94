//! What a packet says, as a flow key.
//!
//! Only plain headers pass: IPv4 without options, IPv6 without extension headers, no fragments. So the transport
//! header stands at one of two offsets, and everything after this file can rely on it.

use ebpf_common::{
    layout::{Addr, Flow, FlowKey, LOG_MARK, PROTO_ICMP, PROTO_ICMP6, PROTO_TCP, PROTO_UDP},
    reason::Reason,
};

use crate::{
    header::{
        ETH_P_IP, ETH_P_IPV6, Ethernet, ICMP_LEN, ICMP4_ECHO_REPLY, ICMP4_ECHO_REQUEST,
        ICMP4_PARAMETER_PROBLEM, ICMP4_TIME_EXCEEDED, ICMP4_UNREACHABLE, ICMP6_ECHO_REPLY,
        ICMP6_ECHO_REQUEST, ICMP6_PARAMETER_PROBLEM, ICMP6_UNREACHABLE, IPV4_FRAGMENT, IPV4_LEN,
        IPV4_PLAIN, IPV6_LEN, Icmp, Ipv4, Ipv6, TCP_ACK, TCP_FIN, TCP_LEN, TCP_RST, TCP_SYN, Tcp,
        UDP_LEN, Udp,
    },
    skb::Skb,
    translate::Tuple,
};

/// The version of the IP header.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    /// The family that an Ethernet header says.
    #[inline(always)]
    pub(crate) fn of_frame(skb: &Skb) -> Result<Self, Reason> {
        match skb
            .header::<Ethernet>(0)
            .map(|ethernet| u16::from_be(ethernet.kind_be))
        {
            Some(ETH_P_IP) => Ok(Self::V4),
            Some(ETH_P_IPV6) => Ok(Self::V6),
            Some(_) => Err(Reason::NotMesh),
            None => Err(Reason::Malformed),
        }
    }

    /// The family that the first octet of an IP header says.
    #[inline(always)]
    pub(crate) fn of_packet(skb: &Skb) -> Result<Self, Reason> {
        match skb
            .header::<[u16; 1]>(0)
            .map(|[word]| word.to_ne_bytes()[0] >> 4)
        {
            Some(4) => Ok(Self::V4),
            Some(6) => Ok(Self::V6),
            _ => Err(Reason::Malformed),
        }
    }

    /// The length of the IP header.
    #[inline(always)]
    pub(crate) const fn len(self) -> usize {
        match self {
            Self::V4 => IPV4_LEN,
            Self::V6 => IPV6_LEN,
        }
    }
}

/// What follows the IP header.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Tcp,
    Udp,
    EchoRequest,
    EchoReply,
    IcmpError,
}

/// A packet's tuple and what its flow needs to know of it. It lives in a map ([`crate::maps::scratch`]).
pub(crate) struct Packet {
    /// The tuple; `endpoint` and `direction` are the caller's to set.
    pub(crate) key: FlowKey,
    /// Whether addresses and protocol in `key` are this packet's: 0 or 1.
    pub(crate) known: u32,
    /// For whom it is counted, once that is known: the VIP's counter and the backend's index; 0 before.
    pub(crate) counter: u32,
    pub(crate) backend: u32,
    /// The number of the endpoint that sent it; 0 is the tunnel.
    pub(crate) sender: u32,
    /// Whether it carries [`LOG_MARK`]: 0 or 1.
    pub(crate) marked: u32,
    pub(crate) family: Family,
    pub(crate) kind: Kind,
    /// TCP's flags; 0 for the others.
    pub(crate) tcp_flags: u8,
    /// TCP's sequence number; 0 for the others.
    pub(crate) seq_be: u32,
    /// What it becomes, once that is decided.
    pub(crate) to: Tuple,
    /// For an ICMP error: the key of the flow that it is about.
    pub(crate) quoted: FlowKey,
}

impl Packet {
    /// A TCP segment that opens a connection.
    #[inline(always)]
    pub(crate) const fn opens(&self) -> bool {
        self.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN
    }

    /// A TCP segment that accepts a connection.
    #[inline(always)]
    pub(crate) const fn accepts(&self) -> bool {
        self.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN | TCP_ACK
    }

    /// A TCP segment that ends its direction, or the connection.
    #[inline(always)]
    pub(crate) const fn closes(&self) -> bool {
        self.tcp_flags & (TCP_FIN | TCP_RST) != 0
    }
}

impl Packet {
    /// Nothing is known of the packet that comes now.
    #[inline(always)]
    pub(crate) fn begin(&mut self) {
        self.sender = 0;
        self.marked = 0;
        self.known = 0;
        self.counter = 0;
        self.backend = 0;
    }

    /// Notes for whom it is counted.
    #[inline(always)]
    pub(crate) fn belongs_to(&mut self, flow: &Flow) {
        self.counter = flow.counter;
        self.backend = flow.backend;
    }

    /// Reads the headers from `l2` on, the offset of the IP header.
    #[inline(always)]
    pub(crate) fn read(&mut self, skb: &Skb, l2: usize, family: Family) -> Result<(), Reason> {
        self.key.sport_be = 0;
        self.key.dport_be = 0;
        self.key.pad = 0;
        self.family = family;
        self.tcp_flags = 0;
        self.seq_be = 0;
        let payload = match family {
            Family::V4 => ipv4(skb, l2, self)?,
            Family::V6 => ipv6(skb, l2, self)?,
        };
        self.known = 1;
        let l4 = l2 + family.len();
        match (family, self.key.proto) {
            (_, PROTO_TCP) => tcp(skb, l4, payload, self),
            (_, PROTO_UDP) => udp(skb, l4, payload, self),
            (Family::V4, PROTO_ICMP) | (Family::V6, PROTO_ICMP6) => icmp(skb, l4, payload, self),
            (Family::V6, next) => Err(unwalked(next)),
            (Family::V4, _) => Err(Reason::Protocol),
        }
    }
}

/// Bytes of the packet from the IP header on.
#[inline(always)]
fn available(skb: &Skb, l2: usize) -> usize {
    (skb.len() as usize).wrapping_sub(l2)
}

/// Reads the IP header; the length of what follows it.
#[inline(always)]
fn ipv4(skb: &Skb, l2: usize, packet: &mut Packet) -> Result<usize, Reason> {
    let ip = skb.header::<Ipv4>(l2).ok_or(Reason::Malformed)?;
    let total = usize::from(u16::from_be(ip.total_be));
    // Multicast and broadcast are no place in a mesh; told apart first, because IGMP comes with options.
    if ip.dst.to_ne_bytes()[0] >= 224 {
        return Err(Reason::NotMesh);
    }
    if ip.version_ihl != IPV4_PLAIN {
        return Err(if ip.version_ihl >> 4 == 4 && ip.version_ihl & 15 > 5 {
            Reason::HeaderChain
        } else {
            Reason::Malformed
        });
    }
    if u16::from_be(ip.fragment_be) & IPV4_FRAGMENT != 0 {
        return Err(Reason::Fragment);
    }
    if total > available(skb, l2) || total < IPV4_LEN {
        return Err(Reason::Malformed);
    }
    packet.key.src = Addr::from_v4_be(ip.src);
    packet.key.dst = Addr::from_v4_be(ip.dst);
    packet.key.proto = ip.proto;
    Ok(total - IPV4_LEN)
}

/// Reads the IP header; the length of what follows it.
#[inline(always)]
fn ipv6(skb: &Skb, l2: usize, packet: &mut Packet) -> Result<usize, Reason> {
    let ip = skb.header::<Ipv6>(l2).ok_or(Reason::Malformed)?;
    let payload = usize::from(u16::from_be(ip.payload_be));
    if ip.version_be.to_ne_bytes()[0] >> 4 != 6 || payload + IPV6_LEN > available(skb, l2) {
        return Err(Reason::Malformed);
    }
    // Multicast, as above: neighbour and listener discovery are what every IPv6 link chatters.
    if ip.dst[0].to_ne_bytes()[0] == 0xff {
        return Err(Reason::NotMesh);
    }
    packet.key.src.words = ip.src;
    packet.key.dst.words = ip.dst;
    packet.key.proto = ip.next;
    Ok(payload)
}

/// Why an IPv6 next header is not walked.
#[inline(always)]
const fn unwalked(next: u8) -> Reason {
    match next {
        44 => Reason::Fragment,
        // Hop-by-hop, routing, authentication, destination options, mobility, HIP, shim6 (IANA).
        0 | 43 | 51 | 60 | 135 | 139 | 140 => Reason::HeaderChain,
        _ => Reason::Protocol,
    }
}

#[inline(always)]
fn tcp(skb: &Skb, l4: usize, payload: usize, packet: &mut Packet) -> Result<(), Reason> {
    let tcp = skb.header::<Tcp>(l4).ok_or(Reason::Malformed)?;
    let header = usize::from(tcp.offset >> 4) * 4;
    if header < TCP_LEN || header > payload {
        return Err(Reason::Malformed);
    }
    packet.kind = Kind::Tcp;
    packet.key.sport_be = tcp.sport_be;
    packet.key.dport_be = tcp.dport_be;
    packet.tcp_flags = tcp.flags;
    packet.seq_be = tcp.seq_be;
    if tcp.flags & (TCP_SYN | TCP_RST) != 0 {
        let number_be = if tcp.flags & TCP_ACK == 0 {
            tcp.seq_be
        } else {
            tcp.ack_be
        };
        packet.marked = u32::from(u32::from_be(number_be) >> 16 == u32::from(LOG_MARK));
    }
    Ok(())
}

#[inline(always)]
fn udp(skb: &Skb, l4: usize, payload: usize, packet: &mut Packet) -> Result<(), Reason> {
    let udp = skb.header::<Udp>(l4).ok_or(Reason::Malformed)?;
    let len = usize::from(u16::from_be(udp.len_be));
    // An aggregate of several datagrams has a length of its own.
    if skb.segment_len() == 0 && (len < UDP_LEN || len > payload) {
        return Err(Reason::Malformed);
    }
    packet.kind = Kind::Udp;
    packet.key.sport_be = udp.sport_be;
    packet.key.dport_be = udp.dport_be;
    Ok(())
}

#[inline(always)]
fn icmp(skb: &Skb, l4: usize, payload: usize, packet: &mut Packet) -> Result<(), Reason> {
    let icmp = skb.header::<Icmp>(l4).ok_or(Reason::Malformed)?;
    if payload < ICMP_LEN {
        return Err(Reason::Malformed);
    }
    packet.kind = match (packet.family, icmp.kind) {
        (Family::V4, ICMP4_ECHO_REQUEST) | (Family::V6, ICMP6_ECHO_REQUEST) => Kind::EchoRequest,
        (Family::V4, ICMP4_ECHO_REPLY) | (Family::V6, ICMP6_ECHO_REPLY) => Kind::EchoReply,
        (Family::V4, ICMP4_UNREACHABLE | ICMP4_TIME_EXCEEDED | ICMP4_PARAMETER_PROBLEM)
        | (Family::V6, ICMP6_UNREACHABLE..=ICMP6_PARAMETER_PROBLEM) => Kind::IcmpError,
        _ => return Err(Reason::Protocol),
    };
    match packet.kind {
        Kind::EchoRequest => packet.key.sport_be = icmp.rest[0],
        Kind::EchoReply => packet.key.dport_be = icmp.rest[0],
        _ => return Ok(()),
    }
    packet.marked = u32::from(u16::from_be(icmp.rest[1]) == LOG_MARK);
    Ok(())
}
