//! What happened, as lines and as one number: two runs of a seed must have the same.

use std::{
    fmt::Arguments,
    hash::{DefaultHasher, Hasher},
    sync::{Arc, Mutex, PoisonError},
};

#[derive(Debug, Default)]
struct Inner {
    hash: DefaultHasher,
    lines: u64,
    print: bool,
}

/// The trace of one run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trace(Arc<Mutex<Inner>>);

impl Trace {
    /// A trace that is printed too.
    pub(crate) fn printed() -> Self {
        let trace = Self::default();
        trace.0.lock().unwrap_or_else(PoisonError::into_inner).print = true;
        trace
    }

    /// Adds a line.
    pub(crate) fn note(&self, now: u64, what: Arguments<'_>) {
        let line = format!("{now:>6} {what}");
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.hash.write(line.as_bytes());
        inner.lines += 1;
        if inner.print {
            println!("{line}");
        }
    }

    /// The number of all lines so far.
    pub(crate) fn hash(&self) -> u64 {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .hash
            .finish()
    }

    /// The number of some bytes.
    pub(crate) fn sum(bytes: &[u8]) -> u64 {
        let mut hash = DefaultHasher::new();
        hash.write(bytes);
        hash.finish()
    }
}
