//! Number spaces: what is given out, what rests after use, what is next.
//!
//! A number is in use, at rest or free. It leaves its rest when its time has passed *and*, for a service's
//! number, when no instance of that service's earlier life is left that could still be sent to (I2). Numbers
//! are given round and round, so that one which was just released comes last.
//!
//! A copy shares what is the same: each change of an application tries its numbers on one.

use rpds::{RedBlackTreeMapSync, RedBlackTreeSetSync};
use serde::{Deserialize, Serialize};

use crate::{command::Refusal, name::ServiceName};

/// The numbers in use and at rest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numbers {
    /// The last node number that was given; they are never used again.
    pub last_node: u32,
    /// Service numbers in IPv6 VIPs.
    pub services6: Pool,
    /// Service numbers in IPv4 VIPs, shared by all policies but `instance`.
    pub services4: Pool,
    /// Numbers of the IPv4 VIPs of policy `instance`.
    pub instances4: Pool,
    /// The /27 blocks of the IPv4 endpoint half.
    pub blocks4: Pool,
}

/// One number space, from 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    used: RedBlackTreeSetSync<u32>,
    resting: RedBlackTreeMapSync<u32, Rest>,
    last: u32,
}

/// Why a number is not given out again yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Rest {
    /// Log time until which it rests at least.
    pub until_ms: u64,
    /// Instances of this service with an epoch below this one must be gone as well.
    pub after: Option<(ServiceName, u64)>,
}

impl Pool {
    /// The next free number below `size`.
    pub(super) fn take(&mut self, size: u32, what: &str) -> Result<u32, Refusal> {
        let taken = self.used.size() + self.resting.size();
        let exhausted = || Refusal::Exhausted {
            what: what.to_owned(),
            size: u64::from(size.saturating_sub(1)),
        };
        if taken >= size.saturating_sub(1) as usize {
            return Err(exhausted());
        }
        let after = (self.last.saturating_add(1)..size).chain(1..size);
        let number = after
            .take(taken + size as usize)
            .find(|number| !self.used.contains(number) && !self.resting.contains_key(number))
            .ok_or_else(exhausted)?;
        self.used.insert_mut(number);
        self.last = number;
        Ok(number)
    }

    /// That very number; `false` when it is in use or at rest.
    pub(super) fn take_this(&mut self, number: u32) -> Taken {
        if self.used.contains(&number) {
            Taken::InUse
        } else if self.resting.contains_key(&number) {
            Taken::Resting
        } else {
            self.used.insert_mut(number);
            Taken::Free
        }
    }

    /// Gives a number back; it rests first.
    pub(super) fn release(&mut self, number: u32, rest: Rest) {
        if self.used.remove_mut(&number) {
            self.resting.insert_mut(number, rest);
        }
    }

    /// Somebody uses a number that nobody has, or that rests: it rests, and longer.
    pub(super) fn disturb(&mut self, number: u32, until_ms: u64) {
        if self.used.contains(&number) {
            return;
        }
        let known = self.resting.get(&number);
        let rest = Rest {
            until_ms: known.map_or(until_ms, |rest| rest.until_ms.max(until_ms)),
            after: known.and_then(|rest| rest.after.clone()),
        };
        self.resting.insert_mut(number, rest);
    }

    /// Lets every number rest that `present` has given and this pool has not, and goes on behind both.
    pub(super) fn quarantine(&mut self, present: &Self, until_ms: u64) {
        let rest = Rest {
            until_ms,
            after: None,
        };
        let given = present.used.iter().chain(present.resting.keys());
        for number in given.filter(|number| !self.used.contains(*number)) {
            self.resting.insert_mut(*number, rest.clone());
        }
        self.last = self.last.max(present.last);
    }

    /// Ends the rest of the numbers for which it is over.
    pub(super) fn wake(&mut self, now_ms: u64, gone: impl Fn(&(ServiceName, u64)) -> bool) {
        let is_over =
            |rest: &Rest| rest.until_ms <= now_ms && rest.after.as_ref().is_none_or(&gone);
        let over = self.resting.iter().filter(|(_, rest)| is_over(rest));
        let over: Vec<u32> = over.map(|(number, _)| *number).collect();
        for number in over {
            self.resting.remove_mut(&number);
        }
    }

    /// Whether a number is in use.
    #[must_use]
    pub fn holds(&self, number: u32) -> bool {
        self.used.contains(&number)
    }
}

/// Whether a particular number could be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// It was free, and is not any more.
    Free,
    /// Another has it.
    InUse,
    /// It rests.
    Resting,
}

#[cfg(test)]
mod tests {
    use super::*;

    const REST: Rest = Rest {
        until_ms: 10,
        after: None,
    };

    #[test]
    fn a_released_number_rests_and_then_comes_last() {
        let mut pool = Pool::default();
        assert_eq!(pool.take(4, "x"), Ok(1));
        pool.release(1, REST);
        assert_eq!(pool.take(4, "x"), Ok(2));
        assert_eq!(pool.take(4, "x"), Ok(3));
        assert!(pool.take(4, "x").is_err());
        assert_eq!(pool.take_this(1), Taken::Resting);
        pool.wake(9, |_| true);
        assert!(pool.take(4, "x").is_err());
        pool.wake(10, |_| true);
        assert_eq!(pool.take(4, "x"), Ok(1));
        assert_eq!(pool.take_this(1), Taken::InUse);
    }

    #[test]
    fn a_number_rests_until_its_service_is_drained() {
        let mut pool = Pool::default();
        let service: ServiceName = "a/b/c".parse().unwrap();
        let number = pool.take(100, "x").unwrap();
        let after = Some((service, 7));
        pool.release(number, Rest { until_ms: 0, after });
        pool.wake(1_000_000, |_| false);
        assert_eq!(pool.take_this(number), Taken::Resting);
        pool.wake(1_000_000, |(_, epoch)| *epoch == 7);
        assert_eq!(pool.take_this(number), Taken::Free);
    }
}
