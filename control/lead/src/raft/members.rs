//! Who is a member of the group, and how that changes: one lead at a time.
//!
//! ```text
//!  add --> learner --caught up, and a majority with it answers--> voter --(it replaces one)--> that one leaves
//! ```
//!
//! What is still to be done stands in the membership itself (a learner wants to be a voter; a member may name the
//! one that it replaces), so that a new leader goes on. An id is given once: it is the end of the log when its
//! lead was added, behind the ids of the leads that formed the group. A lead that lost its disk is therefore never
//! taken for the one that it was.

use std::collections::{BTreeMap, BTreeSet};

use openraft::{LogId, Membership};
use serde::{Deserialize, Serialize};

use super::{Member, Paced, Raft, checkpoint::Checkpoints};
use crate::room::Room;

/// The first leads of a group have ids up to this one.
pub(crate) const FORMED: u64 = 64;
/// A learner that is so many entries behind is caught up: the leader sends it the rest with the next message.
const CAUGHT_UP: u64 = 64;

/// A member, as the leader sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seat {
    pub(crate) id: u64,
    pub(crate) member: Member,
    pub(crate) is_voter: bool,
    pub(crate) leads: bool,
    /// The end of its log, as far as the leader knows.
    pub(crate) matched: Option<u64>,
    /// What it says of itself; `None` when it does not answer.
    pub(crate) about: Option<About>,
}

/// What a lead says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct About {
    /// Who answers.
    pub(crate) id: u64,
    pub(crate) version: String,
    /// The feature level of its version.
    pub(crate) level: u32,
    /// The last entry that it has applied.
    pub(crate) applied: u64,
    /// The fingerprints of the authorities whose certificates it accepts; none from a lead that does not say.
    #[serde(default)]
    pub(crate) authorities: Vec<String>,
    /// When what it signs certificates with ends, milliseconds; `None` where it signs none.
    #[serde(default)]
    pub(crate) issuer_ends_ms: Option<u64>,
    /// How much room its disk has; `None` from a lead that does not say, or does not know.
    #[serde(default)]
    pub(crate) room: Option<Room>,
    /// What its state was at the last checkpoints; `None` from a lead that does not say.
    #[serde(default)]
    pub(crate) checkpoints: Option<Checkpoints>,
    /// How far the others are; `None` from a lead that does not say.
    #[serde(default)]
    pub(crate) pace: Option<Paced>,
}

/// The group at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Roll {
    /// One set of voters; two while a change is between its two entries.
    pub(crate) configs: Vec<BTreeSet<u64>>,
    /// Voters and learners.
    pub(crate) nodes: BTreeMap<u64, Member>,
    /// Whether the last change is committed.
    pub(crate) is_settled: bool,
    /// The end of the leader's log.
    pub(crate) last: u64,
    /// The end of each member's log; only the leader knows it.
    pub(crate) matched: BTreeMap<u64, u64>,
}

/// What the membership needs next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// A change was left between its two entries: these are its voters.
    Settle(BTreeSet<u64>),
    /// This learner is caught up.
    Promote(u64),
    /// This voter is replaced.
    Retire(u64),
    /// This voter is replaced, and leads.
    GiveWay,
}

impl Roll {
    /// The group as `raft` knows it.
    pub(crate) fn of(raft: &Raft) -> Self {
        let metrics = raft.metrics();
        let metrics = metrics.borrow();
        let stored = &metrics.membership_config;
        let membership: &Membership<u64, Member> = stored.membership();
        let index = |id: &LogId<u64>| id.index;
        let matched = metrics.replication.iter().flatten();
        Self {
            configs: membership.get_joint_config().clone(),
            nodes: membership
                .nodes()
                .map(|(id, member)| (*id, member.clone()))
                .collect(),
            is_settled: stored.log_id().as_ref().map(index)
                <= metrics.last_applied.as_ref().map(index),
            last: metrics.last_log_index.unwrap_or(0),
            matched: matched
                .filter_map(|(id, log)| log.as_ref().map(|log| (*id, log.index)))
                .collect(),
        }
    }

    pub(crate) fn voters(&self) -> BTreeSet<u64> {
        self.configs.iter().flatten().copied().collect()
    }

