//! The echo between node endpoints: its message.
//!
//! ```text
//! | 4: "WEFT" | 1: version | 1: 1 question, 2 answer | 2: error, permille | 8: sequence | 3 * 4: place, us | 4: height, us |
//! ```
//!
//! 32 bytes over UDP, in network byte order. Place, height and error are the sender's network coordinate, which
//! an answer brings along for [`coordinate`](super::coordinate). An answer is as long as its question, goes to the
//! port it came from and only to a node endpoint of the mesh, so the echo amplifies nothing and answers no pod.

use std::net::{IpAddr, SocketAddr};

use ebpf_common::addr::{Mesh6, NODE_ENDPOINT, Name6};
use netmanager_api::conditions::Coordinate;

pub use ebpf_common::addr::ECHO_PORT;
/// Length of a message.
pub(super) const LEN: usize = 32;
const MAGIC: [u8; 4] = *b"WEFT";
/// 1 had no coordinate.
const VERSION: u8 = 2;

/// A question or its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Echo {
    pub(super) kind: Kind,
    pub(super) sequence: u64,
    /// Where the sender is.
    pub(super) from: Coordinate,
}

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Ask,
    Answer,
}

impl Echo {
    pub(super) fn encode(self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = VERSION;
        bytes[5] = match self.kind {
            Kind::Ask => 1,
            Kind::Answer => 2,
        };
        bytes[6..8].copy_from_slice(&self.from.error_permille.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.sequence.to_be_bytes());
        for (place, axis) in bytes[16..28].chunks_mut(4).zip(self.from.at_us) {
            place.copy_from_slice(&axis.to_be_bytes());
        }
        bytes[28..].copy_from_slice(&self.from.height_us.to_be_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; LEN] = bytes.try_into().ok()?;
        let kind = match bytes[..6] {
            [b'W', b'E', b'F', b'T', VERSION, 1] => Kind::Ask,
            [b'W', b'E', b'F', b'T', VERSION, 2] => Kind::Answer,
            _ => return None,
        };
        let word = |at: usize| [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
        Some(Self {
            kind,
            sequence: u64::from_be_bytes(bytes[8..16].try_into().ok()?),
            from: Coordinate {
                at_us: [16, 20, 24].map(|at| i32::from_be_bytes(word(at))),
                height_us: u32::from_be_bytes(word(28)),
                error_permille: u16::from_be_bytes([bytes[6], bytes[7]]),
            },
        })
    }
}

/// The node whose own endpoint sent from `port` of `from`; `None` for everybody else.
pub(super) fn node_of(mesh: Mesh6, from: SocketAddr, port: u16) -> Option<u32> {
    let IpAddr::V6(address) = from.ip() else {
        return None;
    };
    match mesh.decode(address.to_bits()) {
        Some(Name6::Endpoint {
            node,
            endpoint: NODE_ENDPOINT,
        }) if from.port() == port => Some(node),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_survives_its_bytes_and_others_are_refused() {
        let ask = Echo {
            kind: Kind::Ask,
            sequence: 5,
            from: Coordinate {
                at_us: [i32::MIN, -1, 70_000],
                height_us: 900,
                error_permille: 1_000,
            },
        };
        let answer = Echo {
            kind: Kind::Answer,
            sequence: u64::MAX - 1,
            ..ask
        };
        for echo in [ask, answer] {
            assert_eq!(Echo::decode(&echo.encode()), Some(echo));
        }
        let good = ask.encode();
        for at in 0..6 {
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
            assert_eq!(
                node_of(mesh, from.parse().unwrap(), ECHO_PORT),
                node,
                "{from}"
            );
        }
    }
}
