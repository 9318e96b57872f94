//! Letting another lead lead, in a task of its own: an asker that goes away leaves nothing half done.
//!
//! ```text
//!  asker --oneshot--> queue --> wait until an heir could win --> take no more changes --> hand over --> all askers
//! ```
//!
//! While a lead gives way it refuses changes and sends no heartbeats; both end with it, whatever comes of it. Who asks
//! meanwhile hears the same answer: a wish is about the lead that led when it was made, so that two of them at a time
//! move the lead once. How the heir is found and told is [`HandOver`]'s.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio::{
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};

use crate::{
    lead::{Answer, Ask, AskError, Lead},
    members::ABOUT_LEASES,
    raft::{
        HandOver,
        members::{MemberError, Roll},
        propose::ProposeError,
    },
};

/// Who leads after a hand-over, by name.
type Outcome = Result<String, AskError>;
/// Somebody who waits for one.
pub(crate) type Asker = oneshot::Sender<Outcome>;

/// Somebody's wish that another lead leads.
pub(crate) struct Wish {
    /// Instead of this one; of whoever leads, where nobody was known to.
    name: Option<String>,
    /// What comes of the hand-over that was under way.
    joined: Option<oneshot::Receiver<Outcome>>,
}

/// So many leases a hand-over takes at most, beside round trips: what is on its way is written within one, and where no
/// other leads then, a majority is heard again within another.
pub(crate) const LEASES: u32 = ABOUT_LEASES + 1 + HandOver::LEASES + 1;

/// A lead that gives way, until this is dropped.
struct GivesWay<'a>(&'a AtomicBool);

impl<'a> GivesWay<'a> {
    fn new(gives_way: &'a AtomicBool) -> Self {
        gives_way.store(true, Ordering::Relaxed);
        Self(gives_way)
    }
}

impl Drop for GivesWay<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

impl Lead {
    /// Notes who is to lead no more: `name`, or who leads now. A hand-over of this lead's that is under way is joined.
    pub(crate) fn wish(&self, name: Option<String>) -> Wish {
        let gives_way = self.gives_way.load(Ordering::Relaxed);
        let leader = || match gives_way {
            // It may know of no leader at the moment.
            true => Some(self.name.clone()),
            false => self.leader().map(|(_, leader)| leader.name),
        };
        let name = name.or_else(leader);
        let is_meant = name.as_ref() == Some(&self.name);
        let joined = (gives_way && is_meant).then(|| {
            let (asker, outcome) = oneshot::channel();
            // Where too many wait it is asked for once more.
            self.drain.try_send(asker).map(|()| outcome).ok()
        });
        let joined = joined.flatten();
        Wish { name, joined }
    }

    /// Has another lead, wherever the leader is; who leads then.
    pub(crate) async fn fulfil(&self, wish: Wish) -> Result<Answer, AskError> {
        if let Some(joined) = wish.joined {
            match joined.await {
                Ok(Err(AskError::Propose(_))) | Err(_) => {}
                Ok(outcome) => return outcome.map(Answer::Leader),
            }
        }
        self.ask(Ask::HandOver { name: wish.name }).await
    }

    /// Lets another lead, if this one is meant; who leads then. It goes on when nobody waits for it any more.
    pub(crate) async fn hand_over(&self, name: Option<String>) -> Outcome {
        match name {
            Some(name) if Roll::of(&self.raft).named(&name).is_none() => {
                return Err(MemberError::Unknown(name).into());
            }
            Some(name) if name != self.name => return Ok(self.name.clone()),
            _ => {}
        }
        let stopped = || AskError::from(ProposeError::Stopped);
        let (asker, outcome) = oneshot::channel();
        self.drain.send(asker).await.map_err(|_| stopped())?;
        outcome.await.map_err(|_| stopped())?
    }

    async fn give_way(&self) -> Outcome {
        let Ok(_changing) = self.changing.try_lock() else {
            return Err(MemberError::Busy("a change is under way".to_owned()).into());
        };
        let roll = Roll::of(&self.raft);
        // Nobody waits for it yet: until its own vote is free no heir could count on it.
        let freed = async { sleep(self.election.is_bound_for().await).await };
        let (alive, ()) = tokio::join!(self.heirs(&roll), freed);
        let term = self.raft.metrics().borrow().current_term;
        if !self.leads() {
            // The next leader is asked next.
            return Err(ProposeError::NotLeader.into());
        }
        let hand_over = HandOver {
            raft: &self.raft,
            network: &self.network,
            pace: &self.pace,
            id: self.id,
            term,
            alive,
        };
        let _gives_way = GivesWay::new(&self.gives_way);
        // What is on its way into the log is written first: an heir that has not got it could not win.
        let written = timeout(self.pace.lease(), self.proposing.write()).await;
        let heir = match written.map(drop) {
            Ok(()) => hand_over.run().await,
            Err(_) => None,
        };
        if let Some(heir) = heir {
            return Ok(heir);
        }
        // One that goes on leading has a lease to hear a majority again, before it is held to that.
        let _ = timeout(self.pace.lease(), self.hear_majority()).await;
        Err(MemberError::NoHeir(self.name.clone()).into())
    }
}

/// Gives way for whoever asks; runs until the task is dropped.
pub(crate) async fn run(lead: Arc<Lead>, mut queue: mpsc::Receiver<Asker>) {
    while let Some(first) = queue.recv().await {
        let outcome = lead.give_way().await;
        let mut next = Some(first);
        while let Some(asker) = next {
            // An asker that went away needs no answer.
            let _ = asker.send(outcome.clone());
            next = queue.try_recv().ok();
        }
    }
}
