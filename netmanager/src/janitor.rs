//! Collects what the kernel programs leave: idle flows, flows of dead backends; and counts what a draining
//! backend and each endpoint still have.
//!
//! The maps are walked a page at a time, so that no pass holds up the daemon, and an answer is of the last
//! whole pass. A flow is judged by itself alone; the programs never wait for this.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use ebpf_common::layout::{
    ACCOUNT_DATAGRAM, ACCOUNT_INBOUND, ACCOUNT_TCP, Backend, FLOW_ESTABLISHED, FLOW_FIN_BACKEND,
    FLOW_FIN_CLIENT, FLOW_FORWARD, FLOW_INBOUND, FLOW_RST, Flow, FlowKey, PROTO_TCP,
};

use crate::datapath::DatapathError;

/// How long a flow without packets is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Established TCP.
    pub tcp_idle: Duration,
    /// TCP that was closed or reset, or never became established.
    pub tcp_closed: Duration,
    /// Of a backend that is dead: long enough for the programs to end it actively.
    pub dead: Duration,
    /// UDP, echoes and unanswered SYNs count as a flow for so long; so long are they kept where an endpoint is
    /// near its quota.
    pub datagram: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            tcp_idle: Duration::from_hours(6),
            // 2 MSL of RFC 9293 section 3.4.1, by the two minutes each that Linux makes one of.
            tcp_closed: Duration::from_secs(60),
            dead: Duration::from_secs(30),
            datagram: Duration::from_secs(30),
        }
    }
}

/// Some flows of a map.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// The flows.
    pub flows: Vec<(FlowKey, Flow)>,
    /// The map that they are in.
    pub map: &'static str,
    /// Whether the walk is through the map.
    pub is_last: bool,
}

/// A table of flows as the janitor needs it.
pub trait FlowSource {
    /// The next flows of the walk, which starts over after the last page.
    ///
    /// # Errors
    /// When the map cannot be read; the walk starts over.
    fn next_page(&mut self) -> Result<Page, DatapathError>;

    /// Removes a flow as it was in a page of `map`; false where it was gone already.
    ///
    /// # Errors
    /// When the map refuses.
    fn remove(
        &mut self,
        map: &'static str,
        key: &FlowKey,
        flow: &Flow,
    ) -> Result<bool, DatapathError>;

    /// Starts the walk over.
    fn rewind(&mut self);
}

/// What one whole pass over all maps found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Flows from local endpoints by the backend's index, live ones only.
    pub by_backend: BTreeMap<u32, u64>,
    /// Entries kept, by map.
    pub kept: BTreeMap<&'static str, u64>,
    /// Entries removed.
    pub removed: u64,
    /// Flows by the endpoint's number and the kind of its account, those only that were there when the pass began.
    pub found: BTreeMap<(u32, usize), u64>,
}

/// What the flows are judged by.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// The kernel's array.
    pub backends: &'a BTreeMap<u32, Backend>,
    /// Endpoints that are near their quota, by number.
    pub pressed: &'a BTreeSet<u32>,
    /// Whether connections of dead backends are being ended: until that is done, they must be found.
    pub is_ending: bool,
    /// Kernel monotonic time.
    pub now: Duration,
}

/// The janitor over some maps.
pub struct Janitor<S> {
    sources: Vec<S>,
    limits: Limits,
    /// Which source the walk is in.
    at: usize,
    /// When the pass began; `None` before its first page.
    since: Option<Duration>,
    counting: Census,
    /// Counted flows that were removed since somebody asked, as [`Census::found`].
    removed: BTreeMap<(u32, usize), u64>,
}

impl<S: FlowSource> Janitor<S> {
    /// A janitor that starts its first pass.
    #[must_use]
    pub fn new(sources: Vec<S>, limits: Limits) -> Self {
        Self {
            sources,
            limits,
            at: 0,
            since: None,
            counting: Census::default(),
            removed: BTreeMap::new(),
        }
    }

    /// Whether the next page is a pass's first.
    #[must_use]
    pub const fn is_at_start(&self) -> bool {
        self.since.is_none()
    }

    /// The counted flows that were removed since the last call, by endpoint and kind.
    pub fn take_removed(&mut self) -> BTreeMap<(u32, usize), u64> {
        std::mem::take(&mut self.removed)
    }

