//! The ICMP error by which a client of datagrams hears that its backend is gone, as a whole frame.

use ebpf_common::layout::{Endpoint, FlowKey, PROTO_ICMP, PROTO_ICMP6, PROTO_UDP};

use super::frame::{addresses, fold, frame, ip4, ip6, sum};

/// Port unreachable (RFC 792; RFC 4443, 3.1).
const ICMP4_PORT: [u8; 2] = [3, 3];
const ICMP6_PORT: [u8; 2] = [1, 4];
/// A UDP header, alone.
const UDP_LEN: u16 = 8;

/// That nobody is at the port of the VIP of a forward entry, quoting a datagram that its client may have sent.
#[must_use]
pub fn notice(key: &FlowKey, endpoint: &Endpoint) -> Vec<u8> {
    let is_v4 = key.dst.is_v4();
    let to_client = addresses(key);
    let (vip, client) = to_client.split_at(to_client.len() / 2);
    let sent = [client, vip].concat();
    let mut udp = [key.sport_be, key.dport_be].map(u16::to_ne_bytes).concat();
    udp.extend(UDP_LEN.to_be_bytes());
    udp.extend([0; 2]); // Checksum: a quote's is looked at by nobody.
    let (proto, message, ip) = if is_v4 {
        (PROTO_ICMP, ICMP4_PORT, ip4(&sent, PROTO_UDP, UDP_LEN))
    } else {
        (PROTO_ICMP6, ICMP6_PORT, ip6(&sent, PROTO_UDP, UDP_LEN))
    };
    let mut icmp = [&message[..], &[0; 6], &ip, &udp].concat();
    let pseudo = if is_v4 {
        0
    } else {
        sum(&to_client) + u32::from(proto) + icmp.len() as u32
    };
    let check = !fold(pseudo + sum(&icmp));
    icmp[2..4].copy_from_slice(&check.to_be_bytes());
    frame(key, endpoint, proto, &icmp)
}

#[cfg(test)]
mod tests {
    use ebpf_common::layout::Addr;

    use super::*;

    #[test]
    fn it_quotes_the_clients_datagram_under_right_checksums() {
        let v4 = [0x0a18_0005, 0x0a10_0003].map(Addr::from_v4);
        let v6 = [0xfd12_u128 << 112 | 5, 0xfd12_u128 << 112 | 3].map(Addr::from_v6);
        for ([vip, client], header, addresses) in [(v4, 20, 12..20), (v6, 40, 8..40)] {
            let key = FlowKey {
                src: client,
                dst: vip,
                sport_be: 40_000_u16.to_be(),
                dport_be: 53_u16.to_be(),
                ..FlowKey::default()
            };
            let frame = notice(&key, &Endpoint::default());
            let (ip, icmp) = frame[14..].split_at(header);
            let (message, quote) = icmp.split_at(8);
            let (quoted, udp) = quote.split_at(header);
            assert_eq!(udp, [0x9c, 0x40, 0, 53, 0, 8, 0, 0]);
            let half = addresses.len() / 2;
            assert_eq!(
                ip[addresses.clone()][..half],
                quoted[addresses.clone()][half..]
            );
            assert_eq!(
                ip[addresses.clone()][half..],
                quoted[addresses.clone()][..half]
            );
            if header == 20 {
                assert_eq!(message[..2], ICMP4_PORT);
                assert_eq!(
                    [fold(sum(ip)), fold(sum(quoted)), fold(sum(icmp))],
                    [0xffff; 3]
                );
            } else {
                assert_eq!(message[..2], ICMP6_PORT);
                let pseudo = sum(&ip[addresses]) + 58 + icmp.len() as u32;
                assert_eq!(fold(pseudo + sum(icmp)), 0xffff);
            }
        }
    }
}
