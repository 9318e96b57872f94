//! Looks at the disks: what a lead says of its own, and what the leader makes of all.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::{
    sync::oneshot,
    time::{Instant, sleep},
};

use super::{Room, Space, Verdict, rounded, verdict};
use crate::{lead::Lead, raft::members::Roll, world::Storage};

/// How often a lead looks at its disk, and the leader at what the others say: the reserve is worth more than a fast disk
/// takes meanwhile.
const LOOK: Duration = Duration::from_secs(1);
/// How long a leader that gave way in vain waits before it tries again: each time costs its clients a moment.
const AGAIN: Duration = Duration::from_secs(10);
/// How often a lead that waits for room says so.
const SAY: Duration = Duration::from_secs(60);

/// What a lead knows of the room on the disks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rooms {
    /// Its own; `None` while nobody knows.
    pub(crate) own: Option<Room>,
    /// Why it takes no changes as the leader.
    pub(crate) closed: Option<String>,
}

/// How much room there is in `storage`; `None` where it does not say.
async fn space(storage: &Arc<dyn Storage>) -> Option<Space> {
    let (say, said) = oneshot::channel();
    let asked = storage.clone();
    let work = move || {
        // Who asked may be gone.
        let _ = say.send(asked.space());
    };
    storage.run(Box::new(work)).await;
    match said.await.ok()? {
        Ok(space) => Some(space),
        Err(error) => {
            tracing::debug!(%error, %storage, "how much room there is is not known");
            None
        }
    }
}

/// Returns once there is room to start.
pub(crate) async fn await_room(storage: &Arc<dyn Storage>, wanted: Option<u64>) {
    let mut said: Option<Instant> = None;
    // What does not say is tried.
    while let Some(space) = space(storage).await {
        let room = Room::look(None, space, wanted);
        if room.can_start() {
            return;
        }
        if said.is_none_or(|at| at.elapsed() >= SAY) {
            said = Some(Instant::now());
            let (free, least) = (rounded(room.free), rounded(room.least()));
            tracing::error!(
                %storage, %free, %least,
                "too little room to start: make room on this file system; the lead waits for it"
            );
        }
        sleep(LOOK).await;
    }
}

/// Keeps [`Lead::rooms`] true; runs until the task is dropped.
pub(crate) async fn run(lead: Arc<Lead>, storage: Arc<dyn Storage>, wanted: Option<u64>) {
    let mut in_vain = None;
    loop {
        if let Some(space) = space(&storage).await {
            look(&lead, space, wanted);
        }
        let closed = match lead.leads() {
            true => judge(&lead, &mut in_vain).await,
            false => None,
        };
        lead.rooms.send_if_modified(|rooms| {
            let is_new = rooms.closed.is_some() != closed.is_some();
            match &closed {
                Some(why) if is_new => tracing::error!(why, "changes are refused: make room"),
                None if is_new => tracing::info!("changes are taken again"),
                _ => {}
            }
            rooms.closed = closed;
            is_new
        });
        sleep(LOOK).await;
    }
}

/// Notes how much room there is here.
fn look(lead: &Lead, space: Space, wanted: Option<u64>) {
    lead.rooms.send_modify(|rooms| {
        let was_short = rooms.own.is_some_and(|it| it.is_short);
        let room = Room::look(rooms.own, space, wanted);
        let (free, reserve) = (rounded(room.free), rounded(room.reserve));
        match (was_short, room.is_short) {
            (false, true) => tracing::warn!(%free, %reserve, "little room on this lead's disk"),
            (true, false) => tracing::info!(%free, %reserve, "room on this lead's disk again"),
            _ => {}
        }
        rooms.own = Some(room);
    });
}

/// Why the leader takes no changes, if it does not; lets another lead where that helps.
async fn judge(lead: &Lead, in_vain: &mut Option<Instant>) -> Option<String> {
    let roll = Roll::of(&lead.raft);
    let abouts = lead.abouts(&roll).await.into_iter();
    let rooms = abouts.filter_map(|(id, about)| Some((id, about?.room?)));
    let rooms: BTreeMap<_, _> = rooms.collect();
    match verdict(lead.id, &roll.configs, &rooms) {
        Verdict::Open => {
            *in_vain = None;
            return None;
        }
        Verdict::Closed => {}
        Verdict::GiveWay => {
            if in_vain.is_none_or(|at| at.elapsed() >= AGAIN) {
                tracing::warn!("another is to lead: there is little room on this lead's disk");
                *in_vain = match lead.hand_over(None).await {
                    Ok(_) => None,
                    Err(error) => {
                        tracing::warn!(%error, "no other leads");
                        Some(Instant::now())
                    }
                };
            }
            (*in_vain)?;
        }
    }
    let short = rooms.iter().filter(|(_, room)| room.is_short);
    let short = short.filter_map(|(id, room)| {
        let name = &roll.nodes.get(id)?.name;
        Some(format!("{name} has {room}"))
    });
    Some(short.collect::<Vec<_>>().join(", "))
}
