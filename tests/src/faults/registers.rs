//! The registers, and the histories of what clients did to each of them.
//!
//! A register is retired after so many operations as can be judged at once, and judged when the last of them is over.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use weft_history::{Deed, History, MOST, is_linearizable};

use super::Summary;

/// How many registers there are at a time.
pub(super) const AT_A_TIME: u64 = 10;
/// After so many operations a register is retired.
const RETIRED: usize = MOST - 28;

#[derive(Debug)]
struct Register {
    history: History,
    /// Operations that were begun.
    begun: usize,
    /// Of those, the ones that are under way.
    open: usize,
    answered: usize,
}

#[derive(Debug, Default)]
struct Inner {
    /// The number of the register in each place.
    places: BTreeMap<u64, u64>,
    last: u64,
    registers: BTreeMap<u64, Register>,
    retired: BTreeSet<u64>,
    /// Retired, judged, and still in the Knowledge Base.
    judged: Vec<u64>,
    count: usize,
    answered: usize,
    unanswered: usize,
    writes: usize,
    last_write: Option<Instant>,
    longest_pause: Duration,
    values: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Registers(Mutex<Inner>);

/// An operation that was begun.
#[derive(Clone, Copy, Debug)]
pub(super) struct Begun {
    pub(super) register: u64,
    at: usize,
}

impl Registers {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A value that nobody has written.
    pub(super) fn value(&self) -> u64 {
        let mut inner = self.inner();
        inner.values += 1;
        inner.values
    }

    /// A client begins something on the register in this place.
    pub(super) fn begin(&self, place: u64, deed: Deed) -> Begun {
        let mut inner = self.inner();
        let known = inner.places.get(&place).copied();
        let number = known.unwrap_or_else(|| {
            inner.last += 1;
            let number = inner.last;
            inner.places.insert(place, number);
            let register = Register {
                history: History::default(),
                begun: 0,
                open: 0,
                answered: 0,
            };
            inner.registers.insert(number, register);
            number
        });
        let register = inner.registers.get_mut(&number).expect("it has a place");
        register.begun += 1;
        register.open += 1;
        let at = register.history.begin(number, deed);
        if register.begun == RETIRED {
            inner.places.remove(&place);
            inner.retired.insert(number);
        }
        Begun {
            register: number,
            at,
        }
    }

    /// It is over: it was this, or nobody answered.
    pub(super) fn end(&self, begun: Begun, deed: Option<Deed>) {
        let mut inner = self.inner();
        if let Some(Deed::Write(_) | Deed::Remove) = deed {
            let now = Instant::now();
            let last = inner.last_write.replace(now).unwrap_or(now);
            inner.longest_pause = inner.longest_pause.max(now - last);
            inner.writes += 1;
        }
        let register = inner.registers.get_mut(&begun.register);
        let register = register.expect("it is judged once nothing is open");
        register.open -= 1;
        if let Some(deed) = deed {
            register.answered += 1;
            register.history.end(begun.at, deed);
        }
    }

    /// Writes that were acknowledged.
    pub(super) fn acknowledged(&self) -> usize {
        self.inner().writes
    }

    /// Judges the registers that were retired and that nobody does anything to any more.
    pub(super) fn judge_retired(&self) -> Result<()> {
        self.judge(|inner, number| inner.retired.contains(&number))
    }

    /// Judges all others, too; nothing is under way.
    pub(super) fn judge_all(&self) -> Result<()> {
        self.judge(|_, _| true)
    }

    fn judge(&self, is_due: impl Fn(&Inner, u64) -> bool) -> Result<()> {
        let due: Vec<_> = {
            let inner = self.inner();
            let all = inner.registers.iter();
            let due = all.filter(|(number, it)| it.open == 0 && is_due(&inner, **number));
            due.map(|(number, it)| (*number, it.history.of(*number)))
                .collect()
        };
        for (number, operations) in due {
            ensure!(
                is_linearizable(&operations),
                "register {number} cannot have shown what was seen of it"
            );
            let mut inner = self.inner();
            let Some(register) = inner.registers.remove(&number) else {
                continue;
            };
            inner.retired.remove(&number);
            inner.judged.push(number);
            inner.count += 1;
            inner.answered += register.answered;
            inner.unanswered += register.begun - register.answered;
        }
        Ok(())
    }

    /// One of those that were judged, to be taken away.
    pub(super) fn take_judged(&self) -> Option<u64> {
        self.inner().judged.pop()
    }

    pub(super) fn summary(&self, faults: usize) -> Summary {
        let inner = self.inner();
        Summary {
            faults,
            registers: inner.count,
            answered: inner.answered,
            unanswered: inner.unanswered,
            longest_pause: inner.longest_pause,
        }
    }

    /// What was done to the registers that are not judged, or do not stand the judgement.
    pub(super) fn told(&self) -> String {
        let mut text = String::new();
        for (number, register) in &self.inner().registers {
            for operation in register.history.of(*number) {
                let ended = operation.ended.map_or("-".to_owned(), |it| it.to_string());
                // A string takes everything.
                let _ = writeln!(
                    text,
                    "register {number}: {} to {ended}: {:?}",
                    operation.began, operation.deed
                );
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(registers: &Registers, value: u64, is_answered: bool) {
        let deed = Deed::Write(value);
        let begun = registers.begin(0, deed);
        registers.end(begun, is_answered.then_some(deed));
    }

    fn read(registers: &Registers, shown: Option<(u64, u64)>) {
        let begun = registers.begin(0, Deed::Look);
        registers.end(begun, Some(Deed::Read(shown)));
    }

    #[test]
    fn a_lost_write_a_write_that_happened_twice_and_a_stale_read_are_found() {
        for (shown, holds) in [
            (Some((2, 2)), true),
            // The second write was acknowledged and is not there.
            (Some((1, 1)), false),
            // One of them happened twice.
            (Some((2, 3)), false),
            (None, false),
        ] {
            let registers = Registers::default();
            write(&registers, 1, true);
            write(&registers, 2, true);
            read(&registers, shown);
            assert_eq!(registers.judge_all().is_ok(), holds, "{shown:?}");
            assert_eq!(registers.told().is_empty(), holds, "what broke is told");
        }
    }

    #[test]
    fn a_write_that_nobody_answered_may_have_happened_once() {
        for (shown, holds) in [
            (Some((1, 1)), true),
            (Some((2, 2)), true),
            (Some((2, 3)), false),
        ] {
            let registers = Registers::default();
            write(&registers, 1, true);
            write(&registers, 2, false);
            read(&registers, shown);
            assert_eq!(registers.judge_all().is_ok(), holds, "{shown:?}");
        }
    }

    #[test]
    fn a_register_is_retired_and_judged_once_nothing_is_open() {
        let registers = Registers::default();
        let open = registers.begin(0, Deed::Look);
        for value in 1..=RETIRED as u64 {
            write(&registers, value, true);
        }
        registers.judge_retired().unwrap();
        assert_eq!(registers.take_judged(), None);
        registers.end(open, Some(Deed::Read(None)));
        registers.judge_retired().unwrap();
        assert_eq!(registers.take_judged(), Some(1));
        let summary = registers.summary(0);
        assert_eq!((summary.registers, summary.answered), (1, RETIRED));
        let next = registers.begin(0, Deed::Look);
        assert_eq!(next.register, 2);
    }
}
