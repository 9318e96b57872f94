//! Changing the leads of the group: what users ask for, and the steward that carries it on.
//!
//! A user's wish is one change of the membership (a learner more, a voter less); what follows from it is decided by
//! [`Roll::next_step`] on whoever leads, so that it goes on when the leader falls, and never two at a time.

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc, time::Duration};

use control_core::command::{Command, LEVEL};
use futures::future::join_all;
use openraft::{
    ChangeMembers,
    error::{ClientWriteError, RaftError},
};
use tokio::time::{sleep, timeout};

use crate::{
    authority::issuer::Issuer,
    lead::{Answer, Ask, AskError, Lead, SeatOf},
    raft::{
        Member,
        members::{About, MemberError, Roll, Seat, Step, agreed_level},
        propose::ProposeError,
    },
};
use netmanager_api::identity::RevokedList;

/// Where a lead says how it is.
pub(crate) const ABOUT: &str = "/raft/v1/about";
/// So many leases a member may take to say it: who is merely busy is not gone.
pub(crate) const ABOUT_LEASES: u32 = 2;
/// How often the steward looks.
const ROUND: Duration = Duration::from_millis(100);
/// How long a change of the membership may take.
const CHANGE: Duration = Duration::from_secs(3);

impl Lead {
    /// What this lead says of itself.
    pub(crate) fn about(&self) -> About {
        About {
            id: self.id,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            level: LEVEL,
            applied: self.replica.applied(),
            room: self.rooms.borrow().own,
            checkpoints: Some(self.checks.known()),
            pace: Some(self.pace.told()),
            authorities: self
                .revoked
                .get()
                .map(RevokedList::authorities)
                .unwrap_or_default(),
            issuer_ends_ms: self.issuer.get().and_then(Issuer::ends_ms),
        }
    }

    async fn about_of(&self, id: u64, member: &Member) -> Option<About> {
        if id == self.id {
            return Some(self.about());
        }
        let limit = ABOUT_LEASES * self.pace.lease();
        let answer = self.network.post::<_, About>(member, ABOUT, &(), limit);
        answer.await.ok().filter(|about| about.id == id)
    }

    /// What every member says of itself, in the order of their ids.
    pub(crate) async fn abouts(&self, roll: &Roll) -> Vec<(u64, Option<About>)> {
        let asked = roll.nodes.iter().map(|(id, member)| async {
            let about = self.about_of(*id, member).await;
            (*id, about)
        });
        join_all(asked).await
    }

    pub(crate) async fn alive(&self, roll: &Roll) -> BTreeSet<u64> {
        let abouts = self.abouts(roll).await.into_iter();
        let level = self.replica.read(|base| base.level);
        // One that does not know the commands in the log is of no use to anybody.
        abouts
            .filter_map(|(id, about)| about.filter(|it| it.level >= level).map(|_| id))
            .collect()
    }

    /// Who may lead instead of this one: of those that answer the ones with room on their disks, if any has it.
    pub(crate) async fn heirs(&self, roll: &Roll) -> BTreeSet<u64> {
        let level = self.replica.read(|base| base.level);
        let abouts = self.abouts(roll).await.into_iter();
        let abouts = abouts.filter_map(|(_, about)| about.filter(|it| it.level >= level));
        let (short, heirs): (Vec<_>, Vec<_>) = abouts
            .filter(|it| it.id != self.id)
            .partition(|it| it.room.is_some_and(|room| room.is_short));
        let heirs = if heirs.is_empty() { short } else { heirs };
        heirs.into_iter().map(|it| it.id).collect()
    }

    /// Every member, as this lead sees it; complete on the leader.
    pub(crate) async fn seats(&self) -> Vec<Seat> {
        let roll = Roll::of(&self.raft);
        let leader = self.leader().map(|(id, _)| id);
        let voters = roll.voters();
        let abouts = self.abouts(&roll).await.into_iter();
        abouts
            .filter_map(|(id, about)| {
                Some(Seat {
                    id,
                    member: roll.nodes.get(&id)?.clone(),
                    is_voter: voters.contains(&id),
                    leads: leader == Some(id),
                    matched: roll.matched.get(&id).copied(),
                    about,
                })
            })
            .collect()
    }

    /// The member of this id in the committed membership, or the one that a joining lead of this name becomes: a
    /// learner. A voter had a disk, and whoever comes without one is not it.
    pub(crate) async fn seat(&self, of: &SeatOf) -> Result<Option<(u64, Member)>, AskError> {
        self.confirm().await?;
        let roll = Roll::of(&self.raft);
        if !roll.is_settled {
            return Err(MemberError::Busy("the last change is not committed".to_owned()).into());
        }
        Ok(match of {
            SeatOf::Id(id) => roll.nodes.get(id).map(|member| (*id, member.clone())),
            SeatOf::Name(name) => {
                let seat = roll
                    .named(name)
                    .filter(|(id, _)| !roll.voters().contains(id));
                seat.map(|(id, member)| (id, member.clone()))
            }
        })
    }

