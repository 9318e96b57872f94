//! What is done once: the outcomes of the last changes that came with a key.
//!
//! ```text
//!  key, body --first--> carried out, remembered     --again--> the same outcome, nothing is done
//!  key, another body --> refused
//! ```
//!
//! The memory is part of the replicated state, so that it does not matter which lead is asked again, and when. It is
//! bounded: the oldest of [`KEPT`] keys is forgotten for a new one.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::command::{Command, Outcome, Refusal};

/// How many keys are remembered.
pub const KEPT: usize = 100_000;
/// The longest key, bytes: who asked, and what they chose.
pub const KEY_LIMIT: usize = 160;
/// A refusal that says more than so many bytes is not remembered: it changed nothing, and may be asked for again.
const LONGEST: usize = 512;

/// A request's body, shortened to what tells two of them apart (FNV-1a, 128 bits, as two halves).
pub type Digest = [u64; 2];

/// The digest of `parts`, one after the other.
#[must_use]
pub fn digest(parts: &[&[u8]]) -> Digest {
    const BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let bytes = parts.iter().flat_map(|part| {
        // The length tells where one part ends.
        let length = part.len().to_be_bytes();
        part.iter().copied().chain(length)
    });
    let hash = bytes.fold(BASIS, |hash, byte| {
        (hash ^ u128::from(byte)).wrapping_mul(PRIME)
    });
    [(hash >> 64) as u64, hash as u64]
}

/// A command that is carried out once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Once {
    /// Who asked, and the key that they chose.
    pub key: String,
    /// Of what they asked, whole.
    pub body: Digest,
    /// Which of that request's commands this is, from 0; the first one comes first.
    pub part: u32,
    /// What to do.
    pub command: Command,
}

/// What came of a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    body: Digest,
    outcome: Outcome,
}

/// The last keys and what came of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    by_key: BTreeMap<String, Remembered>,
    /// The keys, oldest first.
    order: VecDeque<String>,
}

fn whole(key: &str, part: u32) -> String {
    format!("{key}#{part}")
}

impl Memory {
    /// What came of a command of this request; `None` when it is not remembered.
    ///
    /// # Errors
    /// When the key was used for something else.
    pub fn recall(&self, key: &str, part: u32, body: Digest) -> Result<Option<&Outcome>, Refusal> {
        let reused = || Refusal::KeyReused {
            key: key.to_owned(),
        };
        // The first command stands for its request: a part more or less is another request.
        let first = self.by_key.get(&whole(key, 0));
        if first.is_some_and(|first| first.body != body) {
            return Err(reused());
        }
        match self.by_key.get(&whole(key, part)) {
            Some(known) if known.body != body => Err(reused()),
            known => Ok(known.map(|known| &known.outcome)),
        }
    }

    /// Remembers what came of a command, and forgets the oldest for it.
    pub(crate) fn keep(&mut self, once: &Once, outcome: &Outcome) {
        let says = |refusal: &Refusal| refusal.to_string().len() > LONGEST;
        if outcome.as_ref().is_err_and(says) {
            return;
        }
        while self.order.len() >= KEPT {
            if let Some(oldest) = self.order.pop_front() {
                self.by_key.remove(&oldest);
            }
        }
        let key = whole(&once.key, once.part);
        let remembered = Remembered {
            body: once.body,
            outcome: outcome.clone(),
        };
        if self.by_key.insert(key.clone(), remembered).is_none() {
            self.order.push_back(key);
        }
    }

    /// How many keys are remembered.
    #[must_use]
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether nothing is remembered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Applied;

    fn once(key: &str, body: &[u8]) -> Once {
        Once {
            key: key.to_owned(),
            body: digest(&[body]),
            part: 0,
            command: Command::Tick,
        }
    }

    #[test]
    fn only_the_last_keys_are_remembered() {
        let mut memory = Memory::default();
        let done = Ok(Applied::Changed);
        for number in 0..=KEPT {
            memory.keep(&once(&number.to_string(), b"x"), &done);
        }
        assert_eq!((memory.len(), memory.by_key.len()), (KEPT, KEPT));
        let recall = |key: &str| memory.recall(key, 0, digest(&[b"x"])).unwrap().cloned();
        assert_eq!(recall("0"), None);
        assert_eq!(recall("1"), Some(done.clone()));
        assert_eq!(recall(&KEPT.to_string()), Some(done));
    }

    #[test]
    fn another_body_or_one_part_more_is_another_request() {
        let mut memory = Memory::default();
        memory.keep(&once("k", b"x"), &Ok(Applied::Changed));
        let (same, other) = (digest(&[b"x"]), digest(&[b"y"]));
        assert_eq!(memory.recall("k", 0, same), Ok(Some(&Ok(Applied::Changed))));
        assert_eq!(memory.recall("k", 1, same), Ok(None));
        for part in [0, 1] {
            let refused = memory.recall("k", part, other);
            assert!(
                matches!(refused, Err(Refusal::KeyReused { .. })),
                "{refused:?}"
            );
        }
        assert_eq!(memory.recall("l", 0, other), Ok(None));
    }

    #[test]
    fn a_refusal_with_many_words_is_not_remembered() {
        let mut memory = Memory::default();
        let refusal = Err(Refusal::OtherMesh("m".repeat(LONGEST)));
        memory.keep(&once("k", b"x"), &refusal);
        assert!(memory.is_empty());
    }

    #[test]
    fn a_digest_tells_where_a_part_ends() {
        assert_ne!(digest(&[b"ab", b"c"]), digest(&[b"a", b"bc"]));
        assert_eq!(digest(&[b"ab", b"c"]), digest(&[b"ab", b"c"]));
    }
}
