//! Protocol headers as they stand in a packet.
//!
//! Every field that is wider than a byte is in network byte order; `_be` marks those whose value is used as a
//! number. The natural alignment of these structs (2 or 4) is what the kernel promises for headers on the
//! architectures we run on: they read unaligned words at full speed.

/// IEEE 802.3, 14 bytes.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Ethernet {
    pub(crate) dst: [u8; 6],
    pub(crate) src: [u8; 6],
    pub(crate) kind_be: u16,
}

/// RFC 791 without options, 20 bytes.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Ipv4 {
    pub(crate) version_ihl: u8,
    pub(crate) tos: u8,
    pub(crate) total_be: u16,
    pub(crate) id_be: u16,
    pub(crate) fragment_be: u16,
    pub(crate) ttl: u8,
    pub(crate) proto: u8,
    pub(crate) check: u16,
    pub(crate) src: u32,
    pub(crate) dst: u32,
}

/// RFC 8200, 40 bytes.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Ipv6 {
    pub(crate) version_be: u32,
    pub(crate) payload_be: u16,
    pub(crate) next: u8,
    pub(crate) hops: u8,
    pub(crate) src: [u32; 4],
    pub(crate) dst: [u32; 4],
}

/// RFC 9293 without options, 20 bytes.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Tcp {
    pub(crate) sport_be: u16,
    pub(crate) dport_be: u16,
    pub(crate) seq_be: u32,
    pub(crate) ack_be: u32,
    pub(crate) offset: u8,
    pub(crate) flags: u8,
    pub(crate) window_be: u16,
    pub(crate) check: u16,
    pub(crate) urgent_be: u16,
}

/// RFC 768, 8 bytes.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Udp {
    pub(crate) sport_be: u16,
    pub(crate) dport_be: u16,
    pub(crate) len_be: u16,
    pub(crate) check: u16,
}

/// RFC 792 and RFC 4443, the first 8 bytes; `rest` is identifier and sequence number of an echo.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Icmp {
    pub(crate) kind: u8,
    pub(crate) code: u8,
    pub(crate) check: u16,
    pub(crate) rest: [u16; 2],
}

pub(crate) const ETHERNET_LEN: usize = size_of::<Ethernet>();
pub(crate) const IPV4_LEN: usize = size_of::<Ipv4>();
pub(crate) const IPV6_LEN: usize = size_of::<Ipv6>();
pub(crate) const TCP_LEN: usize = size_of::<Tcp>();
pub(crate) const UDP_LEN: usize = size_of::<Udp>();
pub(crate) const ICMP_LEN: usize = size_of::<Icmp>();

/// IEEE 802 numbers: IPv4.
pub(crate) const ETH_P_IP: u16 = 0x0800;
/// IPv6.
pub(crate) const ETH_P_IPV6: u16 = 0x86dd;

/// `Ipv4::version_ihl` of a header without options.
pub(crate) const IPV4_PLAIN: u8 = 0x45;
/// The bits of `Ipv4::fragment_be` that make a packet a fragment: more-fragments and the offset.
pub(crate) const IPV4_FRAGMENT: u16 = 0x3fff;
/// Of those the offset, in units of eight bytes.
pub(crate) const IPV4_OFFSET: u16 = 0x1fff;

pub(crate) const TCP_FIN: u8 = 0x01;
pub(crate) const TCP_SYN: u8 = 0x02;
pub(crate) const TCP_RST: u8 = 0x04;
pub(crate) const TCP_ACK: u8 = 0x10;

pub(crate) const ICMP4_ECHO_REPLY: u8 = 0;
pub(crate) const ICMP4_UNREACHABLE: u8 = 3;
pub(crate) const ICMP4_ECHO_REQUEST: u8 = 8;
pub(crate) const ICMP4_TIME_EXCEEDED: u8 = 11;
pub(crate) const ICMP4_PARAMETER_PROBLEM: u8 = 12;

pub(crate) const ICMP6_UNREACHABLE: u8 = 1;
pub(crate) const ICMP6_TOO_BIG: u8 = 2;
pub(crate) const ICMP6_TIME_EXCEEDED: u8 = 3;
pub(crate) const ICMP6_PARAMETER_PROBLEM: u8 = 4;
pub(crate) const ICMP6_ECHO_REQUEST: u8 = 128;
pub(crate) const ICMP6_ECHO_REPLY: u8 = 129;

const _: () = {
    assert!(ETHERNET_LEN == 14);
    assert!(IPV4_LEN == 20);
    assert!(IPV6_LEN == 40);
    assert!(TCP_LEN == 20);
    assert!(UDP_LEN == 8);
    assert!(ICMP_LEN == 8);
};
