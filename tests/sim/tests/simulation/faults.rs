//! What goes wrong in a run, and when: drawn from the seed before it begins.
//!
//! A seed uses some kinds of faults and not the others, so that each also meets the system alone.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    network::{HostId, Weather},
    random::Random,
};

/// One thing that happens.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// These ways are cut, all others are not.
    Cut(BTreeSet<(HostId, HostId)>),
    Weather(Weather),
    /// The power goes.
    Crash(HostId),
    /// The power goes at one of the next writes.
    Fuse(HostId, u64),
    /// The next sync fails.
    BreakSync(HostId),
    Start(HostId),
    /// Nothing runs there for so long, milliseconds.
    Sleep(HostId, u64),
    /// The time of day is so wrong from now on, milliseconds.
    Jump(HostId, i64),
}

/// When faults begin and end, milliseconds.
pub(crate) const BEGIN: u64 = 1_500;
/// See [`BEGIN`].
pub(crate) const END: u64 = 7_500;

/// The events by time.
pub(crate) type Plan = BTreeMap<u64, Vec<Event>>;

/// A calm network.
pub(crate) const CALM: Weather = Weather {
    delay: 4,
    loss: 0,
    twice: 0,
};

/// Draws what goes wrong among `leads` leads and the clients' host after them.
pub(crate) fn draw(random: &mut Random, leads: usize) -> Plan {
    let mut plan = Plan::new();
    let mut at = |when: u64, event: Event| plan.entry(when).or_default().push(event);
    at(
        0,
        Event::Weather(Weather {
            delay: random.within(1, 30),
            ..CALM
        }),
    );
    let kinds: Vec<u64> = (0..7).filter(|_| random.chance(400)).collect();
    let mut now = BEGIN;
    while now < END && !kinds.is_empty() {
        let until = (now + random.within(200, 2_500)).min(END);
        let host = *random.pick(&(0..leads).collect::<Vec<_>>());
        match random.pick(&kinds) {
            0 => {
                at(now, Event::Cut(cut(random, leads, host)));
                at(until, Event::Cut(BTreeSet::new()));
            }
            1 => {
                let weather = Weather {
                    delay: *random.pick(&[30, 100, 400]),
                    loss: *random.pick(&[0, 50, 300]),
                    twice: *random.pick(&[0, 100, 400]),
                };
                at(now, Event::Weather(weather));
                at(until, Event::Weather(CALM));
            }
            2 => {
                at(now, Event::Crash(host));
                at(until, Event::Start(host));
            }
            3 => {
                at(now, Event::Fuse(host, random.within(0, 40)));
                at(until, Event::Crash(host));
                at(until + 1, Event::Start(host));
            }
            4 => {
                at(now, Event::BreakSync(host));
                at(until, Event::Start(host));
            }
            5 => at(now, Event::Sleep(host, random.within(50, 2_500))),
            _ => {
                let by = i64::try_from(random.within(0, 2_000_000)).expect("it is small");
                at(now, Event::Jump(host, by - 1_000_000));
            }
        }
        if random.chance(100) {
            // All at once.
            for host in 0..leads {
                at(now, Event::Crash(host));
                at(now + random.within(50, 1_000), Event::Start(host));
            }
        }
        now += random.within(100, 2_000);
    }
    plan
}

/// Ways that are cut around `host`.
fn cut(random: &mut Random, leads: usize, host: HostId) -> BTreeSet<(HostId, HostId)> {
    let clients = leads;
    let others: Vec<HostId> = (0..leads).filter(|other| *other != host).collect();
    let to: Vec<_> = others.iter().map(|other| (host, *other)).collect();
    let from: Vec<_> = others.iter().map(|other| (*other, host)).collect();
    let mut cut: BTreeSet<_> = match random.within(0, 5) {
        // From all other leads, both ways or one.
        0 => to.into_iter().chain(from).collect(),
        1 => to.into_iter().collect(),
        2 => from.into_iter().collect(),
        // From one other lead.
        3 => {
            let other = *random.pick(&others);
            BTreeSet::from([(host, other), (other, host)])
        }
        // Answers to one other lead.
        _ => BTreeSet::from([(host, *random.pick(&others))]),
    };
    if random.chance(200) {
        cut.insert((host, clients));
        cut.insert((clients, host));
    }
    cut
}
