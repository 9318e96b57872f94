//! I3: undoing a translated flow gives the packet that was sent, time to live and largest segment apart, for
//! packets of all kinds, through the programs that are attached.
//!
//! A client's packet goes through the program; what the backend sees of it is exchanged end for end, as an exact
//! answer would be, and goes back through the program. What the client hears must be its own packet, exchanged.

use std::{cell::RefCell, net::IpAddr, ops::Range};

use ebpf_common::{
    addr::{NODE_ENDPOINT, Policy},
    reason::Reason,
};
use proptest::prelude::*;
use weft_tests::program::{
    Outcome, REDIRECTED, Sizes,
    packet::{ACK, FIN, PSH, Packet, RST, SYN, framed},
    stage::{
        CLIENT, Family, NODE, PORT, REMOTE_BACKEND, Stage, TUNNEL_MTU, endpoint_address, receiver,
        vip_address,
    },
    wire::{self, TCP, UDP},
};

/// Together they take some seconds of a program's time.
const CASES: u32 = 10_000;
/// The service of a backend on this node, on another, and of the client itself.
const SERVICES: [u16; 3] = [5, 6, 7];
/// The largest payload whose packet fits the tunnel with every header that is drawn.
const PAYLOAD: Range<usize> = 0..TUNNEL_MTU as usize - 40 - 60 - 32;

/// What is drawn of a packet; each way is a hop.
#[derive(Clone, Debug)]
struct Drawn {
    family: Family,
    service: u16,
    kind: Kind,
    port: u16,
    tos: u8,
    ttl: u8,
    /// Identification and "do not fragment", or the flow label.
    mark: u32,
    seq: (u32, u32),
    window: (u16, u16),
    options: Vec<TcpOption>,
    /// Eight bytes each: options of IPv4, or the body of extension headers.
    extensions: Vec<(Extension, [u8; 4])>,
    payload: Vec<u8>,
    /// Where a datagram or an echo is cut in two, if it is.
    cut: Option<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The segment that opens.
    Opening(u8),
    /// A later segment.
    Segment(u8),
    Datagram,
    DatagramWithoutChecksum,
    Echo,
}

#[derive(Clone, Debug)]
enum TcpOption {
    Nothing,
    LargestSegment(u16),
    Scale(u8),
    Times(u32, u32),
    Unknown(u8, Vec<u8>),
}

#[derive(Clone, Copy, Debug)]
enum Extension {
    HopByHop,
    Destination,
}

fn kinds() -> impl Strategy<Value = Kind> {
    let more = any::<u8>();
    prop_oneof![
        // ECN's two flags may come with any segment (RFC 3168, RFC 9768).
        more.prop_map(|more| Kind::Opening(SYN | more & 0xc0)),
        more.prop_map(|more| Kind::Segment(ACK | more & !(SYN | RST))),
        Just(Kind::Segment(ACK | PSH)),
        Just(Kind::Segment(ACK | FIN)),
        Just(Kind::Segment(ACK | RST)),
        Just(Kind::Datagram),
        Just(Kind::DatagramWithoutChecksum),
        Just(Kind::Echo),
    ]
}

fn tcp_options() -> impl Strategy<Value = Vec<TcpOption>> {
    let one = prop_oneof![
        Just(TcpOption::Nothing),
        any::<u16>().prop_map(TcpOption::LargestSegment),
        any::<u8>().prop_map(TcpOption::Scale),
        any::<(u32, u32)>().prop_map(|(value, echo)| TcpOption::Times(value, echo)),
        (9..=255_u8, prop::collection::vec(any::<u8>(), 0..8))
            .prop_map(|(kind, body)| TcpOption::Unknown(kind, body)),
    ];
    prop::collection::vec(one, 0..5)
}

