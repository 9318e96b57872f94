//! Handing the lead over without waiting for anybody to miss it.
//!
//! ```text
//!  leader: takes no more changes --> those that wait are written --> an heir has its whole log --> no more
//!          heartbeats --> "stand!"
//!  heir:   stands as soon as a majority would vote for it, until it leads; the old leader votes at once, the
//!          others when their lease is over
//! ```
//!
//! openraft 0.9 has no leadership transfer. The pause is one round trip with up to three leads, and with more the
//! rest of a lease.

use std::{collections::BTreeSet, pin::pin, time::Duration};

use openraft::{RaftMetrics, ServerState};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, timeout};

use super::{Member, Pace, Raft, election::Election, members::Roll, network::Network};

/// Where an heir is told to stand.
pub(crate) const PATH: &str = "/raft/v1/stand";

/// How often the leader looks whether an heir has its whole log.
const LOOK: Duration = Duration::from_millis(10);

/// So many leases an heir has to get the whole log.
const CATCHES_UP: u32 = 1;
/// So many leases the heir stands.
const STANDS: u32 = 2;
/// So many leases later somebody leads, the heir or another one.
const ELECTS: u32 = STANDS + 1;

/// Stand for election: who sends this gives way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Stand {
    /// Who gives way; where it is not said, whom the heir takes for the leader.
    pub(crate) giver: Option<u64>,
    /// The term that it leads in; where it is not said, the one that the heir knows.
    pub(crate) term: Option<u64>,
}

impl Stand {
    /// Who gives way, in which term; `None` when that term is over, and it came too late.
    fn known(self, metrics: &RaftMetrics<u64, Member>) -> Option<(Option<u64>, u64)> {
        let term = self.term.unwrap_or(metrics.current_term);
        let giver = self.giver.or(metrics.current_leader);
        (metrics.current_term <= term).then_some((giver, term))
    }
}

/// What a leader needs to hand over.
pub(crate) struct HandOver<'a> {
    pub(crate) raft: &'a Raft,
    pub(crate) network: &'a Network,
    pub(crate) pace: &'a Pace,
    pub(crate) id: u64,
    /// The term that it leads in.
    pub(crate) term: u64,
    /// The members that answer.
    pub(crate) alive: BTreeSet<u64>,
}

impl HandOver<'_> {
    /// So many leases a hand-over takes at most.
    pub(crate) const LEASES: u32 = CATCHES_UP + ELECTS;

    /// Hands over to a voter that has the whole log; the name of who leads then, mostly that one, or `None` when no other
    /// does. The caller sees to it that no change is proposed meanwhile.
    pub(crate) async fn run(&self) -> Option<String> {
        let heir = timeout(CATCHES_UP * self.pace.lease(), self.heir()).await;
        let heir = heir.ok()?;
        tracing::info!(heir = heir.name, "handing over");
        let silence = self.pace.hush();
        let next = self.unseat(&heir).await;
        drop(silence);
        let membership = self.raft.metrics().borrow().membership_config.clone();
        let next = next.filter(|id| *id != self.id)?;
        membership
            .membership()
            .get_node(&next)
            .map(|it| it.name.clone())
    }

    /// Waits for a voter with the whole log.
    async fn heir(&self) -> Member {
        loop {
            let roll = Roll::of(self.raft);
            let has_all = |id: &u64| roll.matched.get(id) == Some(&roll.last);
            let mut voters = roll.voters().into_iter();
            let heir = voters.find(|id| *id != self.id && self.alive.contains(id) && has_all(id));
            if let Some(member) = heir.and_then(|id| roll.nodes.get(&id)) {
                return member.clone();
            }
            sleep(LOOK).await;
        }
    }

    /// Tells the heir to stand; who is elected next, which another election may decide.
    async fn unseat(&self, heir: &Member) -> Option<u64> {
        let term = self.term;
        let stand = Stand {
            giver: Some(self.id),
            term: Some(term),
        };
        let stand = self
            .network
            .post::<_, bool>(heir, PATH, &stand, STANDS * self.pace.lease());
        let mut metrics = self.raft.metrics();
        let elected = async {
            let elected = metrics.wait_for(|metrics| elected_after(term, metrics).is_some());
            let elected = timeout(ELECTS * self.pace.lease(), elected);
            let metrics = elected.await.ok()?.ok()?;
            elected_after(term, &metrics)
        };
        let mut elected = pin!(elected);
        tokio::select! {
            elected = &mut elected => return elected,
            stood = stand => if let Err(error) = stood {
                tracing::warn!(%error, heir = heir.name, "the heir did not stand");
            },
        }
        elected.await
    }
}

