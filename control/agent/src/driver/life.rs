//! The life of one instance, as a state machine without I/O.
//!
//! ```text
//!  Attaching --Attached--> Starting --Started--> Running --Ended--> Starting (after a back-off)
//!      |                      |                     |
//!      |                      | StartRefused        | Stop
//!      | Stop                 v                     v
//!      '----------------> Detaching <--Ended--- Ending (SIGTERM, after the grace SIGKILL)
//!                             '--Detached--> Over
//! ```
//!
//! A keeper asks [`Life::todo`] what to do, does it, and says by [`Life::on`] what came of it.

use std::time::{Duration, Instant};

use crate::driver::State;

/// The first wait after a process ended or an attachment failed; doubles each time.
const BACK_OFF: Duration = Duration::from_millis(250);
const BACK_OFF_MAX: Duration = Duration::from_secs(30);
/// A process that ran for so long is forgiven its earlier ends.
const FORGIVEN: Duration = Duration::from_secs(30);
/// From one probe to the next: until it serves, while it serves, while it is silent.
const PROBE_STARTING: Duration = Duration::from_millis(50);
const PROBE_SERVING: Duration = Duration::from_secs(1);
const PROBE_SILENT: Duration = Duration::from_millis(250);
/// Probes that must fail in a row before a serving instance counts as silent.
const MISSES: u32 = 2;
/// Attempts to detach before the namespace is simply removed; the NetManager collects the rest.
const DETACH_TRIES: u32 = 3;

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Todo {
    /// Give it an interface.
    Attach,
    /// Start its process.
    Start,
    /// Try whether it takes connections.
    Probe,
    /// Send SIGTERM.
    Terminate,
    /// Send SIGKILL.
    Kill,
    /// Detach, remove everything.
    Detach {
        /// The plugin's help was sought in vain: do without.
        by_force: bool,
    },
    /// Nothing before this instant, unless something happens.
    Wait(Instant),
    /// It is over.
    End,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It has its interface.
    Attached,
    /// It has none, for now; why.
    AttachFailed(String),
    /// Its process runs.
    Started,
    /// It can never start here; why.
    StartRefused(String),
    /// It did not start this time; why.
    StartFailed(String),
    /// It takes connections.
    Answered,
    /// It takes none; why.
    Unanswered(String),
    /// Its process ended; how.
    Ended(String),
    /// It is to end.
    Stop {
        /// From the polite signal to the last one.
        grace: Duration,
    },
    /// Nothing of it is left.
    Detached,
    /// Something may be left; why.
    DetachFailed(String),
}

/// The life of one instance.
#[derive(Clone, Debug)]
pub struct Life {
    phase: Phase,
    reason: String,
    /// How often in a row something failed.
    failures: u32,
    /// How it ends: refused with this reason, or gone.
    refused: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Attaching { at: Instant },
    Starting { at: Instant, again: bool },
    Running(Running),
    Ending { term: bool, kill_at: Instant },
    Detaching { at: Instant, tries: u32 },
    Over,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Running {
    since: Instant,
    probe_at: Instant,
    state: State,
    misses: u32,
}

impl Life {
    /// A new instance.
    pub fn new(now: Instant) -> Self {
        Self::at(Phase::Attaching { at: now })
    }

    /// An instance whose process was found running; whether it `serves` is as it was.
    pub fn adopted(serves: bool, now: Instant) -> Self {
        Self::at(Phase::Running(Running {
            since: now,
            probe_at: now,
            state: if serves {
                State::Serving
            } else {
                State::Starting
            },
            misses: 0,
        }))
    }

    /// An instance of which only remains were found.
    pub fn remains(now: Instant) -> Self {
        Self::at(Phase::Detaching { at: now, tries: 0 })
    }

    fn at(phase: Phase) -> Self {
        Self {
            phase,
            reason: String::new(),
            failures: 0,
            refused: false,
        }
    }

