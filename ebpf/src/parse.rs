//! What a packet says, as a flow key.
//!
//! Plain headers are read here: IPv4 without options, IPv6 without extension headers, no fragments. What is not
//! plain is walked in [`odd`]; after that nothing depends on it but the place of the transport header
//! ([`Packet::l4`]), and that a later fragment has none ([`Packet::is_later`]).

pub(crate) mod odd;

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
    maps::{self, Cursor},
    skb::{Skb, copy_address},
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

/// Which part of a datagram a packet is.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Part {
    /// All of it.
    Whole,
    /// The first fragment, with all headers.
    First,
    /// A fragment without a transport header that is not the last.
    Later,
    /// The last fragment.
    Last,
}

/// A packet's tuple and what its flow needs to know of it. It lives in a map ([`crate::maps::scratch`]).
pub(crate) struct Packet {
    /// The tuple; `endpoint` and `direction` are the caller's to set. A later fragment has no ports.
    pub(crate) key: FlowKey,
    /// Whether addresses and protocol in `key` are this packet's: 0 or 1.
    pub(crate) known: u32,
    /// For whom it is counted, once that is known: the VIP's counter and the backend's index; 0 before.
    pub(crate) counter: u32,
    pub(crate) backend: u32,
    /// The number of the endpoint that sent it; 0 is the tunnel.
    pub(crate) sender: u32,
    /// Of a SYN that opened a connection: whether that has a place of its own, 0 or 1.
    pub(crate) placed: u32,
    /// Whether it carries [`LOG_MARK`]: 0 or 1.
    pub(crate) marked: u32,
    pub(crate) family: Family,
    /// Of a later fragment: nothing that can be relied on.
    pub(crate) kind: Kind,
    pub(crate) part: Part,
    /// Time to live or hop limit.
    pub(crate) hops: u8,
    /// TCP's flags; 0 for the others.
    pub(crate) tcp_flags: u8,
    /// TCP's sequence number; 0 for the others.
    pub(crate) seq_be: u32,
    /// TCP's acknowledgement number; nothing that can be relied on for the others.
    pub(crate) ack_be: u32,
    /// What it becomes, once that is decided.
    pub(crate) to: Tuple,
    /// For an ICMP error: the key of the flow that it is about.
    pub(crate) quoted: FlowKey,
    /// Where the IP packet ends, an offset as every other.
    pub(crate) end: u32,
    /// Length of the transport header, bytes.
    pub(crate) l4_len: u32,
    /// Of a fragment: where its bytes belong in the datagram, and the datagram's identification.
    pub(crate) offset: u32,
    pub(crate) id_be: u32,
    /// What the path of a packet that is too big for it carries, bytes.
    pub(crate) path_mtu: u32,
    /// Where the transport header is, or the data of a later fragment.
    pub(crate) l4: Cursor,
    /// For walks: the kind of the next header, a place among options.
    pub(crate) next: Cursor,
    pub(crate) at: Cursor,
    /// Bytes of the packet that an answer quotes.
    pub(crate) quote: [u8; QUOTE_MOST],
}

/// The longest quote of an answer: an IPv6 header with a chain, and a TCP header.
pub(crate) const QUOTE_MOST: usize = odd::DEEPEST;

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

    /// The number that acknowledges a TCP segment with a FIN.
    #[inline(always)]
    pub(crate) fn fin_acknowledged_be(&self) -> u32 {
        let payload = (payload(self) as u32).wrapping_sub(self.l4_len);
        u32::from_be(self.seq_be)
            .wrapping_add(payload)
            .wrapping_add(1)
            .to_be()
    }

    /// Whether a TCP segment acknowledges what ends before `number_be`, and nothing after it.
    #[inline(always)]
    pub(crate) const fn acknowledges(&self, number_be: u32) -> bool {
        self.tcp_flags & TCP_ACK != 0 && self.ack_be == number_be
    }

    /// The offset of the transport header; a bound that the verifier knows is part of it.
    #[inline(always)]
    pub(crate) fn l4(&self) -> usize {
        self.l4.get() & odd::FURTHEST
    }

    /// Notes that the packet goes on as it is, as far as is known yet.
    #[inline(always)]
    pub(crate) fn stays(&mut self) {
        if self.part == Part::First {
            self.to.src = self.key.src;
            self.to.dst = self.key.dst;
        }
    }

    /// A fragment without transport header.
    #[inline(always)]
    pub(crate) const fn is_later(&self) -> bool {
        matches!(self.part, Part::Later | Part::Last)
    }
}

