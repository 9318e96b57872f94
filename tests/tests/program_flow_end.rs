//! When a connection that is over is forgotten.

use ebpf_common::{
    addr::{NODE_ENDPOINT, Policy},
    layout::{ACCOUNT_TCP, FLOW_FIN_BACKEND, FLOW_FIN_CLIENT, FLOW_QUEUED},
};
use weft_tests::program::{
    Sizes,
    packet::{ACK, FIN, PSH, Packet, SYN},
    stage::{CLIENT, Family, NODE, REMOTE_BACKEND, REMOTE_NODE, Stage, TARGET, endpoint_address},
    talk::{backend, client, close, connect, forward, point_to, resets, segment, vip},
};

const PORT: u16 = 1;
/// Octets that stand in front of a FIN in the same segment.
const LAST_WORDS: &[u8] = b"bye";

/// The two ends of a connection whose backend is a pod of this node: what each sends, and as which endpoint.
struct Ends {
    family: Family,
    client: (std::net::IpAddr, u16),
    /// Whom the backend answers.
    answered: (std::net::IpAddr, u16),
    backend: u32,
}

impl Ends {
    /// A connection whose next numbers are 101 of the client and 10 of the backend.
    fn connect(stage: &mut Stage, family: Family, backend: u32) -> Self {
        Self::connect_from(stage, family, PORT, backend)
    }

    fn connect_from(stage: &mut Stage, family: Family, port: u16, backend: u32) -> Self {
        point_to(stage, backend);
        let answered = if backend == CLIENT {
            endpoint_address(family, NODE, NODE_ENDPOINT)
        } else {
            client(family, port).0
        };
        let ends = Self {
            family,
            client: client(family, port),
            answered: (answered, port),
            backend,
        };
        ends.says(stage, true, SYN, 100, 0, b"");
        ends.says(stage, false, SYN | ACK, 9, 101, b"");
        ends.says(stage, true, ACK, 101, 10, b"");
        ends
    }

    /// Ends it from both sides, the client first; nothing of it is left.
    fn end(&self, stage: &mut Stage) {
        self.says(stage, true, FIN | ACK, 101, 10, b"");
        self.says(stage, false, FIN | ACK, 10, 102, b"");
        self.says(stage, true, ACK, 102, 11, b"");
    }

    fn says(
        &self,
        stage: &mut Stage,
        by_client: bool,
        flags: u8,
        seq: u32,
        ack: u32,
        words: &[u8],
    ) {
        let (from, src, dst) = if by_client {
            (CLIENT, self.client, vip(self.family, 5))
        } else {
            let (address, _) = backend(self.family, self.backend);
            (self.backend, (address, TARGET), self.answered)
        };
        let mut packet = Packet::tcp(src, dst, flags, seq, ack);
        packet.payload = words.to_vec();
        stage.deliver(from, &packet);
    }
}

