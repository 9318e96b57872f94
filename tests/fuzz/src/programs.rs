//! The kernel programs under packets of any kind (`BPF_PROG_TEST_RUN`): a sequence of what pods send, what comes out
//! of the tunnel, and what becomes of backends; after each packet a judge that knows the mesh's rules ([`judge`]), at
//! the end a look at the flow tables ([`ledger`]).
//!
//! One load serves all inputs of a thread; its flows are forgotten before each, so that an input means the same
//! whenever it is run.

mod draw;
mod judge;
mod ledger;

use std::{
    cell::RefCell,
    hash::{DefaultHasher, Hash, Hasher},
    sync::OnceLock,
};

use arbitrary::{Arbitrary, Result, Unstructured};
use ebpf_common::{
    addr::{NODE_ENDPOINT, Policy},
    layout::{BACKEND_DRAINING, BACKEND_LIVE, Backend, DIRECT_FLOWS},
};
use weft_tests::program::{
    Outcome, Sizes,
    packet::framed,
    stage::{CLIENT, REMOTE_BACKEND, Stage},
    wire,
};

use self::{
    draw::Drawn,
    judge::{Judge, Place},
};

/// Local endpoints that send.
const SENDERS: [u32; 4] = [NODE_ENDPOINT, CLIENT, 3, 4];
/// The services, their policies and their backends, as local endpoints' numbers; 0 is the other node's.
const SERVICES: [(u16, Policy, &[u32]); 5] = [
    (5, Policy::Balanced, &[3, 4, 0]),
    (6, Policy::Balanced, &[0]),
    (7, Policy::Closest, &[CLIENT]),
    (8, Policy::Sticky, &[3]),
    (9, Policy::Balanced, &[]),
];
/// How many connections the client may have, and half as many flows of each other kind.
const QUOTA: u32 = 4;
/// How many connections may be opening or lingering.
const AGEING: u32 = 6;
/// A sequence that is longer says no more.
const LONGEST: usize = 24;

/// Who hears the sort of each outcome, as a number: what the engine has for coverage of the kernel's side.
pub(crate) static LISTENER: OnceLock<fn(u64)> = OnceLock::new();

thread_local! {
    /// One where nearly every connection has a place of its own, and one where none has.
    static STAGES: [RefCell<Stage>; 2] = [DIRECT_FLOWS, 1].map(|places| RefCell::new(stage(places)));
}

/// One step of a sequence.
enum Step {
    /// A local endpoint sends.
    Send { from: u8, packet: Drawn },
    /// The tunnel brings.
    Bring(Drawn),
    /// Whoever got an earlier packet answers it exactly, with other flags where it is a segment.
    Answer { which: u8, flags: u8 },
    /// An earlier packet is sent once more, with other flags where it is a segment.
    Repeat { which: u8, flags: u8 },
    /// An earlier packet, or its answer, in two fragments.
    Cut { which: u8, at: u8, answers: bool },
    /// A backend dies, drains or lives again.
    Turn { backend: u8, to: u8 },
}

impl<'a> Arbitrary<'a> for Step {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(match u.int_in_range(0..=15)? {
            0..=5 => Self::Send {
                from: u.arbitrary()?,
                packet: u.arbitrary()?,
            },
            6..=7 => Self::Bring(u.arbitrary()?),
            8..=11 => Self::Answer {
                which: u.int_in_range(0..=3)?,
                flags: draw::flags(u)?,
            },
            12..=13 => Self::Repeat {
                which: u.int_in_range(0..=7)?,
                flags: draw::flags(u)?,
            },
            14 => Self::Cut {
                which: u.int_in_range(0..=3)?,
                at: u.arbitrary()?,
                answers: u.arbitrary()?,
            },
            _ => Self::Turn {
                backend: u.arbitrary()?,
                to: u.arbitrary()?,
            },
        })
    }
}

/// A packet that was sent, and where it went.
struct Past {
    from: Place,
    sent: Vec<u8>,
    to: Place,
    seen: Vec<u8>,
}