fn drawn() -> impl Strategy<Value = Drawn> {
    let family = prop_oneof![Just(Family::V4), Just(Family::V6)];
    let payload = prop_oneof![
        3 => prop::collection::vec(any::<u8>(), 0..64),
        1 => prop::collection::vec(any::<u8>(), PAYLOAD),
    ];
    let extension = (
        prop_oneof![Just(Extension::HopByHop), Just(Extension::Destination)],
        any::<[u8; 4]>(),
    );
    let extensions = prop_oneof![
        3 => Just(Vec::new()),
        1 => prop::collection::vec(extension, 1..3),
    ];
    (
        (family, prop::sample::select(SERVICES.to_vec()), kinds()),
        (any::<u16>(), any::<u8>(), 3..=255_u8, any::<u32>()),
        (any::<(u32, u32)>(), any::<(u16, u16)>()),
        (
            tcp_options(),
            extensions,
            payload,
            prop::option::weighted(0.2, any::<u8>()),
        ),
    )
        .prop_map(|(what, header, (seq, window), body)| {
            let ((family, service, kind), (port, tos, ttl, mark)) = (what, header);
            let (options, extensions, payload, cut) = body;
            Drawn {
                family,
                service,
                kind,
                port,
                tos,
                ttl,
                mark,
                seq,
                window,
                options,
                extensions,
                payload,
                cut,
            }
        })
}

impl Drawn {
    fn client(&self) -> IpAddr {
        endpoint_address(self.family, NODE, CLIENT)
    }

    fn vip(&self) -> IpAddr {
        vip_address(self.family, Policy::Balanced, self.service)
    }

