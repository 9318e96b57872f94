//! What clients of the leads did and saw, and whether that can have happened one operation at a time.
//!
//! A register is an application with one service, which is named by the value; its generation counts the writes. The
//! simulation and the run of real leads under faults fill a [`History`], and [`is_linearizable`] judges each register.
#![forbid(unsafe_code)]

mod linear;
pub mod random;

use std::sync::{Arc, Mutex, PoisonError};

pub use self::linear::{Deed, MOST, Operation, Shown, is_linearizable};

#[derive(Debug, Default)]
struct Inner {
    moment: u64,
    last_value: u64,
    operations: Vec<(u64, Operation)>,
}

/// What all clients did and saw.
#[derive(Clone, Debug, Default)]
pub struct History(Arc<Mutex<Inner>>);

impl History {
    fn with<R>(&self, change: impl FnOnce(&mut Inner) -> R) -> R {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The operations on one register.
    #[must_use]
    pub fn of(&self, register: u64) -> Vec<Operation> {
        self.with(|inner| {
            let own = inner.operations.iter().filter(|(of, _)| *of == register);
            own.map(|(_, operation)| *operation).collect()
        })
    }

    /// A client begins something; where it stands.
    #[must_use]
    pub fn begin(&self, register: u64, deed: Deed) -> usize {
        self.with(|inner| {
            inner.moment += 1;
            let operation = Operation {
                deed,
                began: inner.moment,
                ended: None,
            };
            inner.operations.push((register, operation));
            inner.operations.len() - 1
        })
    }

    /// It was answered, and was this.
    ///
    /// # Panics
    /// When nothing stands there.
    pub fn end(&self, at: usize, deed: Deed) {
        self.with(|inner| {
            inner.moment += 1;
            inner.operations[at].1.deed = deed;
            inner.operations[at].1.ended = Some(inner.moment);
        });
    }

    /// A value that nobody has written.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.with(|inner| {
            inner.last_value += 1;
            inner.last_value
        })
    }
}