    /// The member of this name; of two (one replaces the other) the newer.
    pub(crate) fn named(&self, name: &str) -> Option<(u64, &Member)> {
        let mut nodes = self.nodes.iter().rev();
        nodes
            .find(|(_, member)| member.name == name)
            .map(|(id, member)| (*id, member))
    }

    /// The member whose place a lead takes that replaces this name: of two of the name the one that votes.
    pub(crate) fn place(&self, name: &str) -> Option<u64> {
        let voters = self.voters();
        let named = self.nodes.iter().filter(|(_, it)| it.name == name);
        let place = named.max_by_key(|(id, _)| (voters.contains(id), **id));
        place.map(|(id, _)| *id)
    }

    /// The learner that this wish made already: the same name, address and place.
    pub(crate) fn made(&self, wish: &Member) -> Option<(u64, &Member)> {
        let place = |member: &Member| {
            let old = member.replaces.and_then(|old| self.nodes.get(&old));
            old.map(|old| old.name.clone())
        };
        let voters = self.voters();
        let mut learners = self.nodes.iter().filter(|(id, _)| !voters.contains(id));
        let same = |(_, it): &(&u64, &Member)| {
            (&it.name, it.address, place(it)) == (&wish.name, wish.address, place(wish))
        };
        learners.find(same).map(|(id, member)| (*id, member))
    }

    /// An id that no member ever had.
    pub(crate) fn next_id(&self) -> u64 {
        FORMED + self.last + 1
    }

    /// Whether something is still to be done.
    pub(crate) fn is_moving(&self) -> bool {
        let voters = self.voters();
        self.configs.len() > 1
            || self.nodes.keys().any(|id| !voters.contains(id))
            || self.nodes.values().any(|member| self.replaced(member))
    }

    fn replaced(&self, member: &Member) -> bool {
        member
            .replaces
            .is_some_and(|old| self.nodes.contains_key(&old))
    }

    /// What to do next, seen by the leader `own`, while `alive` answer.
    pub(crate) fn next_step(&self, own: u64, alive: &BTreeSet<u64>) -> Option<Step> {
        if !self.is_settled {
            return None;
        }
        let voters = self.configs.last()?;
        if self.configs.len() > 1 {
            return Some(Step::Settle(voters.clone()));
        }
        // Whoever took a place that is long free still says so.
        let mut replaced = voters.iter().filter_map(|id| self.nodes.get(id)?.replaces);
        if let Some(old) = replaced.find(|old| self.nodes.contains_key(old)) {
            let rest: BTreeSet<u64> = voters.iter().copied().filter(|id| *id != old).collect();
            return match old == own {
                _ if !has_majority(&rest, alive) => None,
                true => Some(Step::GiveWay),
                false => Some(Step::Retire(old)),
            };
        }
        let is_ready = |id: &u64| {
            let mut with: BTreeSet<u64> = voters.clone();
            with.insert(*id);
            let behind = self.matched.get(id).map(|at| self.last.saturating_sub(*at));
            alive.contains(id)
                && behind.is_some_and(|behind| behind <= CAUGHT_UP)
                && has_majority(&with, alive)
        };
        let mut learners = self.nodes.keys().filter(|id| !voters.contains(*id));
        learners.find(|id| is_ready(id)).copied().map(Step::Promote)
    }

    /// Whether the group goes on without this voter, while `alive` answer.
    pub(crate) fn can_lose(&self, id: u64, alive: &BTreeSet<u64>) -> Result<(), MemberError> {
        let mut rest = self.voters();
        rest.remove(&id);
        let name = |id: &u64| {
            self.nodes
                .get(id)
                .map_or_else(String::new, |it| it.name.clone())
        };
        if rest.is_empty() {
            return Err(MemberError::Last(name(&id)));
        }
        if has_majority(&rest, alive) {
            return Ok(());
        }
        Err(MemberError::NoMajorityLeft {
            name: name(&id),
            left: rest.len(),
            silent: rest.difference(alive).map(name).collect(),
        })
    }
}