    fn proto(&self) -> u8 {
        match (self.kind, self.family) {
            (Kind::Opening(_) | Kind::Segment(_), _) => TCP,
            (Kind::Datagram | Kind::DatagramWithoutChecksum, _) => UDP,
            (Kind::Echo, Family::V4) => 1,
            (Kind::Echo, Family::V6) => 58,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let l4 = self.transport();
        let mut out = match self.family {
            Family::V4 => self.ipv4(l4.len()),
            Family::V6 => self.ipv6(l4.len()),
        };
        out.extend(l4);
        wire::seal(&mut out);
        out
    }

    /// The packet, or its fragments.
    fn pieces(&self) -> Vec<Vec<u8>> {
        let whole = self.bytes();
        let length = self.transport().len();
        match (self.kind, self.cut) {
            (Kind::Opening(_) | Kind::Segment(_), _) | (_, None) => vec![whole],
            _ if length <= 8 => vec![whole],
            (_, Some(cut)) => {
                let at = 8 * (1 + usize::from(cut) % ((length - 1) / 8));
                wire::fragments(&whole, at, self.mark).to_vec()
            }
        }
    }

    fn ipv4(&self, payload: usize) -> Vec<u8> {
        let mut options = Vec::new();
        for (_, body) in &self.extensions {
            // An experimental option (RFC 4727) and two that do nothing.
            options.extend([158, 6]);
            options.extend(body);
            options.extend([1, 1]);
        }
        let words = u8::try_from(5 + options.len() / 4).expect("a few options");
        let total = u16::try_from(20 + options.len() + payload).expect("fits the tunnel");
        let mut out = vec![0x40 | words, self.tos];
        out.extend(total.to_be_bytes());
        let [a, b, flags, _] = self.mark.to_be_bytes();
        out.extend([a, b, flags & 0x40, 0, self.ttl, self.proto(), 0, 0]);
        out.extend(octets(self.client()));
        out.extend(octets(self.vip()));
        out.extend(options);
        out
    }

    fn ipv6(&self, payload: usize) -> Vec<u8> {
        let number = |extension: &Extension| match extension {
            Extension::HopByHop => 0,
            Extension::Destination => 60,
        };
        // Hop-by-hop options come first, and once (RFC 8200 section 4.1).
        let mut chain: Vec<_> = self.extensions.clone();
        chain.sort_by_key(|(extension, _)| number(extension));
        chain.dedup_by_key(|(extension, _)| number(extension));
        let mut numbers: Vec<u8> = chain.iter().map(|(kind, _)| number(kind)).collect();
        numbers.push(self.proto());
        let length = u16::try_from(8 * chain.len() + payload).expect("fits the tunnel");
        let [_, label @ ..] = self.mark.to_be_bytes();
        let mut out = vec![
            0x60 | self.tos >> 4,
            self.tos << 4 | label[0] & 15,
            label[1],
            label[2],
        ];
        out.extend(length.to_be_bytes());
        out.extend([numbers[0], self.ttl]);
        out.extend(octets(self.client()));
        out.extend(octets(self.vip()));
        for ((_, body), next) in chain.iter().zip(&numbers[1..]) {
            // One option that a node which does not know it skips (RFC 4727).
            out.extend([*next, 0, 0x1e, 4]);
            out.extend(body);
        }
        out
    }

    fn transport(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self.kind {
            Kind::Opening(flags) | Kind::Segment(flags) => {
                let options = self.tcp_options();
                let words = u8::try_from(5 + options.len() / 4).expect("at most forty bytes");
                out.extend(self.port.to_be_bytes());
                out.extend(PORT.to_be_bytes());
                out.extend(self.seq.0.to_be_bytes());
                out.extend(self.seq.1.to_be_bytes());
                out.extend([words << 4, flags]);
                out.extend(self.window.0.to_be_bytes());
                out.extend([0, 0]);
                out.extend(self.window.1.to_be_bytes());
                out.extend(options);
            }
            Kind::Datagram | Kind::DatagramWithoutChecksum => {
                let length = u16::try_from(8 + self.payload.len()).expect("fits the tunnel");
                // IPv6 has no datagrams without checksum outside tunnels (RFC 8200 section 8.1).
                let none = self.kind == Kind::DatagramWithoutChecksum && self.family == Family::V4;
                out.extend(self.port.to_be_bytes());
                out.extend(PORT.to_be_bytes());
                out.extend(length.to_be_bytes());
                out.extend([0, u8::from(!none)]);
            }
            Kind::Echo => {
                let kind = match self.family {
                    Family::V4 => 8,
                    Family::V6 => 128,
                };
                out.extend([kind, 0, 0, 0]);
                out.extend(self.port.to_be_bytes());
                out.extend(self.window.0.to_be_bytes());
            }
        }
        out.extend(&self.payload);
        out
    }

    fn tcp_options(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for option in &self.options {
            let bytes = match option {
                TcpOption::Nothing => vec![1],
                TcpOption::LargestSegment(bytes) => [&[2, 4], &bytes.to_be_bytes()[..]].concat(),
                TcpOption::Scale(by) => vec![3, 3, *by],
                TcpOption::Times(value, echo) => {
                    [&[8, 10], &value.to_be_bytes()[..], &echo.to_be_bytes()].concat()
                }
                TcpOption::Unknown(kind, body) => {
                    let length = u8::try_from(2 + body.len()).expect("a short body");
                    [&[*kind, length], &body[..]].concat()
                }
            };
            if out.len() + bytes.len() <= 40 {
                out.extend(bytes);
            }
        }
        out.resize(out.len().next_multiple_of(4), 0);
        out
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn stage() -> Stage {
    let mut stage = Stage::new(Sizes {
        flows: 65_536,
        recent: 65_536,
        ..Sizes::default()
    });
    for (service, backend) in SERVICES.into_iter().zip([13, REMOTE_BACKEND, 10 + CLIENT]) {
        stage.service(Policy::Balanced, service, &[backend]);
    }
    stage
}

/// One packet there and its exchanged self back: what came back. `None` where the program does not walk the packet's
/// headers.
fn there_and_back(stage: &mut Stage, drawn: &Drawn, sent: &[u8]) -> Option<Vec<u8>> {
    let unwalked = stage.node.count(Reason::HeaderChain);
    let outcome = stage.node.from_pod(&Stage::endpoint(CLIENT), &framed(sent));
    if stage.node.count(Reason::HeaderChain) > unwalked {
        return None;
    }
    let seen = delivered(stage, outcome, sent);
    let back = match drawn.service {
        5 => {
            assert_eq!(receiver(&seen), 3, "{drawn:?}");
            out(stage, 3, &wire::mirrored(&seen[14..]))
        }
        6 => {
            assert_eq!(receiver(&seen), 0, "into the tunnel: {drawn:?}");
            let outcome = stage.node.from_tunnel(&wire::mirrored(&seen[14..]));
            delivered(stage, outcome, sent)
        }
        _ => {
            assert_eq!(receiver(&seen), CLIENT, "a hairpin: {drawn:?}");
            let node = endpoint_address(drawn.family, NODE, NODE_ENDPOINT);
            assert_eq!(wire::walk(&seen[14..]).map(|seen| seen.src), Ok(node));
            out(stage, CLIENT, &wire::mirrored(&seen[14..]))
        }
    };
    assert_eq!(receiver(&back), CLIENT, "{drawn:?}");
    Some(back[14..].to_vec())
}

fn out(stage: &mut Stage, from: u32, packet: &[u8]) -> Vec<u8> {
    let outcome = stage.node.from_pod(&Stage::endpoint(from), &framed(packet));
    delivered(stage, outcome, packet)
}

fn delivered(stage: &mut Stage, outcome: Outcome, packet: &[u8]) -> Vec<u8> {
    let counts = stage.node.counts();
    assert_eq!(outcome.action, REDIRECTED, "{counts:?}: {packet:02x?}");
    wire::check(&outcome.bytes[14..])
        .unwrap_or_else(|error| panic!("{error}: {packet:02x?} -> {:02x?}", outcome.bytes));
    outcome.bytes
}

/// Opens the connection of a segment, or ends it.
fn handshake(stage: &mut Stage, drawn: &Drawn, flags: &[(bool, u8)]) {
    let client = (drawn.client(), drawn.port);
    let mut backend: Option<(u32, Vec<u8>)> = None;
    for &(from_client, flags) in flags {
        let packet = Packet::tcp(client, (drawn.vip(), PORT), flags, drawn.seq.0, 1).bytes();
        let (from, packet) = match (from_client, &backend) {
            (true, _) => (CLIENT, packet),
            (false, Some((from, answer))) => (*from, answer_of(answer, flags)),
            (false, None) => panic!("nobody was asked"),
        };
        if from == 0 {
            let outcome = stage.node.from_tunnel(&packet);
            delivered(stage, outcome, &packet);
            continue;
        }
        let seen = out(stage, from, &packet);
        if from_client {
            backend = Some((receiver(&seen), seen[14..].to_vec()));
        }
    }
}

/// A segment with `flags` that answers `seen`.
fn answer_of(seen: &[u8], flags: u8) -> Vec<u8> {
    let mut answer = wire::mirrored(seen);
    let at = wire::walk(&answer).expect("a right packet").l4.start + 13;
    answer[at] = flags;
    wire::seal(&mut answer);
    answer
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn what_comes_back_of_a_packet_of_any_kind_is_what_was_sent() {
    let stage = RefCell::new(stage());
    proptest!(ProptestConfig::with_cases(CASES), |(drawn in drawn())| {
        let mut stage = stage.borrow_mut();
        let in_a_connection = matches!(drawn.kind, Kind::Segment(_));
        if in_a_connection {
            handshake(&mut stage, &drawn, &[(true, SYN), (false, SYN | ACK), (true, ACK)]);
        }
        for sent in drawn.pieces() {
            let Some(back) = there_and_back(&mut stage, &drawn, &sent) else {
                prop_assert!(!drawn.extensions.is_empty(), "a plain packet was dropped");
                break;
            };
            prop_assert_eq!(wire::hops(&back), wire::hops(&sent) - 2, "a hop each way");
            prop_assert_eq!(
                wire::apart_from_ttl_and_mss(&back),
                wire::apart_from_ttl_and_mss(&wire::mirrored(&sent))
            );
        }
        if in_a_connection {
            handshake(&mut stage, &drawn, &[(true, ACK | RST)]);
        }
    });
}
