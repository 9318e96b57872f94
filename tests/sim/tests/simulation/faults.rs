//! What goes wrong in a run, and when: drawn from the seed before it begins.
//!
//! A seed uses some kinds of faults and not the others, so that each also meets the system alone.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    host::agent_host,
    network::{HostId, Weather},
    random::Random,
};

/// Ways, from and to.
pub(crate) type Ways = BTreeSet<(HostId, HostId)>;

/// One thing that happens.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// These ways are cut.
    Cut(Ways),
    /// These are not any more.
    Mend(Ways),
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
    /// Something at an agent, by its place among them.
    Agent(usize, AgentEvent),
}

/// What happens at an agent.
#[derive(Clone, Debug)]
pub(crate) enum AgentEvent {
    Start,
    /// Its process ends; what it runs goes on.
    Crash,
    /// The power of its machine goes.
    CutPower,
    /// It does nothing for so long, milliseconds.
    Sleep(u64),
    /// One of its nodes is away for so long, milliseconds.
    LoseNode(usize, u64),
    /// One of its instances ends by itself.
    CrashProcess(usize),
}

/// From when to when something goes wrong, milliseconds.
pub(crate) type Span = std::ops::Range<u64>;

/// How long an agent may do nothing, milliseconds: a node fences within a tenth of a lease, its drift taken off.
const STALL: u64 = 300;

/// The events by time.
pub(crate) type Plan = BTreeMap<u64, Vec<Event>>;

/// A calm network.
pub(crate) const CALM: Weather = Weather {
    delay: 4,
    loss: 0,
    twice: 0,
};

/// Draws what goes wrong among `leads` leads and the clients' host after them, about so often, milliseconds.
pub(crate) fn among_leads(random: &mut Random, leads: usize, span: &Span, pause: u64) -> Plan {
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
    let mut now = span.start;
    while now < span.end && !kinds.is_empty() {
        let until = (now + random.within(200, 2_500)).min(span.end);
        let host = *random.pick(&(0..leads).collect::<Vec<_>>());
        match random.pick(&kinds) {
            0 => {
                let ways = cut(random, leads, host);
                at(now, Event::Cut(ways.clone()));
                at(until, Event::Mend(ways));
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
        now += random.within(100, pause);
    }
    plan
}

/// Draws what goes wrong at the agents of `clusters` clusters, each by itself.
pub(crate) fn at_agents(
    random: &mut Random,
    (leads, clusters): (usize, usize),
    span: &Span,
) -> Plan {
    let mut plan = Plan::new();
    let kinds: Vec<u64> = (0..6).filter(|_| random.chance(500)).collect();
    let mut now = span.start;
    while now < span.end && !kinds.is_empty() {
        let mut at = |when: u64, event: Event| plan.entry(when).or_default().push(event);
        let until = (now + random.within(200, 25_000)).min(span.end);
        let cluster = usize::try_from(random.within(0, clusters as u64)).expect("they are few");
        let mut agent = |when: u64, event| at(when, Event::Agent(cluster, event));
        match random.pick(&kinds) {
            0 => lose(random, &mut plan, (leads, cluster), now..until),
            1 => {
                agent(now, AgentEvent::Crash);
                agent(until, AgentEvent::Start);
            }
            2 => {
                agent(now, AgentEvent::CutPower);
                agent(until, AgentEvent::Start);
            }
            3 => agent(now, AgentEvent::Sleep(random.within(10, STALL))),
            4 => {
                let node = usize::try_from(random.within(0, 2)).expect("it is small");
                agent(now, AgentEvent::LoseNode(node, until - now));
            }
            _ => {
                let process = usize::try_from(random.within(0, 8)).expect("it is small");
                agent(now, AgentEvent::CrashProcess(process));
            }
        }
        now += random.within(100, 8_000);
    }
    plan
}

/// Draws losses of every cluster, one after the other, and their returns.
pub(crate) fn returns(random: &mut Random, (leads, clusters): (usize, usize), span: &Span) -> Plan {
    let mut plan = Plan::new();
    for cluster in 0..clusters {
        let mut now = span.start + random.within(0, 12_000);
        loop {
            // Some are back before their lease ends, most are not.
            let until = now + random.within(8_000, 22_000);
            if until >= span.end {
                break;
            }
            match random.within(0, 4) {
                0 => {
                    let mut at = |when, event| {
                        let event = Event::Agent(cluster, event);
                        plan.entry(when).or_default().push(event);
                    };
                    let event = *random.pick(&[true, false]);
                    let event = if event {
                        AgentEvent::Crash
                    } else {
                        AgentEvent::CutPower
                    };
                    at(now, event);
                    at(until, AgentEvent::Start);
                }
                _ => lose(random, &mut plan, (leads, cluster), now..until),
            }
            now = until + random.within(1_500, 15_000);
        }
    }
    plan
}

/// Draws second agents of the clusters, which are behind the first ones; each ends with its machine.
pub(crate) fn twins(random: &mut Random, clusters: usize, span: &Span) -> Plan {
    let mut plan = Plan::new();
    let mut now = span.start;
    while now < span.end {
        let cluster = usize::try_from(random.within(0, clusters as u64)).expect("they are few");
        let until = (now + random.within(500, 20_000)).min(span.end);
        let mut at = |when, event| {
            let event = Event::Agent(clusters + cluster, event);
            plan.entry(when).or_default().push(event);
        };
        at(now, AgentEvent::Start);
        at(until, AgentEvent::CutPower);
        now = until + random.within(5_000, 15_000);
    }
    plan
}

/// Adds a plan to another.
pub(crate) fn join(plan: &mut Plan, other: Plan) {
    for (at, events) in other {
        plan.entry(at).or_default().extend(events);
    }
}

/// Cuts an agent from all leads, both ways or one, for a while.
fn lose(random: &mut Random, plan: &mut Plan, (leads, cluster): (usize, usize), span: Span) {
    let agent = agent_host(leads, cluster);
    let to = (0..leads).map(|lead| (agent, lead));
    let from = (0..leads).map(|lead| (lead, agent));
    let ways: Ways = match random.within(0, 4) {
        0 => to.collect(),
        1 => from.collect(),
        _ => to.chain(from).collect(),
    };
    let mut at = |when, event| plan.entry(when).or_default().push(event);
    at(span.start, Event::Cut(ways.clone()));
    at(span.end, Event::Mend(ways));
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