fn stage(places: u32) -> Stage {
    let mut stage = Stage::new(Sizes {
        flows: 256,
        recent: 4096,
        ageing: AGEING,
        places,
    });
    stage.limit(CLIENT, QUOTA);
    for (service, policy, backends) in SERVICES {
        let indexes: Vec<u32> = backends.iter().map(|&number| index(number)).collect();
        stage.service(policy, service, &indexes);
    }
    stage
}

/// The index of a backend, as the stage numbers them.
fn index(number: u32) -> u32 {
    if number == 0 {
        REMOTE_BACKEND
    } else {
        10 + number
    }
}

pub(crate) fn run(data: &[u8]) {
    let which = data.len() % 2;
    STAGES.with(|stages| {
        sequence(
            &mut stages[which].borrow_mut(),
            &mut Unstructured::new(data),
        )
    });
}

fn sequence(stage: &mut Stage, input: &mut Unstructured<'_>) {
    stage.node.forget_flows();
    let mut judge = Judge::default();
    for number in [0, CLIENT, 3, 4] {
        turn(stage, &mut judge, number, BACKEND_LIVE);
    }
    let mut past = Vec::new();
    for _ in 0..LONGEST {
        if input.is_empty() {
            break;
        }
        let Ok(step) = Step::arbitrary(input) else {
            break;
        };
        let (from, packets) = match step {
            Step::Send { from, packet } => {
                let from = SENDERS[usize::from(from) % SENDERS.len()];
                (Place::Pod(from), vec![packet.bytes(Some(from))])
            }
            Step::Bring(packet) => (Place::Tunnel, vec![packet.bytes(None)]),
            Step::Answer { which, flags } => match earlier(&past, which) {
                Some(earlier) => (earlier.to, vec![draw::answer(&earlier.seen, flags)]),
                None => continue,
            },
            Step::Repeat { which, flags } => match earlier(&past, which) {
                Some(earlier) => (earlier.from, vec![draw::again(&earlier.sent, flags)]),
                None => continue,
            },
            Step::Cut { which, at, answers } => match earlier(&past, which) {
                Some(earlier) if answers => {
                    (earlier.to, draw::cut(&wire::mirrored(&earlier.seen), at))
                }
                Some(earlier) => (earlier.from, draw::cut(&earlier.sent, at)),
                None => continue,
            },
            Step::Turn { backend, to } => {
                let backend = [0, CLIENT, 3, 4][usize::from(backend) % 4];
                let flags = [0, BACKEND_LIVE, BACKEND_DRAINING][usize::from(to) % 3];
                turn(stage, &mut judge, backend, flags);
                continue;
            }
        };
        for bytes in packets {
            let outcome = send(stage, from, &bytes);
            let judged = judge.judge(from, &bytes, &outcome);
            tell(stage, from, &bytes, judged.as_ref().map(|(to, _)| *to));
            if let Some((to, seen)) = judged {
                past.push(Past {
                    from,
                    sent: bytes,
                    to,
                    seen,
                });
            }
        }
    }
    ledger::check(stage);
}

fn earlier(past: &[Past], which: u8) -> Option<&Past> {
    // The newest has the smallest number.
    past.iter()
        .rev()
        .nth(usize::from(which) % past.len().max(1))
}

fn turn(stage: &mut Stage, judge: &mut Judge, number: u32, flags: u32) {
    let backend = Backend {
        flags,
        ..if number == 0 {
            Stage::remote_backend()
        } else {
            Stage::local_backend(number)
        }
    };
    stage.node.backend(index(number), &backend);
    judge.turned(number, flags);
}

fn send(stage: &mut Stage, from: Place, bytes: &[u8]) -> Outcome {
    match from {
        Place::Pod(number) => {
            let sender = stage.limited(number);
            stage.node.from_pod(&sender, &framed(bytes))
        }
        Place::Tunnel => stage.node.from_tunnel(bytes),
    }
}

/// Tells the listener what sort of outcome a packet had.
fn tell(stage: &mut Stage, from: Place, bytes: &[u8], to: Option<Place>) {
    let Some(listener) = LISTENER.get() else {
        return;
    };
    let mut hasher = DefaultHasher::new();
    let header = bytes.first().map(|first| first >> 4);
    (from, to, header, stage.node.take_counts()).hash(&mut hasher);
    listener(hasher.finish());
}
