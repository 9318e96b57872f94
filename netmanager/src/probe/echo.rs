//! The echo between node endpoints: its message.
//!
//! ```text
//! | 4: "WEFT" | 1: version | 1: 1 question, 2 answer | 2: zero | 8: sequence |   16 bytes over UDP
//! ```
//!
//! An answer is as long as its question, goes to the port it came from and only to a node endpoint of the
//! mesh, so the echo amplifies nothing and answers no pod.

use std::net::{IpAddr, SocketAddr};

use ebpf_common::addr::{Mesh6, NODE_ENDPOINT, Name6};

/// UDP port of the echo on every node endpoint (the letters of Weft on a telephone).
pub const ECHO_PORT: u16 = 9338;
/// Length of a message.
pub(super) const LEN: usize = 16;
const MAGIC: [u8; 4] = *b"WEFT";
const VERSION: u8 = 1;

/// A question or its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Echo {
    Ask { sequence: u64 },
    Answer { sequence: u64 },
}

impl Echo {
    pub(super) fn encode(self) -> [u8; LEN] {
        let (kind, sequence) = match self {
            Self::Ask { sequence } => (1, sequence),
            Self::Answer { sequence } => (2, sequence),
        };
        let mut bytes = [0; LEN];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = VERSION;
        bytes[5] = kind;
        bytes[8..].copy_from_slice(&sequence.to_be_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; LEN] = bytes.try_into().ok()?;
        let (head, tail) = bytes.split_first_chunk::<8>()?;
        let sequence = u64::from_be_bytes(tail.try_into().ok()?);
        match head {
            [b'W', b'E', b'F', b'T', VERSION, 1, 0, 0] => Some(Self::Ask { sequence }),
            [b'W', b'E', b'F', b'T', VERSION, 2, 0, 0] => Some(Self::Answer { sequence }),
            _ => None,
        }
    }
}

/// The node whose echo sent from `from`; `None` for everybody else.
pub(super) fn node_of(mesh: Mesh6, from: SocketAddr) -> Option<u32> {
    let IpAddr::V6(address) = from.ip() else {
        return None;
    };
    match mesh.decode(address.to_bits()) {
        Some(Name6::Endpoint {
            node,
            endpoint: NODE_ENDPOINT,
        }) if from.port() == ECHO_PORT => Some(node),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_survives_its_bytes_and_others_are_refused() {
        for echo in [
            Echo::Ask { sequence: 0 },
            Echo::Answer {
                sequence: u64::MAX - 1,
            },
        ] {
            assert_eq!(Echo::decode(&echo.encode()), Some(echo));
        }
        let good = Echo::Ask { sequence: 5 }.encode();
        for at in 0..8 {
            let mut bad = good;
            bad[at] ^= 0x80;
            assert_eq!(Echo::decode(&bad), None, "byte {at}");
        }
        assert_eq!(Echo::decode(&good[..LEN - 1]), None);
        assert_eq!(Echo::decode(&[&good[..], &[0]].concat()), None);
        assert_eq!(Echo::decode(&[]), None);
    }

    #[test]
    fn only_the_echo_of_a_node_endpoint_is_heard() {
        let mesh = Mesh6::new(0xfd12_3456_789a << 80).unwrap();
        let cases = [
            ("[fd12:3456:789a:0:0:9:0:1]:9338", Some(9)),
            ("[fd12:3456:789a:0:0:9:0:1]:9339", None),
            ("[fd12:3456:789a:0:0:9:0:2]:9338", None),
            ("[fd12:3456:789b:0:0:9:0:1]:9338", None),
            ("[fd12:3456:789a:1000:0:9::]:9338", None),
            ("[::1]:9338", None),
            ("10.16.0.1:9338", None),
        ];
        for (from, node) in cases {
            assert_eq!(node_of(mesh, from.parse().unwrap()), node, "{from}");
        }
    }
}