    /// Judges one page of flows. Gives the census when this page ended a pass.
    ///
    /// # Errors
    /// When a map cannot be read; the pass starts over.
    pub fn step(&mut self, facts: Facts<'_>) -> Result<Option<Census>, DatapathError> {
        let since = *self.since.get_or_insert(facts.now);
        let Some(source) = self.sources.get_mut(self.at) else {
            return Ok(None);
        };
        let page = match source.next_page() {
            Ok(page) => page,
            Err(error) => {
                self.restart();
                return Err(error);
            }
        };
        let mut kept = 0;
        for (key, flow) in &page.flows {
            let account = account_of(key, flow);
            if is_garbage(key, flow, &self.limits, facts) {
                if source.remove(page.map, key, flow)?
                    && let Some(account) = account
                {
                    *self.removed.entry(account).or_default() += 1;
                }
                self.counting.removed += 1;
                continue;
            }
            kept += 1;
            if let Some(account) = account.filter(|_| u64::from(flow.born_s) <= since.as_secs()) {
                *self.counting.found.entry(account).or_default() += 1;
            }
            if is_open(key, flow)
                && (flow.flags & FLOW_ESTABLISHED != 0
                    || idle(flow, facts.now) < self.limits.datagram)
                && has_live_backend(flow, facts.backends)
            {
                *self.counting.by_backend.entry(flow.backend).or_default() += 1;
            }
        }
        *self.counting.kept.entry(page.map).or_default() += kept;
        if !page.is_last {
            return Ok(None);
        }
        self.at += 1;
        if self.at < self.sources.len() {
            return Ok(None);
        }
        Ok(Some(self.begin()))
    }

    /// Begins a new pass: what was counted so far is of another time.
    pub fn restart(&mut self) {
        for source in &mut self.sources {
            source.rewind();
        }
        self.begin();
    }

    fn begin(&mut self) -> Census {
        self.at = 0;
        self.since = None;
        std::mem::take(&mut self.counting)
    }
}

/// Whether the flow's backend is the one that it was made for, and alive.
pub(crate) fn has_live_backend(flow: &Flow, backends: &BTreeMap<u32, Backend>) -> bool {
    backends
        .get(&flow.backend)
        .is_some_and(|backend| backend.flags != 0 && backend.generation == flow.generation)
}

fn idle(flow: &Flow, now: Duration) -> Duration {
    now.saturating_sub(Duration::from_nanos(flow.last_seen_ns))
}

fn is_garbage(key: &FlowKey, flow: &Flow, limits: &Limits, facts: Facts<'_>) -> bool {
    let idle = idle(flow, facts.now);
    let datagram = if facts.pressed.contains(&key.endpoint) {
        limits.datagram
    } else {
        limits.tcp_idle
    };
    if key.direction == FLOW_INBOUND {
        return idle >= datagram;
    }
    if !has_live_backend(flow, facts.backends) {
        return idle >= limits.dead && !facts.is_ending;
    }
    if key.proto != PROTO_TCP {
        return idle >= datagram;
    }
    let is_settled = flow.flags & FLOW_ESTABLISHED != 0 && !is_over(flow);
    idle >= if is_settled {
        limits.tcp_idle
    } else {
        limits.tcp_closed
    }
}

/// The account that a flow is counted in, by this entry of it: the endpoint's number and the kind.
fn account_of(key: &FlowKey, flow: &Flow) -> Option<(u32, usize)> {
    let kind = match (key.direction, key.proto) {
        (FLOW_FORWARD, PROTO_TCP) if is_over(flow) => return None,
        (FLOW_FORWARD, PROTO_TCP) => ACCOUNT_TCP,
        (FLOW_FORWARD, _) => ACCOUNT_DATAGRAM,
        (FLOW_INBOUND, _) => ACCOUNT_INBOUND,
        _ => return None,
    };
    Some((key.endpoint, kind))
}

/// Whether this is the forward half of a flow that goes on; one side may have said its last word.
fn is_open(key: &FlowKey, flow: &Flow) -> bool {
    key.direction == FLOW_FORWARD && !is_over(flow)
}