/// Who leads in a term after `term`.
fn elected_after(term: u64, metrics: &RaftMetrics<u64, Member>) -> Option<u64> {
    metrics
        .current_leader
        .filter(|_| metrics.current_term > term)
}

/// Whether a lead that stands since `term` leads; `None` while that is open.
fn outcome(term: u64, id: u64, metrics: &RaftMetrics<u64, Member>) -> Option<bool> {
    let leads = metrics.state == ServerState::Leader;
    // Standing raises the term, too, but makes nobody a leader.
    let lost = elected_after(term, metrics).is_some_and(|leader| leader != id);
    (leads || lost).then_some(leads)
}

impl Election {
    /// Stands as soon as it can win, and again until a lead is elected or two leases are over; whether this one leads. It
    /// waits twice as long for each candidacy as for the one before: standing again gives up the votes that are still on
    /// their way. Standing in vain is worse: who voted follows nobody whom the others elect meanwhile.
    pub(crate) async fn stand(&self, stand: Stand) -> bool {
        let end = Instant::now() + STANDS * self.pace.lease();
        let mut metrics = self.raft.metrics();
        let known = stand.known(&metrics.borrow());
        let Some((giver, term)) = known else {
            tracing::info!(?stand, "not standing for election: that term is over");
            return false;
        };
        let outcome = |metrics: &RaftMetrics<u64, Member>| outcome(term, self.id, metrics);
        let mut patience = self.pace.stagger();
        tracing::info!("standing for election: the leader gives way");
        while Instant::now() < end {
            if let Some(leads) = outcome(&metrics.borrow()) {
                return leads;
            }
            if !self.can_win(giver).await {
                sleep(LOOK).await;
                continue;
            }
            // Asking took a while.
            if let Some(leads) = outcome(&metrics.borrow()) {
                return leads;
            }
            if self.raft.trigger().elect().await.is_err() {
                return false;
            }
            let decided = metrics.wait_for(|metrics| outcome(metrics).is_some());
            match timeout(patience, decided).await {
                Ok(Ok(decided)) => return outcome(&decided) == Some(true),
                Ok(Err(_)) => return false,
                Err(_) => patience *= 2,
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::{decode, encode};

    #[test]
    fn an_heir_stands_for_the_giver_of_this_term_and_not_for_one_of_an_earlier() {
        let mut metrics = RaftMetrics::new_initial(2);
        metrics.current_term = 7;
        metrics.current_leader = Some(1);
        let of = |giver, term| Stand {
            giver: Some(giver),
            term: Some(term),
        };
        for (stand, want) in [
            (of(1, 7), Some((Some(1), 7))),
            // It has not heard of that leader yet.
            (of(3, 8), Some((Some(3), 8))),
            (of(3, 6), None),
            (of(1, 6), None),
            (Stand::default(), Some((Some(1), 7))),
        ] {
            assert_eq!(stand.known(&metrics), want, "{stand:?}");
        }
    }

    #[test]
    fn an_older_lead_says_neither_who_gives_way_nor_when() {
        let old = encode(&()).unwrap();
        assert_eq!(decode::<Option<Stand>>(&old).unwrap(), None);
        let stand = Stand {
            giver: Some(1),
            term: Some(7),
        };
        let new = encode(&stand).unwrap();
        assert_eq!(decode::<Option<Stand>>(&new).unwrap(), Some(stand));
    }

    #[test]
    fn an_heir_stands_until_it_leads_or_another_is_elected() {
        let (giver, heir, other) = (1, 2, 3);
        let term = 7;
        for (now, leader, state, want) in [
            (7, Some(giver), ServerState::Follower, None),
            (8, None, ServerState::Candidate, None),
            (8, Some(heir), ServerState::Candidate, None),
            (8, Some(heir), ServerState::Leader, Some(true)),
            (8, Some(other), ServerState::Follower, Some(false)),
            (9, Some(giver), ServerState::Follower, Some(false)),
        ] {
            let mut metrics = RaftMetrics::new_initial(heir);
            metrics.current_term = now;
            metrics.current_leader = leader;
            metrics.state = state;
            let is = outcome(term, heir, &metrics);
            assert_eq!(is, want, "{leader:?} in term {now}, {state:?}");
        }
    }
}
