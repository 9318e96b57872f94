//! Whether this lead is in touch with its group: what it answers with, and for how long it keeps its streams.
//!
//! A leader that heard no majority for a lease may have been replaced: it refuses changes and consistent reads, and
//! closes its streams, so that its agents find the next leader's side. A follower gives its leader and an election
//! some leases more.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use openraft::ServerState;
use tokio::time::{Instant, sleep};

use crate::{
    lead::{Answer, Ask, Lead, SeatOf},
    raft::Member,
};

/// So many leases without a word of a majority end a leader's streams.
const LEADS: u32 = 1;
/// So many leases without a word of a leader end a follower's streams: an election takes two.
const FOLLOWS: u32 = 4;
/// A lead that heard no leader for so many leases asks whether it is still a member.
const LONG_SILENCE: u32 = 4;

impl Lead {
    /// For how long this lead has heard no leader, or as the leader no majority; `None` is "never since it
    /// started".
    pub(crate) async fn unheard(&self) -> Option<Duration> {
        if self.is_alone() {
            return Some(Duration::ZERO);
        }
        let heard = self.raft.with_raft_state(|state| {
            let leads = state.server_state == ServerState::Leader;
            (leads, state.vote_last_modified())
        });
        match heard.await.ok()? {
            (true, _) => {
                let metrics = self.raft.metrics();
                let ms = metrics.borrow().millis_since_quorum_ack;
                ms.map(Duration::from_millis)
            }
            (false, heard) => heard.map(|at| Instant::now().saturating_duration_since(at)),
        }
    }

    /// Whether this lead leads and no other could be elected without it.
    fn is_alone(&self) -> bool {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let mut voters = metrics.membership_config.voter_ids();
        metrics.state == ServerState::Leader && voters.all(|id| id == self.id)
    }

    /// Returns when this lead has lost its group.
    pub(crate) async fn out_of_touch(&self) {
        let mut in_touch = self.in_touch.subscribe();
        // A lead that ends closes its streams by itself.
        let _ = in_touch.wait_for(|in_touch| !in_touch).await;
    }
}

/// When this lead last knew that it is one of the group.
#[derive(Clone, Copy, Debug, Default)]
struct Contact {
    /// When its leader, or as the leader a majority, was last heard.
    heard: Option<Instant>,
    /// Since when it leads.
    leads_since: Option<Instant>,
    /// For how long it may hear nobody, leases.
    patience: u32,
}

impl Contact {
    fn is_kept(self, now: Instant, lease: Duration) -> bool {
        // Who was just elected has heard a majority of voters, and gets a lease to hear them again.
        let last = self.heard.max(self.leads_since);
        last.is_some_and(|last| now.saturating_duration_since(last) <= self.patience * lease)
    }
}

/// Keeps [`Lead::in_touch`] true; runs until the task is dropped.
pub(crate) async fn watch(lead: Arc<Lead>) {
    let mut contact = Contact::default();
    loop {
        let unheard = lead.unheard().await;
        let at = Instant::now();
        contact.heard = unheard.and_then(|it| at.checked_sub(it)).max(contact.heard);
        let leads = lead.raft.metrics().borrow().state == ServerState::Leader;
        contact.leads_since = leads.then(|| contact.leads_since.unwrap_or(at));
        // A leader that gives way waits for the next one, as its followers do.
        contact.patience = match leads && !lead.gives_way.load(Ordering::Relaxed) {
            true => LEADS,
            false => FOLLOWS,
        };
        let now = contact.is_kept(at, lead.pace.lease());
        let changed = |known: &mut bool| std::mem::replace(known, now) != now;
        if lead.in_touch.send_if_modified(changed) && !now {
            tracing::warn!("out of touch with the other leads: streams are closed");
        }
        sleep(lead.pace.lease() / 3).await;
    }
}

/// Returns when the group says that this lead is not a member any more. A lead that hears its leader is one; one that
/// stopped before it heard of any member asks those it was started with.
pub(crate) async fn removed(lead: &Lead, introduced: &[Member]) {
    let start = Instant::now();
    loop {
        sleep(lead.pace.lease()).await;
        let unheard = lead.unheard().await.unwrap_or_else(|| start.elapsed());
        if unheard < LONG_SILENCE * lead.pace.lease() {
            continue;
        }
        let ask = Ask::Seat(SeatOf::Id(lead.id));
        let members = lead.members_by_id();
        let (all, strangers) = (members.iter(), introduced.iter());
        let others = all.filter(|(id, _)| *id != lead.id).map(|(_, it)| it);
        for other in others.chain(strangers.filter(|_| members.is_empty())) {
            if let Ok(Ok(Answer::Seat(None))) = lead.hand_on(other, &ask).await {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_follower_gives_an_election_time_and_a_leader_has_a_lease() {
        let lease = Duration::from_millis(750);
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        for (heard, leads_since, patience, now, want) in [
            (None, None, FOLLOWS, 0, false),
            (Some(0), None, FOLLOWS, 750, true),
            (Some(0), None, FOLLOWS, 3_000, true),
            (Some(0), None, FOLLOWS, 3_001, false),
            (Some(0), Some(2_000), LEADS, 2_750, true),
            (Some(0), Some(2_000), LEADS, 2_751, false),
            (Some(2_500), Some(2_000), LEADS, 3_250, true),
            (None, Some(2_000), LEADS, 2_100, true),
            // It gives way, and then nobody took over.
            (Some(2_500), Some(0), FOLLOWS, 5_500, true),
            (Some(2_500), Some(0), FOLLOWS, 5_501, false),
            (Some(2_500), Some(0), LEADS, 3_251, false),
        ] {
            let contact = Contact {
                heard: heard.map(at),
                leads_since: leads_since.map(at),
                patience,
            };
            assert_eq!(
                contact.is_kept(at(now), lease),
                want,
                "{contact:?} at {now}"
            );
        }
    }
}
