//! The segment that makes a pod speak, as a whole frame.

use ebpf_common::layout::{Addr, Endpoint, Flow, FlowKey, PROTO_TCP};

/// `ETH_P_IP` and `ETH_P_IPV6` (linux/if_ether.h).
const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
/// A TCP header without options, and the one octet after it.
const TCP_LEN: u16 = 20;
const PAYLOAD: u16 = 1;
/// How many hops it may take; it takes none.
const HOPS: u8 = 64;
const ACK: u8 = 0x10;

/// One octet from the VIP of a forward entry to its client, at a sequence number that is not the next.
///
/// It is the client's own first sequence number: any but the one in 2^32 that is expected does, because a segment
/// outside the window is answered, and one inside of it, too, for the octets that are missing before it.
#[must_use]
pub fn segment(key: &FlowKey, flow: &Flow, endpoint: &Endpoint) -> Vec<u8> {
    let length = TCP_LEN + PAYLOAD;
    let mut tcp = Vec::with_capacity(usize::from(length));
    tcp.extend(key.dport_be.to_ne_bytes());
    tcp.extend(key.sport_be.to_ne_bytes());
    tcp.extend(flow.isn_be.to_ne_bytes());
    tcp.extend((u32::from_be(flow.isn_be).wrapping_add(1)).to_be_bytes());
    tcp.extend([(TCP_LEN as u8 / 4) << 4, ACK]);
    tcp.extend(1_u16.to_be_bytes());
    tcp.extend([0; 4]); // Checksum, urgent pointer.
    tcp.push(0);
    let addresses = [octets(&key.dst), octets(&key.src)].concat();
    let pseudo = sum(&addresses) + u32::from(PROTO_TCP) + u32::from(length);
    let check = !fold(pseudo + sum(&tcp));
    tcp[16..18].copy_from_slice(&check.to_be_bytes());
    let (kind, ip) = if key.dst.is_v4() {
        (ETH_P_IP, ip4(&addresses, length))
    } else {
        (ETH_P_IPV6, ip6(&addresses, length))
    };
    [
        &endpoint.mac[..],
        &endpoint.host_mac,
        &kind.to_be_bytes(),
        &ip,
        &tcp,
    ]
    .concat()
}

fn octets(address: &Addr) -> Vec<u8> {
    let octets = address.to_bits().to_be_bytes();
    octets[if address.is_v4() { 12 } else { 0 }..].to_vec()
}

fn ip4(addresses: &[u8], payload: u16) -> Vec<u8> {
    let mut ip = vec![0x45, 0];
    ip.extend((20 + payload).to_be_bytes());
    ip.extend([0, 0, 0x40, 0, HOPS, PROTO_TCP, 0, 0]);
    ip.extend(addresses);
    let check = !fold(sum(&ip));
    ip[10..12].copy_from_slice(&check.to_be_bytes());
    ip
}

fn ip6(addresses: &[u8], payload: u16) -> Vec<u8> {
    let mut ip = vec![0x60, 0, 0, 0];
    ip.extend(payload.to_be_bytes());
    ip.extend([PROTO_TCP, HOPS]);
    ip.extend(addresses);
    ip
}

/// The sum of 16-bit words in network byte order, an odd octet padded with zero (RFC 1071).
fn sum(octets: &[u8]) -> u32 {
    octets
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)))
        .sum()
}

fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_right_segment_from_the_vip_to_the_client() {
        let v4 = [0x0a18_0005, 0x0a10_0003].map(Addr::from_v4);
        let v6 = [0xfd12_u128 << 112 | 5, 0xfd12_u128 << 112 | 3].map(Addr::from_v6);
        for ([vip, client], header, addresses) in [(v4, 20, 12..20), (v6, 40, 8..40)] {
            let key = FlowKey {
                src: client,
                dst: vip,
                sport_be: 40_000_u16.to_be(),
                dport_be: 80_u16.to_be(),
                ..FlowKey::default()
            };
            let flow = Flow {
                isn_be: 0x0102_0304_u32.to_be(),
                ..Flow::default()
            };
            let endpoint = Endpoint {
                mac: [2, 0, 0, 0, 0, 1],
                host_mac: [2, 0, 0, 0, 0, 2],
                ..Endpoint::default()
            };
            let frame = segment(&key, &flow, &endpoint);
            assert_eq!(frame[..12], [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
            let (ip, tcp) = frame[14..].split_at(header);
            assert_eq!(tcp.len(), 21);
            if header == 20 {
                assert_eq!(fold(sum(ip)), 0xffff);
                assert_eq!(u16::from_be_bytes([ip[2], ip[3]]), 41);
            }
            assert_eq!(
                ip[addresses.clone()],
                [octets(&vip), octets(&client)].concat()
            );
            assert_eq!(tcp[..8], [0, 80, 0x9c, 0x40, 1, 2, 3, 4]);
            let pseudo = sum(&ip[addresses]) + 6 + 21;
            assert_eq!(fold(pseudo + sum(tcp)), 0xffff, "the checksum");
        }
    }
}