/// The feature level that every member has; `None` while one does not say.
pub(crate) fn agreed_level(abouts: &[(u64, Option<About>)]) -> Option<u32> {
    let levels = abouts.iter().map(|(_, about)| Some(about.as_ref()?.level));
    levels.collect::<Option<Vec<_>>>()?.into_iter().min()
}

/// Whether a majority of `voters` answers.
pub(crate) fn has_majority(voters: &BTreeSet<u64>, alive: &BTreeSet<u64>) -> bool {
    2 * voters.intersection(alive).count() > voters.len()
}

/// Why the group stays as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub(crate) enum MemberError {
    /// There is no such lead.
    #[error("no lead {0}")]
    Unknown(String),
    /// The name is taken.
    #[error("lead {name} is a member already, at {address}")]
    Taken { name: String, address: String },
    /// The address is taken.
    #[error("{address} is lead {name}'s address")]
    AddressTaken { name: String, address: String },
    /// Another change comes first.
    #[error("the leads are being changed: {0}")]
    Busy(String),
    /// Without it there is no group.
    #[error("lead {0} is the only voter")]
    Last(String),
    /// Without it the others cannot decide anything.
    #[error("without lead {name} there are {left} voters, and no majority of them answers (silent: {})", silent.join(", "))]
    NoMajorityLeft {
        name: String,
        left: usize,
        silent: Vec<String>,
    },
    /// Nobody can take over.
    #[error("no other lead is caught up and answers: lead {0} goes on leading")]
    NoHeir(String),
    /// Raft says so.
    #[error("the membership was not changed: {0}")]
    Raft(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn roll(voters: &[u64], learners: &[(u64, Option<u64>)]) -> Roll {
        let member = |id: u64, replaces| Member {
            name: format!("n{id}"),
            replaces,
            ..Member::default()
        };
        let mut nodes: BTreeMap<_, _> = voters.iter().map(|id| (*id, member(*id, None))).collect();
        nodes.extend(learners.iter().map(|(id, old)| (*id, member(*id, *old))));
        Roll {
            configs: vec![voters.iter().copied().collect()],
            matched: nodes.keys().map(|id| (*id, 1_000)).collect(),
            nodes,
            is_settled: true,
            last: 1_000,
        }
    }

    fn set(ids: &[u64]) -> BTreeSet<u64> {
        ids.iter().copied().collect()
    }

    #[test]
    fn a_learner_becomes_a_voter_once_it_is_caught_up_and_a_majority_with_it_answers() {
        let mut one = roll(&[1], &[(70, None)]);
        assert_eq!(one.next_step(1, &set(&[1])), None);
        assert_eq!(one.next_step(1, &set(&[1, 70])), Some(Step::Promote(70)));
        one.matched.insert(70, 1_000 - CAUGHT_UP - 1);
        assert_eq!(one.next_step(1, &set(&[1, 70])), None);
        one.matched.remove(&70);
        assert_eq!(one.next_step(1, &set(&[1, 70])), None);

        let three = roll(&[1, 2, 3], &[(70, None)]);
        assert_eq!(three.next_step(1, &set(&[1, 70])), None);
        let lost_one = set(&[1, 2, 70]);
        assert_eq!(three.next_step(1, &lost_one), Some(Step::Promote(70)));
    }

    #[test]
    fn the_same_wish_again_finds_what_the_first_one_made() {
        let wish = |name: &str, replaces| Member {
            name: name.to_owned(),
            replaces,
            ..Member::default()
        };
        let added = roll(&[1, 2, 3], &[(70, None)]);
        let replacing = roll(&[1, 2, 3], &[(70, Some(3))]);
        for (roll, wish, want) in [
            (&added, wish("n70", None), Some(70)),
            (&added, wish("n70", Some(3)), None),
            (&added, wish("n71", None), None),
            (&replacing, wish("n70", Some(3)), Some(70)),
            (&replacing, wish("n70", Some(2)), None),
            (&replacing, wish("n70", None), None),
            // A voter had a disk: who comes without one is another.
            (&added, wish("n1", None), None),
        ] {
            assert_eq!(roll.made(&wish).map(|(id, _)| id), want, "{wish:?}");
        }
        // A lead that lost its disk comes in the place of the one that it was: both have its name.
        let mut itself = replacing;
        itself.nodes.insert(70, wish("n3", Some(3)));
        assert_eq!(itself.named("n3").map(|(id, _)| id), Some(70));
        let again = wish("n3", itself.place("n3"));
        assert_eq!(itself.made(&again).map(|(id, _)| id), Some(70));
    }

    #[test]
    fn changes_go_one_after_the_other_and_a_broken_one_is_ended_first() {
        let mut roll = roll(&[1, 2, 3], &[(70, None), (71, None)]);
        let alive = set(&[1, 2, 3, 70, 71]);
        assert_eq!(roll.next_step(1, &alive), Some(Step::Promote(70)));
        roll.configs.push(set(&[1, 2, 3, 70]));
        roll.is_settled = false;
        assert_eq!(roll.next_step(1, &alive), None);
        roll.is_settled = true;
        let rest = Step::Settle(set(&[1, 2, 3, 70]));
        assert_eq!(roll.next_step(1, &alive), Some(rest));
    }

    #[test]
    fn the_replaced_leaves_last_and_a_leader_gives_way_first() {
        let mut roll = roll(&[1, 2, 3], &[(70, Some(3))]);
        let alive = set(&[1, 2, 70]);
        assert_eq!(roll.next_step(1, &alive), Some(Step::Promote(70)));
        roll.configs = vec![set(&[1, 2, 3, 70])];
        assert_eq!(roll.next_step(1, &alive), Some(Step::Retire(3)));
        assert_eq!(roll.next_step(3, &alive), Some(Step::GiveWay));
        assert_eq!(roll.next_step(1, &set(&[1])), None);
        roll.nodes.remove(&3);
        roll.configs = vec![set(&[1, 2, 70])];
        assert_eq!(roll.next_step(1, &alive), None);
        assert!(!roll.is_moving());
    }

    #[test]
    fn who_took_a_place_is_replaced_in_its_turn() {
        let mut roll = roll(&[1, 2], &[(70, Some(3)), (80, Some(70))]);
        roll.configs = vec![set(&[1, 2, 70, 80])];
        let alive = set(&[1, 2, 80]);
        assert_eq!(roll.next_step(1, &alive), Some(Step::Retire(70)));
        roll.configs = vec![set(&[1, 2, 80])];
        roll.nodes.remove(&70);
        assert_eq!(roll.next_step(1, &alive), None);
        assert!(!roll.is_moving());
    }

    #[test]
    fn a_voter_is_let_go_only_while_a_majority_of_the_rest_answers() {
        let three = roll(&[1, 2, 3], &[]);
        assert_eq!(three.can_lose(3, &set(&[1, 2])), Ok(()));
        let Err(MemberError::NoMajorityLeft { silent, left, .. }) =
            three.can_lose(2, &set(&[1, 2]))
        else {
            panic!("the rest is 1 and 3, and 3 is silent");
        };
        assert_eq!((silent, left), (vec!["n3".to_owned()], 2));
        let one = roll(&[1], &[(70, None)]);
        let last = MemberError::Last("n1".to_owned());
        assert_eq!(one.can_lose(1, &set(&[1, 70])), Err(last));
    }

    #[test]
    fn the_level_of_the_group_is_that_of_its_oldest_lead_and_nobodys_while_one_is_silent() {
        let about = |id, level| {
            let about = About {
                id,
                level,
                version: String::new(),
                applied: 0,
                authorities: Vec::new(),
                issuer_ends_ms: None,
                room: None,
                checkpoints: None,
                pace: None,
            };
            (id, Some(about))
        };
        assert_eq!(
            agreed_level(&[about(1, 2), about(2, 1), about(3, 2)]),
            Some(1)
        );
        assert_eq!(agreed_level(&[about(1, 2), (2, None), about(3, 2)]), None);
        assert_eq!(agreed_level(&[]), None);
    }

    #[test]
    fn an_id_is_never_given_twice() {
        let mut roll = roll(&[1, 2, 3], &[]);
        let first = roll.next_id();
        assert!(first > FORMED);
        // Adding it took an entry at least, whether it stayed or not.
        roll.last += 1;
        assert!(roll.next_id() > first);
    }
}
