//! Frames to a client, as if from the VIP that it talks to.

use ebpf_common::layout::{Addr, Endpoint, FlowKey};

/// `ETH_P_IP` and `ETH_P_IPV6` (linux/if_ether.h).
const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
/// How many hops it may take; it takes none.
const HOPS: u8 = 64;

pub(super) fn octets(address: &Addr) -> Vec<u8> {
    let octets = address.to_bits().to_be_bytes();
    octets[if address.is_v4() { 12 } else { 0 }..].to_vec()
}

/// A whole frame from the VIP of a forward entry to its client.
pub(super) fn frame(key: &FlowKey, endpoint: &Endpoint, proto: u8, payload: &[u8]) -> Vec<u8> {
    let addresses = addresses(key);
    let length = payload.len() as u16;
    let (kind, ip) = if key.dst.is_v4() {
        (ETH_P_IP, ip4(&addresses, proto, length))
    } else {
        (ETH_P_IPV6, ip6(&addresses, proto, length))
    };
    [
        &endpoint.mac[..],
        &endpoint.host_mac,
        &kind.to_be_bytes(),
        &ip,
        payload,
    ]
    .concat()
}

/// The VIP and the client of a forward entry, as the addresses of a packet to the client.
pub(super) fn addresses(key: &FlowKey) -> Vec<u8> {
    [octets(&key.dst), octets(&key.src)].concat()
}

/// An IPv4 header between two addresses.
pub(super) fn ip4(addresses: &[u8], proto: u8, payload: u16) -> Vec<u8> {
    let mut ip = vec![0x45, 0];
    ip.extend((20 + payload).to_be_bytes());
    ip.extend([0, 0, 0x40, 0, HOPS, proto, 0, 0]);
    ip.extend(addresses);
    let check = !fold(sum(&ip));
    ip[10..12].copy_from_slice(&check.to_be_bytes());
    ip
}

/// An IPv6 header between two addresses.
pub(super) fn ip6(addresses: &[u8], proto: u8, payload: u16) -> Vec<u8> {
    let mut ip = vec![0x60, 0, 0, 0];
    ip.extend(payload.to_be_bytes());
    ip.extend([proto, HOPS]);
    ip.extend(addresses);
    ip
}

/// The sum of 16-bit words in network byte order, an odd octet padded with zero (RFC 1071).
pub(super) fn sum(octets: &[u8]) -> u32 {
    octets
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)))
        .sum()
}

pub(super) fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}
