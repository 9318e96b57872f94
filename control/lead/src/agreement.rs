//! Whether the leads have the same Knowledge Base: each compares its own checkpoints with those that the others tell.
//!
//! A lead whose state is not that of a majority of the voters ends, and does not start again: it would answer with what nobody
//! agreed on, or lead with it. Without a majority nobody knows who is right: all go on, and say so.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tokio::time::sleep;

use crate::{
    lead::Lead,
    raft::{Condemned, Flaw, checkpoint::Checkpoints, members::Roll},
};

/// How often the others are asked while they have not all come by a checkpoint.
const ROUND: Duration = Duration::from_secs(1);
/// So many rounds the others get before what they have not said counts as nothing.
const PATIENCE: u32 = 10;

/// What a lead's state is, seen by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    /// As a majority's.
    Agrees,
    /// A majority has another.
    Odd { majority: String, leads: Vec<u64> },
    /// There are several, and none of a majority so far.
    Split,
    /// Too few have said theirs.
    Open,
}

/// Judges lead `own` by what the state of each is at one checkpoint; `configs` are the voters (two sets in the midst of a change).
fn judge(own: u64, configs: &[BTreeSet<u64>], hashes: &BTreeMap<u64, String>) -> Verdict {
    let mut by_hash: BTreeMap<&str, BTreeSet<u64>> = BTreeMap::new();
    for (id, hash) in hashes {
        by_hash.entry(hash).or_default().insert(*id);
    }
    let is_majority = |leads: &BTreeSet<u64>| {
        let has = |voters: &BTreeSet<u64>| 2 * voters.intersection(leads).count() > voters.len();
        !configs.is_empty() && configs.iter().all(has)
    };
    let majority = by_hash.iter().find(|(_, leads)| is_majority(leads));
    match (majority, hashes.get(&own)) {
        (Some((hash, _)), Some(mine)) if hash == mine => Verdict::Agrees,
        (Some((hash, leads)), Some(_)) => Verdict::Odd {
            majority: (*hash).to_owned(),
            leads: leads.iter().copied().collect(),
        },
        (None, _) if by_hash.len() > 1 => Verdict::Split,
        _ => Verdict::Open,
    }
}

/// What each lead says of entry `index`, as far as it encodes its state as this one does.
fn at(index: u64, shape: &str, said: &BTreeMap<u64, Checkpoints>) -> BTreeMap<u64, String> {
    let comparable = said.iter().filter(|(_, it)| it.shape == shape);
    comparable
        .filter_map(|(id, it)| Some((*id, it.at(index)?.to_owned())))
        .collect()
}

/// Compares this lead's checkpoints with the others'; runs until the task is dropped.
pub(crate) async fn watch(lead: Arc<Lead>, condemned: Condemned) {
    let mut known = lead.checks.watch();
    let mut judged = None;
    loop {
        let new = known.wait_for(|it| it.last.last().map(|it| it.index) > judged);
        if new.await.is_err() {
            return;
        }
        for round in 0..PATIENCE {
            let own = lead.checks.known();
            // Of several only the newest: what differed at one differs at all that follow.
            let Some(newest) = own.last.last() else {
                break;
            };
            judged = Some(newest.index);
            if compare(&lead, &own, &condemned, round + 1 == PATIENCE).await {
                break;
            }
            sleep(ROUND).await;
        }
    }
}

