//! Connections of two CPUs that want one place of their own at once.

use std::{sync::Barrier, thread};

use ebpf_common::{addr::Policy, layout::ACCOUNT_TCP};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use weft_tests::{
    Netns,
    program::{
        Node, REDIRECTED, Sizes,
        packet::{ACK, FIN, Packet, SYN},
        stage::{CLIENT, Family, Stage, receiver},
        talk::{backend, client, vip},
    },
};

/// How many connections each CPU opens and ends.
const LIVES: u32 = 10_000;
/// The device of the client; those of the pods 3 and 4 follow.
const CLIENT_LINK: u32 = 1;

/// What one CPU does: connections of one socket of the client to one service, one after the other.
#[derive(Clone, Copy)]
struct Side {
    family: Family,
    port: u16,
    service: u16,
    /// The pod that is the service's only backend.
    pod: u32,
}

/// How the lives of one side went.
#[derive(Clone, Copy, Debug, Default)]
struct Lives {
    /// SYNs that were not let through; a client says them again.
    refused: u32,
    /// Connections whose port was another on the way.
    rewritten: u32,
    /// Connections whose client's last word met nothing any more.
    unheard: u32,
}

/// What a frame became: its receiver, and the packet.
fn sent(node: &Node, link: u32, packet: &Packet) -> Option<(u32, Packet)> {
    let outcome = node.from_link(link, &packet.frame());
    (outcome.action == REDIRECTED).then(|| {
        let seen = Packet::parse(&outcome.bytes[14..]).expect("a right packet");
        (receiver(&outcome.bytes), seen)
    })
}

impl Side {
    fn says(self, flags: u8, seq: u32, ack: u32) -> Packet {
        let (client, vip) = (
            client(self.family, self.port),
            vip(self.family, self.service),
        );
        Packet::tcp(client, vip, flags, seq, ack)
    }

    /// Sends the client's segment; the port that its backend sees it from. Panics where anybody else sees it.
    fn asks(self, node: &Node, packet: &Packet) -> Option<u16> {
        let (number, seen) = sent(node, CLIENT_LINK, packet)?;
        if (seen.src, seen.sport) == vip(self.family, self.service) {
            // It is the client itself that is answered: reset.
            return None;
        }
        assert_eq!(
            (number, seen.src, (seen.dst, seen.dport)),
            (self.pod, packet.src, backend(self.family, self.pod)),
            "{packet:?}"
        );
        Some(seen.sport)
    }

    /// Sends the backend's segment; panics where it is not heard by this side's socket as its service's.
    fn answers(self, node: &Node, port: u16, flags: u8, seq: u32, ack: u32) {
        let client = client(self.family, self.port);
        let to = (client.0, port);
        let packet = Packet::tcp(backend(self.family, self.pod), to, flags, seq, ack);
        let heard = sent(node, CLIENT_LINK + self.pod - 2, &packet);
        let (number, seen) = heard.unwrap_or_else(|| panic!("nobody hears {packet:?}"));
        assert_eq!(
            (number, (seen.src, seen.sport), (seen.dst, seen.dport)),
            (CLIENT, vip(self.family, self.service), client),
            "{packet:?}"
        );
    }

    /// One connection, from its first SYN to its last acknowledgement.
    fn live(self, node: &Node, isn: u32, lives: &mut Lives) {
        let syn = self.says(SYN, isn, 0);
        let port = loop {
            match self.asks(node, &syn) {
                Some(port) => break port,
                None => lives.refused += 1,
            }
            assert!(lives.refused < LIVES, "{lives:?}");
        };
        lives.rewritten += u32::from(port != self.port);
        self.answers(node, port, SYN | ACK, 9, isn + 1);
        let same_way =
            |packet: &Packet| assert_eq!(self.asks(node, packet), Some(port), "{packet:?}");
        same_way(&self.says(ACK, isn + 1, 10));
        self.answers(node, port, ACK, 10, isn + 1);
        same_way(&self.says(FIN | ACK, isn + 1, 10));
        self.answers(node, port, FIN | ACK, 10, isn + 2);
        // It is over: who is answered under the same key has taken its place, maybe.
        match self.asks(node, &self.says(ACK, isn + 2, 11)) {
            Some(seen) => assert_eq!(seen, port),
            None => lives.unheard += 1,
        }
    }
}

/// Lets each side live on a CPU of its own.
fn race(stage: &Stage, sides: [Side; 2]) -> [Lives; 2] {
    let start = Barrier::new(2);
    let run = |(cpu, side): (usize, Side)| {
        let mut only = CpuSet::new();
        only.set(cpu).expect("a small number");
        // Where there is one CPU alone, they take turns.
        let _ = sched_setaffinity(Pid::from_raw(0), &only);
        let mut lives = Lives::default();
        start.wait();
        for life in 0..LIVES {
            side.live(&stage.node, life * 100, &mut lives);
        }
        lives
    };
    thread::scope(|scope| {
        let [first, second] = [0, 1].map(|cpu| scope.spawn(move || run((cpu, sides[cpu]))));
        [first, second].map(|thread| thread.join().expect("every packet went its way"))
    })
}

/// A node whose pods send by devices of their own, and where nobody must give way to others.
fn stage() -> Stage {
    let mut stage = Stage::new(Sizes {
        ageing: 8 * LIVES,
        ..Sizes::default()
    });
    for (link, number) in (CLIENT_LINK..).zip([CLIENT, 3, 4]) {
        stage.node.link(link, &Stage::endpoint(number));
    }
    stage
}

fn netns() -> Netns {
    let netns = Netns::new("race").expect("a network namespace");
    netns
        .ip("link add pod3 index 2 type veth peer name pod4 index 3")
        .expect("two devices");
    netns
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn connections_of_two_cpus_that_want_one_place_are_each_translated_as_their_own() {
    netns().run(|| {
        for family in Family::BOTH {
            let mut stage = stage();
            stage.service(Policy::Balanced, 5, &[13]);
            stage.service(Policy::Balanced, 6, &[14]);
            let sides = [(6, 5, 3), (7, 6, 4)].map(|(port, service, pod)| Side {
                family,
                port,
                service,
                pod,
            });
            let lives = race(&stage, sides);
            let account = stage.node.account(CLIENT);
            assert_eq!(account.opened, account.closed, "{lives:?}");
            assert_eq!(account.opened[ACCOUNT_TCP], u64::from(2 * LIVES));
        }
    });
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn connections_of_two_cpus_from_one_port_to_one_backend_are_each_answered_by_their_own_service() {
    netns().run(|| {
        for family in Family::BOTH {
            let mut stage = stage();
            for service in [5, 6] {
                stage.service(Policy::Balanced, service, &[13]);
            }
            let sides = [5, 6].map(|service| Side {
                family,
                port: 8,
                service,
                pod: 3,
            });
            let lives = race(&stage, sides);
            let account = stage.node.account(CLIENT);
            assert_eq!(account.opened, account.closed, "{lives:?}");
        }
    });
}