impl Packet {
    /// Nothing is known of the packet that comes now.
    #[inline(always)]
    pub(crate) fn begin(&mut self) {
        maps::clear([
            &mut self.sender,
            &mut self.marked,
            &mut self.known,
            &mut self.counter,
            &mut self.backend,
        ]);
    }

    /// Notes for whom it is counted.
    #[inline(always)]
    pub(crate) fn belongs_to(&mut self, flow: &Flow) {
        self.counter = flow.counter;
        self.backend = flow.backend;
    }

    /// Reads the headers from `l2` on, the offset of the IP header.
    #[inline(always)]
    pub(crate) fn read(&mut self, skb: &mut Skb, l2: usize, family: Family) -> Result<(), Reason> {
        self.key.sport_be = 0;
        self.key.dport_be = 0;
        self.key.pad = 0;
        self.family = family;
        self.part = Part::Whole;
        self.tcp_flags = 0;
        self.seq_be = 0;
        match family {
            Family::V4 => ipv4(skb, l2, self)?,
            Family::V6 => ipv6(skb, l2, self)?,
        }
        self.known = 1;
        if self.is_later() {
            self.kind = Kind::Udp;
            return Ok(());
        }
        match (family, self.key.proto) {
            (_, PROTO_TCP) => tcp(skb, self),
            (_, PROTO_UDP) => udp(skb, self),
            (Family::V4, PROTO_ICMP) | (Family::V6, PROTO_ICMP6) => icmp(skb, self),
            _ => Err(Reason::Protocol),
        }
    }
}

/// Bytes of the packet from the IP header on.
#[inline(always)]
fn available(skb: &Skb, l2: usize) -> usize {
    (skb.len() as usize).wrapping_sub(l2)
}

/// Reads the IP header.
#[inline(always)]
fn ipv4(skb: &mut Skb, l2: usize, packet: &mut Packet) -> Result<(), Reason> {
    let ip = skb.header::<Ipv4>(l2).ok_or(Reason::Malformed)?;
    // Multicast and broadcast are no place in a mesh.
    if ip.dst.to_ne_bytes()[0] >= 224 {
        return Err(Reason::NotMesh);
    }
    let total = usize::from(u16::from_be(ip.total_be));
    if total > available(skb, l2) || total < IPV4_LEN {
        return Err(Reason::Malformed);
    }
    packet.key.src = Addr::from_v4_be(ip.src);
    packet.key.dst = Addr::from_v4_be(ip.dst);
    packet.key.proto = ip.proto;
    packet.hops = ip.ttl;
    packet.end = (l2 + total) as u32;
    if ip.version_ihl == IPV4_PLAIN && u16::from_be(ip.fragment_be) & IPV4_FRAGMENT == 0 {
        packet.l4.set(l2 + IPV4_LEN);
        return Ok(());
    }
    odd::ipv4(skb, l2, packet)
}

/// Reads the IP header.
#[inline(always)]
fn ipv6(skb: &mut Skb, l2: usize, packet: &mut Packet) -> Result<(), Reason> {
    let ip = skb.header::<Ipv6>(l2).ok_or(Reason::Malformed)?;
    let total = IPV6_LEN + usize::from(u16::from_be(ip.payload_be));
    if ip.version_be.to_ne_bytes()[0] >> 4 != 6 || total > available(skb, l2) {
        return Err(Reason::Malformed);
    }
    // Multicast, as above: neighbour and listener discovery are what every IPv6 link chatters.
    if ip.dst[0].to_ne_bytes()[0] == 0xff {
        return Err(Reason::NotMesh);
    }
    copy_address(&mut packet.key.src.words, &ip.src);
    copy_address(&mut packet.key.dst.words, &ip.dst);
    packet.key.proto = ip.next;
    packet.hops = ip.hops;
    packet.end = (l2 + total) as u32;
    if matches!(ip.next, PROTO_TCP | PROTO_UDP | PROTO_ICMP6) {
        packet.l4.set(l2 + IPV6_LEN);
        return Ok(());
    }
    packet.next.set(usize::from(ip.next));
    odd::ipv6(skb, l2, packet)
}