/// Whether both sides ended, or one reset the connection.
pub(crate) fn is_over(flow: &Flow) -> bool {
    const BOTH: u32 = FLOW_FIN_CLIENT | FLOW_FIN_BACKEND;
    flow.flags & FLOW_RST != 0 || flow.flags & BOTH == BOTH
}

#[cfg(test)]
mod tests {
    use ebpf_common::layout::{BACKEND_LIVE, FLOW_REVERSE, PROTO_UDP};

    use super::*;

    const NOW: Duration = Duration::from_secs(100_000);

    struct FakeFlows {
        map: &'static str,
        flows: BTreeMap<FlowKey, Flow>,
        page: usize,
        at: usize,
    }

    impl FlowSource for FakeFlows {
        fn next_page(&mut self) -> Result<Page, DatapathError> {
            let flows: Vec<_> = self
                .flows
                .iter()
                .skip(self.at)
                .take(self.page)
                .map(|(k, f)| (*k, *f))
                .collect();
            self.at += flows.len();
            let is_last = self.at >= self.flows.len();
            if is_last {
                self.at = 0;
            }
            Ok(Page {
                flows,
                map: self.map,
                is_last,
            })
        }

        fn remove(
            &mut self,
            _: &'static str,
            key: &FlowKey,
            _: &Flow,
        ) -> Result<bool, DatapathError> {
            let was_there = self.flows.remove(key).is_some();
            self.at = self.at.saturating_sub(1);
            Ok(was_there)
        }

        fn rewind(&mut self) {
            self.at = 0;
        }
    }

    fn key(sport: u16, proto: u8, direction: u8) -> FlowKey {
        FlowKey {
            sport_be: sport,
            proto,
            direction,
            ..FlowKey::default()
        }
    }

    fn flow(idle: Duration, flags: u32) -> Flow {
        Flow {
            last_seen_ns: (NOW - idle).as_nanos() as u64,
            backend: 1,
            generation: 4,
            flags,
            ..Flow::default()
        }
    }

    fn backends(flags: u32, generation: u32) -> BTreeMap<u32, Backend> {
        BTreeMap::from([(
            1,
            Backend {
                flags,
                generation,
                ..Backend::default()
            },
        )])
    }

    #[test]
    fn flows_are_collected_by_protocol_state_and_the_life_of_their_backend() {
        let live = backends(BACKEND_LIVE, 4);
        let limits = Limits::default();
        let second = Duration::from_secs(1);
        let closed = FLOW_FIN_CLIENT | FLOW_FIN_BACKEND;
        let tcp = key(1, PROTO_TCP, FLOW_FORWARD);
        let cases = [
            (
                "idle for hours",
                tcp,
                flow(limits.tcp_idle - second, FLOW_ESTABLISHED),
                &live,
                false,
            ),
            (
                "idle too long",
                tcp,
                flow(limits.tcp_idle, FLOW_ESTABLISHED),
                &live,
                true,
            ),
            (
                "half closed",
                tcp,
                flow(limits.tcp_closed, FLOW_ESTABLISHED | FLOW_FIN_CLIENT),
                &live,
                false,
            ),
            ("closed", tcp, flow(limits.tcp_closed, closed), &live, true),
            ("opening", tcp, flow(second, 0), &live, false),
            ("never opened", tcp, flow(limits.tcp_closed, 0), &live, true),
            ("reset", tcp, flow(limits.tcp_closed, FLOW_RST), &live, true),
            ("just reset", tcp, flow(second, FLOW_RST), &live, false),
            (
                "backend just died",
                tcp,
                flow(second, 0),
                &backends(0, 4),
                false,
            ),
            (
                "backend dead",
                tcp,
                flow(limits.dead, 0),
                &backends(0, 4),
                true,
            ),
            (
                "index is another's",
                tcp,
                flow(limits.dead, 0),
                &backends(BACKEND_LIVE, 5),
                true,
            ),
            (
                "no backend at all",
                key(1, PROTO_UDP, FLOW_INBOUND),
                flow(limits.dead, 0),
                &live,
                false,
            ),
        ];
        for (name, key, flow, backends, want) in cases {
            let facts = Facts {
                backends,
                pressed: &BTreeSet::new(),
                is_ending: false,
                now: NOW,
            };
            assert_eq!(is_garbage(&key, &flow, &limits, facts), want, "{name}");
            if !has_live_backend(&flow, backends) && key.direction != FLOW_INBOUND {
                let facts = Facts {
                    is_ending: true,
                    ..facts
                };
                assert!(!is_garbage(&key, &flow, &limits, facts), "{name}");
            }
        }
    }