    /// How far it is, in the agent's words.
    pub fn state(&self) -> State {
        match self.phase {
            Phase::Attaching { .. } | Phase::Starting { again: false, .. } => State::Starting,
            Phase::Starting { again: true, .. } => State::Restarting,
            Phase::Running(running) => running.state,
            Phase::Ending { .. } | Phase::Detaching { .. } => State::Stopping,
            Phase::Over if self.refused => State::Refused,
            Phase::Over => State::Gone,
        }
    }

    /// Why it does not serve; empty when it does.
    pub fn reason(&self) -> &str {
        match self.state() {
            State::Serving => "",
            _ => &self.reason,
        }
    }

    /// Whether a process should be there.
    pub fn has_process(&self) -> bool {
        matches!(self.phase, Phase::Running(_) | Phase::Ending { .. })
    }

    /// What to do now.
    pub fn todo(&self, now: Instant) -> Todo {
        let due = |at: Instant, todo| if now >= at { todo } else { Todo::Wait(at) };
        match self.phase {
            Phase::Attaching { at } => due(at, Todo::Attach),
            Phase::Starting { at, .. } => due(at, Todo::Start),
            Phase::Running(running) => due(running.probe_at, Todo::Probe),
            Phase::Ending { term: false, .. } => Todo::Terminate,
            Phase::Ending { kill_at, .. } => due(kill_at, Todo::Kill),
            Phase::Detaching { at, tries } => {
                let by_force = tries >= DETACH_TRIES;
                due(at, Todo::Detach { by_force })
            }
            Phase::Over => Todo::End,
        }
    }

    /// Takes an order or the outcome of what was done; what does not fit the phase says nothing.
    pub fn on(&mut self, event: Event, now: Instant) {
        match (self.phase, event) {
            (Phase::Attaching { .. }, Event::Attached) => {
                self.failures = 0;
                self.phase = Phase::Starting {
                    at: now,
                    again: false,
                };
            }
            (Phase::Attaching { .. }, Event::AttachFailed(reason)) => {
                let at = now + self.back_off();
                self.set(Phase::Attaching { at }, reason);
            }
            (Phase::Starting { .. }, Event::Started) => {
                self.phase = Phase::Running(Running {
                    since: now,
                    probe_at: now,
                    state: State::Starting,
                    misses: 0,
                });
            }
            (Phase::Starting { .. }, Event::StartRefused(reason)) => {
                self.refused = true;
                self.set(Phase::Detaching { at: now, tries: 0 }, reason);
            }
            (Phase::Starting { again, .. }, Event::StartFailed(reason)) => {
                let at = now + self.back_off();
                self.set(Phase::Starting { at, again }, reason);
            }
            (Phase::Running(running), Event::Answered) => {
                self.phase = Phase::Running(Running {
                    probe_at: now + PROBE_SERVING,
                    state: State::Serving,
                    misses: 0,
                    ..running
                });
            }
            (Phase::Running(running), Event::Unanswered(reason)) => {
                self.set(Phase::Running(running.missed(now)), reason);
            }
            (Phase::Running(running), Event::Ended(how)) => {
                if now >= running.since + FORGIVEN {
                    self.failures = 0;
                }
                let at = now + self.back_off();
                self.set(Phase::Starting { at, again: true }, how);
            }
            (Phase::Running(_), Event::Stop { grace }) => {
                let kill_at = now + grace;
                self.phase = Phase::Ending {
                    term: false,
                    kill_at,
                };
            }
            (Phase::Ending { term, kill_at }, Event::Stop { grace }) => {
                let kill_at = kill_at.min(now + grace);
                self.phase = Phase::Ending { term, kill_at };
            }
            (Phase::Ending { .. }, Event::Ended(_))
            | (Phase::Attaching { .. } | Phase::Starting { .. }, Event::Stop { .. }) => {
                self.phase = Phase::Detaching { at: now, tries: 0 };
            }
            // Stopped while it was being refused: the stop is what was asked for last.
            (Phase::Detaching { .. }, Event::Stop { .. }) => self.refused = false,
            (Phase::Detaching { .. }, Event::Detached) => self.phase = Phase::Over,
            (Phase::Detaching { tries, .. }, Event::DetachFailed(reason)) => {
                let (at, tries) = (now + BACK_OFF, tries + 1);
                if self.refused {
                    self.phase = Phase::Detaching { at, tries };
                } else {
                    self.set(Phase::Detaching { at, tries }, reason);
                }
            }
            _ => {}
        }
    }