/// Bytes after the IP header and what belongs to it.
#[inline(always)]
fn payload(packet: &Packet) -> usize {
    packet.end.wrapping_sub(packet.l4() as u32) as usize
}

/// Why a transport header that is not all there is refused: in a first fragment somebody hides the rest of it.
#[inline(always)]
fn cut_short(packet: &Packet) -> Reason {
    match packet.part {
        Part::Whole => Reason::Malformed,
        _ => Reason::Fragment,
    }
}

#[inline(always)]
fn tcp(skb: &Skb, packet: &mut Packet) -> Result<(), Reason> {
    let payload = payload(packet);
    let tcp = skb
        .header::<Tcp>(packet.l4())
        .ok_or_else(|| cut_short(packet))?;
    let header = usize::from(tcp.offset >> 4) * 4;
    if header < TCP_LEN {
        return Err(Reason::Malformed);
    }
    if header > payload {
        return Err(cut_short(packet));
    }
    packet.kind = Kind::Tcp;
    packet.key.sport_be = tcp.sport_be;
    packet.key.dport_be = tcp.dport_be;
    packet.tcp_flags = tcp.flags;
    packet.seq_be = tcp.seq_be;
    packet.ack_be = tcp.ack_be;
    if tcp.flags & (TCP_SYN | TCP_RST) != 0 {
        let number_be = if tcp.flags & TCP_ACK == 0 {
            tcp.seq_be
        } else {
            tcp.ack_be
        };
        packet.marked = u32::from(u32::from_be(number_be) >> 16 == u32::from(LOG_MARK));
    }
    packet.l4_len = header as u32;
    Ok(())
}

#[inline(always)]
fn udp(skb: &Skb, packet: &mut Packet) -> Result<(), Reason> {
    let payload = payload(packet);
    let udp = skb
        .header::<Udp>(packet.l4())
        .ok_or_else(|| cut_short(packet))?;
    let len = usize::from(u16::from_be(udp.len_be));
    // An aggregate of several datagrams has a length of its own, and the first fragment that of the whole.
    if payload < UDP_LEN {
        return Err(cut_short(packet));
    }
    if packet.part == Part::Whole && skb.segment_len() == 0 && (len < UDP_LEN || len > payload) {
        return Err(Reason::Malformed);
    }
    packet.kind = Kind::Udp;
    packet.key.sport_be = udp.sport_be;
    packet.key.dport_be = udp.dport_be;
    packet.l4_len = UDP_LEN as u32;
    Ok(())
}

#[inline(always)]
fn icmp(skb: &Skb, packet: &mut Packet) -> Result<(), Reason> {
    let payload = payload(packet);
    let icmp = skb
        .header::<Icmp>(packet.l4())
        .ok_or_else(|| cut_short(packet))?;
    if payload < ICMP_LEN {
        return Err(cut_short(packet));
    }
    packet.l4_len = ICMP_LEN as u32;
    packet.kind = match (packet.family, icmp.kind) {
        (Family::V4, ICMP4_ECHO_REQUEST) | (Family::V6, ICMP6_ECHO_REQUEST) => Kind::EchoRequest,
        (Family::V4, ICMP4_ECHO_REPLY) | (Family::V6, ICMP6_ECHO_REPLY) => Kind::EchoReply,
        (Family::V4, ICMP4_UNREACHABLE | ICMP4_TIME_EXCEEDED | ICMP4_PARAMETER_PROBLEM)
        | (Family::V6, ICMP6_UNREACHABLE..=ICMP6_PARAMETER_PROBLEM) => Kind::IcmpError,
        _ => return Err(Reason::Protocol),
    };
    // What it quotes is all in the first packet; errors are never larger than every path carries.
    if packet.kind == Kind::IcmpError && packet.part != Part::Whole {
        return Err(Reason::Fragment);
    }
    match packet.kind {
        Kind::EchoRequest => packet.key.sport_be = icmp.rest[0],
        Kind::EchoReply => packet.key.dport_be = icmp.rest[0],
        _ => return Ok(()),
    }
    packet.marked = u32::from(u16::from_be(icmp.rest[1]) == LOG_MARK);
    Ok(())
}