    #[test]
    fn datagrams_are_kept_for_hours_unless_their_endpoint_is_near_its_quota() {
        let (live, limits) = (backends(BACKEND_LIVE, 4), Limits::default());
        for direction in [FLOW_FORWARD, FLOW_REVERSE, FLOW_INBOUND] {
            for (pressed, idle, want) in [
                (
                    BTreeSet::new(),
                    limits.tcp_idle - Duration::from_secs(1),
                    false,
                ),
                (BTreeSet::new(), limits.tcp_idle, true),
                (BTreeSet::from([0]), limits.datagram, true),
                (BTreeSet::from([0]), Duration::from_secs(1), false),
                (BTreeSet::from([1]), limits.datagram, false),
            ] {
                let facts = Facts {
                    backends: &live,
                    pressed: &pressed,
                    is_ending: false,
                    now: NOW,
                };
                let key = key(1, PROTO_UDP, direction);
                assert_eq!(is_garbage(&key, &flow(idle, 0), &limits, facts), want);
            }
        }
    }

    #[test]
    fn a_pass_counts_open_forward_flows_by_backend() {
        let recent = flow(Duration::from_secs(1), FLOW_ESTABLISHED);
        let flows = BTreeMap::from([
            (key(1, PROTO_TCP, FLOW_FORWARD), recent),
            (
                key(2, PROTO_TCP, FLOW_FORWARD),
                flow(Duration::from_hours(1), FLOW_ESTABLISHED),
            ),
            (key(1, PROTO_TCP, FLOW_REVERSE), recent),
            (
                key(3, PROTO_TCP, FLOW_FORWARD),
                flow(Duration::ZERO, FLOW_ESTABLISHED | FLOW_FIN_CLIENT),
            ),
            (
                key(4, PROTO_TCP, FLOW_FORWARD),
                flow(Duration::ZERO, FLOW_FIN_CLIENT | FLOW_FIN_BACKEND),
            ),
            (
                key(6, PROTO_TCP, FLOW_FORWARD),
                flow(Duration::from_hours(7), FLOW_ESTABLISHED),
            ),
        ]);
        let lru = FakeFlows {
            map: "FLOWS_LRU",
            flows: BTreeMap::from([
                (
                    key(5, PROTO_UDP, FLOW_FORWARD),
                    flow(Duration::from_secs(29), 0),
                ),
                (
                    key(7, PROTO_TCP, FLOW_FORWARD),
                    flow(Duration::from_secs(1), 0),
                ),
                (
                    key(8, PROTO_TCP, FLOW_FORWARD),
                    flow(Duration::from_secs(31), 0),
                ),
            ]),
            page: 2,
            at: 0,
        };
        let mut janitor = Janitor::new(
            vec![
                FakeFlows {
                    map: "FLOWS",
                    flows,
                    page: 2,
                    at: 0,
                },
                lru,
            ],
            Limits::default(),
        );
        let live = backends(BACKEND_LIVE, 4);
        let mut census = None;
        for _ in 0..10 {
            let facts = Facts {
                backends: &live,
                pressed: &BTreeSet::new(),
                is_ending: false,
                now: NOW,
            };
            census = census.or(janitor.step(facts).unwrap());
        }
        let census = census.unwrap();
        assert_eq!(
            census.by_backend,
            BTreeMap::from([(1, 5)]),
            "1, 2 and 3 here, 5 and 7 there"
        );
        assert_eq!(census.removed, 1);
        assert_eq!(
            census.kept,
            BTreeMap::from([("FLOWS", 5), ("FLOWS_LRU", 3)])
        );
        assert_eq!(
            census.found,
            BTreeMap::from([((0, ACCOUNT_TCP), 5), ((0, ACCOUNT_DATAGRAM), 1)])
        );
        let removed = BTreeMap::from([((0, ACCOUNT_TCP), 1)]);
        assert_eq!(janitor.take_removed(), removed);
        assert_eq!(janitor.take_removed(), BTreeMap::new());
    }
}
