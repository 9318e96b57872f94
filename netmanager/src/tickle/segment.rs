//! The segment that makes a pod speak, as a whole frame.

use ebpf_common::layout::{Endpoint, Flow, FlowKey, PROTO_TCP};

use super::frame::{addresses, fold, frame, sum};

/// A TCP header without options, and the one octet after it.
const TCP_LEN: u16 = 20;
const PAYLOAD: u16 = 1;
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
    let pseudo = sum(&addresses(key)) + u32::from(PROTO_TCP) + u32::from(length);
    let check = !fold(pseudo + sum(&tcp));
    tcp[16..18].copy_from_slice(&check.to_be_bytes());
    frame(key, endpoint, PROTO_TCP, &tcp)
}

#[cfg(test)]
mod tests {
    use ebpf_common::layout::Addr;

    use super::*;
    use crate::tickle::frame::octets;

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