fn flows(stage: &mut Stage) -> usize {
    stage.node.flows("FLOWS").len()
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_connection_between_two_pods_is_forgotten_with_its_last_acknowledgement() {
    for family in Family::BOTH {
        for (client_first, backend) in [(true, 3), (false, 3), (true, CLIENT), (false, CLIENT)] {
            let mut stage = Stage::default();
            let ends = Ends::connect(&mut stage, family, backend);
            let (first, second) = if client_first { (101, 10) } else { (10, 101) };
            let after_first = first + 1 + LAST_WORDS.len() as u32;
            let after_second = second + 1 + LAST_WORDS.len() as u32;
            ends.says(
                &mut stage,
                client_first,
                FIN | ACK,
                first,
                second,
                LAST_WORDS,
            );
            // Half closed: the other side still talks, and is acknowledged.
            ends.says(&mut stage, !client_first, ACK, second, after_first, b"");
            ends.says(&mut stage, client_first, ACK, after_first, second, b"");
            ends.says(
                &mut stage,
                !client_first,
                FIN | ACK,
                second,
                after_first,
                LAST_WORDS,
            );
            // What does not acknowledge the FIN is not the last: not for the data before it, nor for none.
            for ack in [second, after_second - 1] {
                ends.says(&mut stage, client_first, ACK, after_first, ack, b"");
            }
            assert_eq!(flows(&mut stage), 2);
            ends.says(
                &mut stage,
                client_first,
                ACK,
                after_first,
                after_second,
                b"",
            );
            assert_eq!(flows(&mut stage), 0, "client first: {client_first}");
            let account = stage.node.account(CLIENT);
            assert_eq!(
                (account.opened[ACCOUNT_TCP], account.closed[ACCOUNT_TCP]),
                (1, 1)
            );
            // Who missed it is reset, and the port is free.
            assert!(resets(
                &mut stage,
                &segment(family, PORT, FIN | ACK, after_first)
            ));
            Ends::connect(&mut stage, family, backend);
            assert_eq!(flows(&mut stage), 2);
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn sides_that_end_at_once_keep_the_way_for_both_acknowledgements() {
    for family in Family::BOTH {
        let mut stage = Stage::default();
        let ends = Ends::connect(&mut stage, family, 3);
        ends.says(&mut stage, true, FIN | ACK, 101, 10, b"");
        ends.says(&mut stage, false, FIN | ACK, 10, 101, b"");
        // Each has yet to hear that its FIN arrived.
        ends.says(&mut stage, true, ACK, 102, 11, b"");
        ends.says(&mut stage, false, ACK, 11, 102, b"");
        assert_eq!(flows(&mut stage), 2, "it gives way, or is collected");
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_connection_through_the_tunnel_lingers_because_its_last_segments_may_be_lost() {
    for family in Family::BOTH {
        for client_first in [true, false] {
            let mut stage = Stage::default();
            stage.service(Policy::Balanced, 5, &[REMOTE_BACKEND]);
            let (_, seen) = stage.deliver(CLIENT, &segment(family, PORT, SYN, 100));
            let remote = (endpoint_address(family, REMOTE_NODE, 2), TARGET);
            assert_eq!((seen.dst, seen.dport), remote);
            let answer = |stage: &mut Stage, flags, seq, ack| {
                let packet = Packet::tcp(remote, client(family, PORT), flags, seq, ack);
                assert_eq!(stage.arrive(&packet).0, CLIENT);
            };
            let say = |stage: &mut Stage, flags, seq, ack| {
                let packet = Packet::tcp(client(family, PORT), vip(family, 5), flags, seq, ack);
                stage.deliver(CLIENT, &packet);
            };
            answer(&mut stage, SYN | ACK, 9, 101);
            say(&mut stage, ACK, 101, 10);
            if client_first {
                say(&mut stage, FIN | ACK, 101, 10);
                answer(&mut stage, FIN | ACK, 10, 102);
                say(&mut stage, ACK, 102, 11);
                // It was lost, and the FIN comes again.
                answer(&mut stage, FIN | ACK, 10, 102);
                say(&mut stage, ACK, 102, 11);
            } else {
                answer(&mut stage, FIN | ACK, 10, 101);
                say(&mut stage, FIN | ACK, 101, 11);
                answer(&mut stage, ACK, 11, 102);
                say(&mut stage, FIN | ACK, 101, 11);
                answer(&mut stage, ACK, 11, 102);
            }
            assert_eq!(flows(&mut stage), 2, "client first: {client_first}");
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_connection_that_gave_no_way_while_it_was_established_does_once_it_is_over() {
    for family in Family::BOTH {
        let mut stage = Stage::new(Sizes {
            flows: 64,
            ageing: 4,
            places: 1,
            ..Sizes::default()
        });
        point_to(&mut stage, 3);
        let flags = |stage: &mut Stage| forward(stage, "FLOWS", PORT).map(|(_, flow)| flow.flags);
        connect(&mut stage, family, PORT, 100);
        let others = |stage: &mut Stage, ports: std::ops::Range<u16>| {
            for port in ports {
                connect(stage, family, port, 100);
                close(stage, family, port, 3, 101);
            }
        };
        others(&mut stage, 10..13);
        assert_ne!(flags(&mut stage).unwrap() & FLOW_QUEUED, 0);
        others(&mut stage, 13..30);
        let established = flags(&mut stage).expect("it is established");
        assert_eq!(established & FLOW_QUEUED, 0, "its turn was there");
        assert_eq!(
            stage
                .deliver(CLIENT, &segment(family, PORT, ACK | PSH, 101))
                .0,
            3
        );
        close(&mut stage, family, PORT, 3, 101);
        let both = FLOW_FIN_CLIENT | FLOW_FIN_BACKEND;
        assert_eq!(flags(&mut stage).unwrap() & both, both);
        others(&mut stage, 30..33);
        assert!(flags(&mut stage).is_some(), "three younger ones");
        others(&mut stage, 33..34);
        assert_eq!(flags(&mut stage), None, "four");
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_connection_does_not_give_way_for_another_that_had_its_port() {
    for family in Family::BOTH {
        let mut stage = Stage::new(Sizes {
            flows: 64,
            ageing: 4,
            places: 1,
            ..Sizes::default()
        });
        // Their keys fill the queue, and nothing else is left of them.
        for port in 1..=4 {
            Ends::connect_from(&mut stage, family, port, 3).end(&mut stage);
        }
        assert_eq!(flows(&mut stage), 0);
        // The first port's turn comes with its own new connection, the second's while that opens.
        for port in 1..=2 {
            stage.deliver(CLIENT, &segment(family, port, SYN, 7000));
        }
        stage.deliver(CLIENT, &segment(family, 9, SYN, 7000));
        assert_eq!(flows(&mut stage), 6, "three that open");
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_full_table_finds_who_gives_way_behind_many_that_are_gone() {
    for family in Family::BOTH {
        let mut stage = Stage::new(Sizes {
            flows: 8,
            ageing: 256,
            places: 1,
            ..Sizes::default()
        });
        for port in 1..=100 {
            Ends::connect_from(&mut stage, family, port, 3).end(&mut stage);
        }
        for port in 101..=104 {
            connect(&mut stage, family, port, 100);
            close(&mut stage, family, port, 3, 101);
        }
        assert_eq!(flows(&mut stage), 8, "all linger");
        connect(&mut stage, family, 105, 100);
        assert!(forward(&mut stage, "FLOWS", 105).is_some());
        assert_eq!(forward(&mut stage, "FLOWS", 101), None, "it gave way");
    }
}