    /// SIGTERM was sent.
    pub fn terminated(&mut self) {
        if let Phase::Ending { term, .. } = &mut self.phase {
            *term = true;
        }
    }

    /// SIGKILL was sent; it is sent again until the process is gone.
    pub fn killed(&mut self, now: Instant) {
        if let Phase::Ending { kill_at, .. } = &mut self.phase {
            *kill_at = now + BACK_OFF;
        }
    }

    fn set(&mut self, phase: Phase, reason: String) {
        self.phase = phase;
        self.reason = reason;
    }

    fn back_off(&mut self) -> Duration {
        let doubled = BACK_OFF.saturating_mul(1 << self.failures.min(16));
        self.failures = self.failures.saturating_add(1);
        doubled.min(BACK_OFF_MAX)
    }
}

impl Running {
    fn missed(self, now: Instant) -> Self {
        let misses = self.misses + 1;
        let (state, next) = match self.state {
            State::Serving if misses < MISSES => (State::Serving, PROBE_SILENT),
            State::Serving | State::Silent => (State::Silent, PROBE_SILENT),
            state => (state, PROBE_STARTING),
        };
        Self {
            probe_at: now + next,
            state,
            misses,
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(5);

    fn running(now: Instant) -> Life {
        let mut life = Life::new(now);
        life.on(Event::Attached, now);
        life.on(Event::Started, now);
        life
    }

    #[test]
    fn it_attaches_then_starts_then_serves_when_it_answers() {
        let now = Instant::now();
        let mut life = Life::new(now);
        assert_eq!(life.todo(now), Todo::Attach);
        life.on(Event::Attached, now);
        assert_eq!(life.todo(now), Todo::Start);
        life.on(Event::Started, now);
        assert_eq!(
            (life.todo(now), life.state()),
            (Todo::Probe, State::Starting)
        );
        life.on(Event::Unanswered("port 80 refuses".into()), now);
        assert_eq!(life.state(), State::Starting);
        assert_eq!(life.todo(now), Todo::Wait(now + PROBE_STARTING));
        assert_eq!(life.reason(), "port 80 refuses");
        life.on(Event::Answered, now);
        assert_eq!((life.state(), life.reason()), (State::Serving, ""));
        assert_eq!(life.todo(now), Todo::Wait(now + PROBE_SERVING));
    }

    #[test]
    fn one_missed_probe_is_forgiven_and_the_next_is_silence() {
        let now = Instant::now();
        let mut life = running(now);
        life.on(Event::Answered, now);
        life.on(Event::Unanswered("no answer".into()), now);
        assert_eq!(life.state(), State::Serving);
        life.on(Event::Unanswered("no answer".into()), now);
        assert_eq!((life.state(), life.reason()), (State::Silent, "no answer"));
        life.on(Event::Answered, now);
        assert_eq!(life.state(), State::Serving);
    }

    #[test]
    fn a_process_that_ends_is_started_again_with_a_growing_wait_up_to_the_cap() {
        let mut now = Instant::now();
        let mut life = running(now);
        let mut waits = Vec::new();
        for _ in 0..9 {
            life.on(Event::Ended("exited with 1".into()), now);
            assert_eq!(
                (life.state(), life.reason()),
                (State::Restarting, "exited with 1")
            );
            let Todo::Wait(at) = life.todo(now) else {
                panic!("{:?}", life.todo(now));
            };
            waits.push((at - now).as_millis());
            now = at;
            assert_eq!(life.todo(now), Todo::Start);
            life.on(Event::Started, now);
        }
        assert_eq!(
            waits,
            [250, 500, 1000, 2000, 4000, 8000, 16000, 30000, 30000]
        );
        now += FORGIVEN;
        life.on(Event::Ended("exited with 1".into()), now);
        assert_eq!(
            life.todo(now),
            Todo::Wait(now + BACK_OFF),
            "it ran long enough"
        );
    }

    #[test]
    fn an_attachment_that_fails_is_tried_again_and_says_why() {
        let now = Instant::now();
        let mut life = Life::new(now);
        for wait in [1, 2, 4] {
            life.on(Event::AttachFailed("no NetManager".into()), now);
            assert_eq!(
                (life.state(), life.reason()),
                (State::Starting, "no NetManager")
            );
            assert_eq!(life.todo(now), Todo::Wait(now + BACK_OFF * wait));
        }
    }

    #[test]
    fn a_stop_ends_politely_then_by_force_and_a_shorter_grace_wins() {
        let now = Instant::now();
        let mut life = running(now);
        life.on(Event::Stop { grace: GRACE }, now);
        assert_eq!(
            (life.todo(now), life.state()),
            (Todo::Terminate, State::Stopping)
        );
        life.terminated();
        assert_eq!(life.todo(now), Todo::Wait(now + GRACE));
        life.on(Event::Stop { grace: GRACE * 2 }, now);
        assert_eq!(
            life.todo(now),
            Todo::Wait(now + GRACE),
            "a longer one does not"
        );
        life.on(Event::Stop { grace: GRACE / 5 }, now);
        let end = now + GRACE / 5;
        assert_eq!(life.todo(now), Todo::Wait(end));
        assert_eq!(life.todo(end), Todo::Kill);
        life.killed(end);
        assert_eq!(life.todo(end), Todo::Wait(end + BACK_OFF), "and again");
        life.on(Event::Ended("killed".into()), end);
        assert_eq!(life.todo(end), Todo::Detach { by_force: false });
        life.on(Event::Detached, end);
        assert_eq!((life.todo(end), life.state()), (Todo::End, State::Gone));
    }

    #[test]
    fn whatever_cannot_start_is_detached_and_refused() {
        let now = Instant::now();
        let mut life = Life::new(now);
        life.on(Event::Attached, now);
        life.on(Event::StartRefused("no such command".into()), now);
        assert_eq!(life.state(), State::Stopping);
        life.on(Event::DetachFailed("busy".into()), now);
        life.on(Event::Detached, now);
        assert_eq!(
            (life.state(), life.reason()),
            (State::Refused, "no such command")
        );
    }

    #[test]
    fn a_stop_in_any_phase_ends_gone() {
        let now = Instant::now();
        let mut refused = Life::new(now);
        refused.on(Event::Attached, now);
        refused.on(Event::StartRefused("no such command".into()), now);
        let mut starting = Life::new(now);
        starting.on(Event::Attached, now);
        for mut life in [
            Life::new(now),
            starting,
            running(now),
            Life::adopted(true, now),
            Life::remains(now),
            refused,
        ] {
            life.on(Event::Stop { grace: GRACE }, now);
            if life.has_process() {
                life.terminated();
                life.on(Event::Ended("exited".into()), now);
            }
            assert_eq!(life.todo(now), Todo::Detach { by_force: false });
            life.on(Event::Detached, now);
            assert_eq!(life.state(), State::Gone);
        }
    }

    #[test]
    fn detaching_is_forced_after_a_few_failures() {
        let mut now = Instant::now();
        let mut life = Life::remains(now);
        for _ in 0..DETACH_TRIES {
            assert_eq!(life.todo(now), Todo::Detach { by_force: false });
            life.on(Event::DetachFailed("no plugin".into()), now);
            now += BACK_OFF;
        }
        assert_eq!(life.todo(now), Todo::Detach { by_force: true });
    }

    #[test]
    fn an_adopted_instance_serves_on_without_a_gap() {
        let now = Instant::now();
        let life = Life::adopted(true, now);
        assert_eq!(
            (life.state(), life.todo(now)),
            (State::Serving, Todo::Probe)
        );
        assert_eq!(Life::adopted(false, now).state(), State::Starting);
    }
}