/// Whether nothing more is to be found out about the checkpoints in `own`.
async fn compare(lead: &Lead, own: &Checkpoints, condemned: &Condemned, is_last: bool) -> bool {
    let roll = Roll::of(&lead.raft);
    let abouts = lead.abouts(&roll).await.into_iter();
    let said = abouts.filter_map(|(id, about)| Some((id, about?.checkpoints?)));
    let mut said: BTreeMap<_, _> = said.collect();
    said.insert(lead.id, own.clone());
    let name = |id: &u64| {
        roll.nodes
            .get(id)
            .map_or_else(|| id.to_string(), |it| it.name.clone())
    };
    let mut is_open = false;
    for checkpoint in own.last.iter().rev() {
        let hashes = at(checkpoint.index, &own.shape, &said);
        match judge(lead.id, &roll.configs, &hashes) {
            Verdict::Agrees => break,
            Verdict::Odd { majority, leads } => {
                let leads: Vec<_> = leads.iter().map(name).collect();
                let flaw = Flaw {
                    record: format!("the state at entry {}", checkpoint.index),
                    expected: format!("{majority} as of {}", leads.join(", ")),
                    found: checkpoint.hash.clone(),
                };
                tracing::error!(%flaw, "this lead does not have what the group agreed on");
                condemned.note(flaw).await;
                return true;
            }
            Verdict::Split => {
                is_open = true;
                if is_last {
                    let hashes: Vec<_> = hashes
                        .iter()
                        .map(|(id, hash)| format!("{}: {hash}", name(id)))
                        .collect();
                    let (index, hashes) = (checkpoint.index, hashes.join(", "));
                    tracing::error!(
                        index,
                        hashes,
                        "the leads do not have the same state, and no majority says which is right"
                    );
                }
            }
            Verdict::Open => is_open = true,
        }
    }
    !is_open
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::{decode, encode, members::About};

    fn hashes(said: &[(u64, &str)]) -> BTreeMap<u64, String> {
        said.iter()
            .map(|(id, hash)| (*id, (*hash).to_owned()))
            .collect()
    }

    fn odd(leads: &[u64]) -> Verdict {
        Verdict::Odd {
            majority: "x".to_owned(),
            leads: leads.to_vec(),
        }
    }

    #[test]
    fn who_differs_from_a_majority_is_odd_and_without_one_nobody_is() {
        let three = [BTreeSet::from([1, 2, 3])];
        for (said, want) in [
            (&[(1, "x")][..], Verdict::Open),
            (&[(1, "x"), (2, "x")], Verdict::Agrees),
            (&[(1, "y"), (2, "x"), (3, "x")], odd(&[2, 3])),
            (&[(1, "x"), (2, "x"), (3, "y")], Verdict::Agrees),
            (&[(1, "x"), (2, "y")], Verdict::Split),
            (&[(1, "x"), (2, "y"), (3, "z")], Verdict::Split),
            // It has not come by, or is older.
            (&[(2, "x"), (3, "x")], Verdict::Open),
            // One that does not vote is judged, and judges nobody.
            (&[(1, "x"), (2, "y"), (4, "x")], Verdict::Split),
            (&[], Verdict::Open),
        ] {
            assert_eq!(judge(1, &three, &hashes(said)), want, "{said:?}");
        }
        let learner = hashes(&[(4, "y"), (1, "x"), (2, "x")]);
        assert_eq!(judge(4, &three, &learner), odd(&[1, 2]));
        let two = [BTreeSet::from([1, 2])];
        assert_eq!(
            judge(1, &two, &hashes(&[(1, "x"), (2, "y")])),
            Verdict::Split
        );
        let one = [BTreeSet::from([1])];
        assert_eq!(judge(1, &one, &hashes(&[(1, "x")])), Verdict::Agrees);
    }

    #[test]
    fn in_the_midst_of_a_change_both_majorities_count() {
        let configs = [BTreeSet::from([1, 2, 3]), BTreeSet::from([3, 4, 5])];
        let one = hashes(&[(1, "x"), (2, "x"), (3, "y")]);
        assert_eq!(judge(3, &configs, &one), Verdict::Split);
        let both = hashes(&[(1, "x"), (2, "x"), (3, "y"), (4, "x"), (5, "x")]);
        assert_eq!(judge(3, &configs, &both), odd(&[1, 2, 4, 5]));
        assert_eq!(judge(1, &[], &one), Verdict::Split);
    }

    #[test]
    fn an_older_lead_says_nothing_of_its_state() {
        #[derive(serde::Serialize)]
        struct Older {
            id: u64,
            version: &'static str,
            level: u32,
            applied: u64,
        }
        let older = Older {
            id: 2,
            version: "0",
            level: 4,
            applied: 7,
        };
        let about: About = decode(&encode(&older).unwrap()).unwrap();
        assert_eq!(about.checkpoints, None);
    }

    #[test]
    fn who_encodes_its_state_in_another_way_is_not_compared() {
        let said = |shape: &str| Checkpoints {
            shape: shape.to_owned(),
            last: vec![crate::raft::checkpoint::Checkpoint {
                index: 7,
                hash: "x".to_owned(),
            }],
        };
        let all = BTreeMap::from([(1, said("now")), (2, said("before")), (3, said("now"))]);
        assert_eq!(at(7, "now", &all), hashes(&[(1, "x"), (3, "x")]));
        assert_eq!(at(8, "now", &all), BTreeMap::new());
    }
}
