//! Whether what clients saw of one register can have happened one operation at a time.
//!
//! The search of Wing and Gong with Lowe's memory of where it was before. An operation without an answer may have
//! happened at any time after it began, or not at all. No crate does that: the ones there are want an answer to
//! every operation, or bring a model checker.

use std::collections::HashSet;

/// What a register shows: its value, and how often it was written since it was made.
pub type Shown = Option<(u64, u64)>;

/// What a client did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// It wrote a value that nobody else writes.
    Write(u64),
    /// It removed the register, which was there.
    Remove,
    /// It tried to remove the register, which was not there.
    Miss,
    /// It saw the register.
    Read(Shown),
    /// It reads the register, and knows nothing yet.
    Look,
}

/// One operation: when it began and when its answer came, in one order of all such moments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// What it was.
    pub deed: Deed,
    /// When it began.
    pub began: u64,
    /// When its answer came; `None`: none came.
    pub ended: Option<u64>,
}

/// The register after `deed`; `None` when it cannot have happened to it.
fn step(shown: Shown, deed: Deed) -> Option<Shown> {
    match (deed, shown) {
        (Deed::Write(value), None) => Some(Some((value, 1))),
        (Deed::Write(value), Some((_, times))) => Some(Some((value, times + 1))),
        (Deed::Remove, Some(_)) | (Deed::Miss, None) => Some(None),
        (Deed::Remove, None) | (Deed::Miss, Some(_)) => None,
        (Deed::Read(seen), shown) => (seen == shown).then_some(shown),
        (Deed::Look, shown) => Some(shown),
    }
}

/// The most operations on one register.
pub const MOST: usize = 128;
/// The value of writes that nobody saw.
const UNSEEN: u64 = u64::MAX;

/// The operations that say something, so that fewer orders need to be tried: what has no answer but was seen had
/// happened when it was seen, and values that nobody saw are alike.
fn known(operations: &[Operation]) -> Vec<Operation> {
    let seen_at = |value: u64| {
        let sees =
            |it: &&Operation| matches!(it.deed, Deed::Read(Some((seen, _))) if seen == value);
        let seen = operations.iter().filter(sees).filter_map(|it| it.ended);
        seen.min()
    };
    let known = |operation: &Operation| match operation.deed {
        Deed::Look => None,
        Deed::Write(value) => Some(match (seen_at(value), operation.ended) {
            (None, _) => Operation {
                deed: Deed::Write(UNSEEN),
                ..*operation
            },
            (seen, None) => Operation {
                ended: seen,
                ..*operation
            },
            _ => *operation,
        }),
        _ => Some(*operation),
    };
    operations.iter().filter_map(known).collect()
}

/// Whether there is an order of the operations that explains all answers.
///
/// # Panics
/// With more than [`MOST`] operations that say something.
#[must_use]
pub fn is_linearizable(operations: &[Operation]) -> bool {
    let operations = known(operations);
    assert!(operations.len() <= MOST, "{} operations", operations.len());
    let answered = operations
        .iter()
        .enumerate()
        .filter(|(_, it)| it.ended.is_some())
        .fold(0_u128, |all, (at, _)| all | 1 << at);
    let mut seen = HashSet::new();
    let mut open = vec![(0_u128, None)];
    while let Some((done, shown)) = open.pop() {
        if done & answered == answered {
            return true;
        }
        if seen.insert((done, shown)) {
            open.extend(next(&operations, done, shown));
        }
    }
    false
}

/// Where the search can go from `done`, the best last.
fn next(operations: &[Operation], done: u128, shown: Shown) -> Vec<(u128, Shown)> {
    let left = || (0..operations.len()).filter(|at| done & (1 << at) == 0);
    let first_end = left().filter_map(|at| operations[at].ended).min();
    let may_be_next = |at: &usize| first_end.is_none_or(|end| operations[*at].began < end);
    let mut next = Vec::new();
    // Of what nobody answered or saw, the first of a kind stands for all: each could have been it.
    let mut tried = Vec::new();
    for at in left().filter(may_be_next) {
        let Operation { deed, ended, .. } = operations[at];
        let Some(after) = step(shown, deed) else {
            continue;
        };
        let step = (done | 1 << at, after);
        if matches!(deed, Deed::Read(_) | Deed::Miss) {
            // It changes nothing, so it need not wait.
            return vec![step];
        }
        if ended.is_some() {
            next.push((ended, step));
        } else if !tried.contains(&deed) {
            tried.push(deed);
            next.push((None, step));
        }
    }
    // What was answered first mostly happened first; what was not answered, rarely.
    next.sort_by_key(|(ended, _)| std::cmp::Reverse(ended.unwrap_or(u64::MAX)));
    next.into_iter().map(|(_, step)| step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(deed: Deed, began: u64, ended: u64) -> Operation {
        Operation {
            deed,
            began,
            ended: Some(ended),
        }
    }

    fn unanswered(deed: Deed, began: u64) -> Operation {
        Operation {
            deed,
            began,
            ended: None,
        }
    }

    #[test]
    fn only_what_one_register_could_have_shown_is_linearizable() {
        use Deed::{Miss, Read, Remove, Write};
        let cases: [(&str, Vec<Operation>, bool); 11] = [
            ("nothing", vec![], true),
            (
                "a read of what was written",
                vec![
                    operation(Write(7), 0, 1),
                    operation(Read(Some((7, 1))), 2, 3),
                ],
                true,
            ),
            (
                "a stale read",
                vec![operation(Write(7), 0, 1), operation(Read(None), 2, 3)],
                false,
            ),
            (
                "a read beside the write",
                vec![operation(Write(7), 0, 3), operation(Read(None), 1, 2)],
                true,
            ),
            (
                "the new value, then the old one",
                vec![
                    operation(Write(7), 0, 1),
                    operation(Write(8), 2, 7),
                    operation(Read(Some((8, 2))), 3, 4),
                    operation(Read(Some((7, 1))), 5, 6),
                ],
                false,
            ),
            (
                "a write without an answer that happened",
                vec![unanswered(Write(7), 0), operation(Read(Some((7, 1))), 4, 5)],
                true,
            ),
            (
                "a write without an answer that did not",
                vec![unanswered(Write(7), 0), operation(Read(None), 4, 5)],
                true,
            ),
            (
                "a write that comes and goes",
                vec![
                    unanswered(Write(7), 0),
                    operation(Read(Some((7, 1))), 1, 2),
                    operation(Read(None), 3, 4),
                ],
                false,
            ),
            (
                "a write that happened twice",
                vec![
                    operation(Write(7), 0, 1),
                    operation(Read(Some((7, 2))), 2, 3),
                ],
                false,
            ),
            (
                "removed and missed",
                vec![
                    operation(Write(7), 0, 1),
                    operation(Remove, 2, 3),
                    operation(Miss, 4, 5),
                    operation(Read(None), 6, 7),
                ],
                true,
            ),
            (
                "a lost write",
                vec![operation(Write(7), 0, 1), operation(Miss, 2, 3)],
                false,
            ),
        ];
        for (what, operations, want) in cases {
            assert_eq!(is_linearizable(&operations), want, "{what}");
        }
    }
}