    /// Makes a lead a learner; the steward makes it a voter.
    pub(crate) async fn admit(
        &self,
        name: String,
        address: SocketAddr,
        replaces: Option<String>,
    ) -> Result<Answer, AskError> {
        let _changing = self.changing.lock().await;
        let roll = Roll::of(&self.raft);
        let old = match &replaces {
            None => None,
            Some(old) => {
                let unknown = || MemberError::Unknown(old.clone());
                Some(roll.place(old).ok_or_else(unknown)?)
            }
        };
        let member = Member {
            name,
            address,
            replaces: old,
        };
        if let Some((id, known)) = roll.made(&member) {
            return Ok(Answer::Seat(Some((id, known.clone()))));
        }
        let mut others = roll.nodes.iter().filter(|(id, _)| Some(**id) != old);
        if let Some((_, known)) = others.clone().find(|(_, it)| it.name == member.name) {
            return Err(MemberError::Taken {
                name: member.name,
                address: known.address.to_string(),
            }
            .into());
        }
        if let Some((_, known)) = others.find(|(_, it)| it.address == address) {
            return Err(MemberError::AddressTaken {
                name: known.name.clone(),
                address: address.to_string(),
            }
            .into());
        }
        if roll.is_moving() {
            return Err(MemberError::Busy(moving(&roll)).into());
        }
        let id = roll.next_id();
        tracing::info!(name = member.name, id, %address, replaces = ?old, "a lead is added");
        let add = ChangeMembers::AddNodes([(id, member.clone())].into());
        self.change(add).await?;
        Ok(Answer::Seat(Some((id, member))))
    }

    /// Takes a lead out of the group; a leader gives way first.
    pub(crate) async fn dismiss(&self, name: &str) -> Result<Answer, AskError> {
        let roll = Roll::of(&self.raft);
        let unknown = || MemberError::Unknown(name.to_owned());
        let (id, _) = roll.named(name).ok_or_else(unknown)?;
        let is_voter = roll.voters().contains(&id);
        if is_voter {
            if roll.is_moving() {
                return Err(MemberError::Busy(moving(&roll)).into());
            }
            roll.can_lose(id, &self.alive(&roll).await)?;
        }
        if id == self.id {
            self.hand_over(None).await?;
            // The new leader is asked next.
            return Err(ProposeError::NotLeader.into());
        }
        let _changing = self.changing.lock().await;
        tracing::info!(name, id, "a lead is removed");
        let out = match is_voter {
            true => ChangeMembers::RemoveVoters([id].into()),
            false => ChangeMembers::RemoveNodes([id].into()),
        };
        self.change(out).await?;
        Ok(Answer::Seats(self.seats().await))
    }

    async fn change(&self, change: ChangeMembers<u64, Member>) -> Result<(), AskError> {
        match timeout(CHANGE, self.raft.change_membership(change, false)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_)))) => {
                Err(ProposeError::NotLeader.into())
            }
            Ok(Err(error)) => Err(MemberError::Raft(error.to_string()).into()),
            Err(_) => Err(ProposeError::Unknown.into()),
        }
    }
}

/// What is under way, for people.
fn moving(roll: &Roll) -> String {
    let voters = roll.voters();
    let mut learners = roll.nodes.iter().filter(|(id, _)| !voters.contains(id));
    match learners.next() {
        Some((_, member)) => format!("lead {} at {} catches up", member.name, member.address),
        None => "the last change is not complete".to_owned(),
    }
}

/// Raises the mesh's feature level once every lead has it; runs until the task is dropped.
pub(crate) async fn upgrade(lead: Arc<Lead>) {
    loop {
        sleep(lead.pace.lease()).await;
        let level = lead
            .replica
            .read(|base| base.mesh.as_ref().map(|_| base.level));
        if level.is_none_or(|level| level >= LEVEL) || !lead.leads() {
            continue;
        }
        let abouts = lead.abouts(&Roll::of(&lead.raft)).await;
        let Some(agreed) = agreed_level(&abouts).filter(|agreed| Some(*agreed) > level) else {
            continue;
        };
        tracing::info!(level = agreed, "every lead has this feature level");
        let raise = Command::RaiseLevel {
            level: agreed.min(LEVEL),
        };
        if let Err(error) = lead.answer(Ask::Propose(vec![raise])).await {
            tracing::debug!(%error, "the feature level is not raised in this round");
        }
    }
}

/// Carries changes of the membership on, on whoever leads; runs until the task is dropped.
pub(crate) async fn steward(lead: Arc<Lead>) {
    loop {
        sleep(ROUND).await;
        if !lead.leads() || !lead.has_majority() || !Roll::of(&lead.raft).is_moving() {
            continue;
        }
        if let Err(error) = step(&lead).await {
            tracing::warn!(%error, "a change of the leads does not go on in this round");
        }
    }
}

async fn step(lead: &Lead) -> Result<(), AskError> {
    let alive = lead.alive(&Roll::of(&lead.raft)).await;
    let changing = lead.changing.lock().await;
    let roll = Roll::of(&lead.raft);
    let change = match roll.next_step(lead.id, &alive) {
        None => return Ok(()),
        Some(Step::Settle(voters)) => ChangeMembers::ReplaceAllVoters(voters),
        Some(Step::Promote(id)) => {
            tracing::info!(id, "a lead has caught up and becomes a voter");
            ChangeMembers::AddVoterIds([id].into())
        }
        Some(Step::Retire(id)) => {
            tracing::info!(id, "a lead is replaced and leaves");
            ChangeMembers::RemoveVoters([id].into())
        }
        Some(Step::GiveWay) => {
            drop(changing);
            return lead.hand_over(None).await.map(|_| ());
        }
    };
    lead.change(change).await
}
