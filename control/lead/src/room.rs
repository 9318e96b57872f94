//! Room on the disks: below a reserve there are no more changes, so that what Raft itself writes still finds room.
//!
//! ```text
//!  a lead:      free < reserve --> short --> free >= 1.25 reserve --> has room
//!  the leader:  nobody is short                           --> open
//!               it is, and a majority has room            --> gives way, and goes on until another leads
//!               others are, and a majority has room       --> open
//!               no majority has room, it gave way in vain --> closed: changes are refused, reads go on
//! ```
//!
//! Votes, what was in the log already, changes of the leads themselves and snapshots are written all the same: that is what
//! the reserve is for.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use control_core::goal::Bytes;
use serde::{Deserialize, Serialize};

pub(crate) mod watch;

/// The reserve where nobody says another, bytes: hours of a busy mesh's log, and a snapshot.
const USUAL: u64 = 256 << 20;
/// On a small file system the reserve is one part in so many.
const PART: u64 = 20;

/// A file system, as far as a lead may use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Bytes that can still be written.
    pub free: u64,
    /// Bytes that it holds.
    pub total: u64,
}

/// How much room a lead has on its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Room {
    /// Bytes that can still be written.
    pub(crate) free: u64,
    /// Bytes that are not for changes.
    pub(crate) reserve: u64,
    /// Whether there is too little.
    pub(crate) is_short: bool,
}

impl Room {
    /// Looks at `space`, after `before`; `wanted` is the operator's reserve.
    pub(crate) fn look(before: Option<Self>, space: Space, wanted: Option<u64>) -> Self {
        let Space { free, total } = space;
        let reserve = wanted.unwrap_or_else(|| USUAL.min(total / PART));
        // What frees a little from time to time must not open and close the door each time.
        let enough = match before.is_some_and(|it| it.is_short) {
            true => reserve.saturating_add(reserve / 4),
            false => reserve,
        };
        Self {
            free,
            reserve,
            is_short: free < enough,
        }
    }

    /// Whether a lead can start: what it writes while it does finds room. One that ended because a write did not would
    /// otherwise end again and again.
    pub(crate) fn can_start(self) -> bool {
        self.free >= self.least()
    }

    /// The least to start with, bytes.
    pub(crate) fn least(self) -> u64 {
        self.reserve / 8
    }
}

/// As in "12Mi free of a reserve of 256Mi".
impl fmt::Display for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (free, reserve) = (rounded(self.free), rounded(self.reserve));
        write!(f, "{free} free of a reserve of {reserve}")
    }
}

/// An amount that a person can read.
pub(crate) fn rounded(bytes: u64) -> Bytes {
    Bytes::new(bytes).rounded()
}

/// What a leader does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It takes changes.
    Open,
    /// Another is to lead.
    GiveWay,
    /// It refuses changes.
    Closed,
}

/// What leader `own` does: `configs` are the voters (two sets in the midst of a change), `rooms` what each says. Who does not
/// answer, or is older, counts as one with room, unless another is known to be short.
pub(crate) fn verdict(own: u64, configs: &[BTreeSet<u64>], rooms: &BTreeMap<u64, Room>) -> Verdict {
    let is = |id: &u64, short: bool| rooms.get(id).is_some_and(|it| it.is_short == short);
    let is_any_short = configs.iter().flatten().any(|id| is(id, true));
    let has_majority = |voters: &BTreeSet<u64>| {
        let with_room = voters.iter().filter(|id| is(id, false)).count();
        2 * with_room > voters.len()
    };
    match (is_any_short, configs.iter().all(has_majority)) {
        (false, _) => Verdict::Open,
        (true, false) => Verdict::Closed,
        (true, true) if is(&own, true) => Verdict::GiveWay,
        (true, true) => Verdict::Open,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MI: u64 = 1 << 20;

    #[test]
    fn a_lead_is_short_below_the_reserve_until_there_is_a_quarter_more() {
        let mut room = None;
        for (free, is_short) in [
            (1000, false),
            (256, false),
            (255, true),
            (256, true),
            (319, true),
            (320, false),
            (256, false),
            (0, true),
        ] {
            let space = Space {
                free: free * MI,
                total: 100_000 * MI,
            };
            let now = Room::look(room, space, None);
            assert_eq!(now.is_short, is_short, "{free}");
            room = Some(now);
        }
    }

    #[test]
    fn the_reserve_is_the_operator_s_or_a_twentieth_of_a_small_disk() {
        for (total, wanted, reserve) in [
            (100_000 * MI, None, 256 * MI),
            (5_120 * MI, None, 256 * MI),
            (100 * MI, None, 5 * MI),
            (100 * MI, Some(50 * MI), 50 * MI),
            (100_000 * MI, Some(0), 0),
            (0, None, 0),
        ] {
            let space = Space { free: 0, total };
            assert_eq!(Room::look(None, space, wanted).reserve, reserve);
        }
        let never = Room::look(None, Space { free: 0, total: MI }, Some(0));
        assert!(!never.is_short && never.can_start());
    }

    #[test]
    fn a_lead_starts_with_an_eighth_of_the_reserve() {
        for (free, can) in [(0, false), (32 * MI - 1, false), (32 * MI, true)] {
            let total = 100_000 * MI;
            let room = Room::look(None, Space { free, total }, None);
            assert_eq!(room.can_start(), can, "{free}");
        }
    }

    #[test]
    fn a_leader_gives_way_while_a_majority_has_room_and_refuses_without() {
        use Verdict::{Closed, GiveWay, Open};
        let (room, short, silent) = (Some(false), Some(true), None);
        for (leads, want) in [
            (vec![room], Open),
            (vec![short], Closed),
            (vec![silent], Open),
            (vec![room, room, room], Open),
            (vec![room, silent, silent], Open),
            (vec![room, short, room], Open),
            (vec![room, short, silent], Closed),
            (vec![room, short, short], Closed),
            (vec![short, room, room], GiveWay),
            (vec![short, room, silent], Closed),
            (vec![short, short, room], Closed),
            (vec![short, short, room, room, room], GiveWay),
        ] {
            let voters: BTreeSet<_> = (1..).take(leads.len()).collect();
            let rooms = voters.iter().zip(&leads).filter_map(|(id, is_short)| {
                let is_short = (*is_short)?;
                let room = Room {
                    free: 0,
                    reserve: 0,
                    is_short,
                };
                Some((*id, room))
            });
            let verdict = verdict(1, std::slice::from_ref(&voters), &rooms.collect());
            assert_eq!(verdict, want, "{leads:?}");
        }
    }

    #[test]
    fn both_majorities_of_a_change_of_the_leads_need_room() {
        let configs = [BTreeSet::from([1, 2, 3]), BTreeSet::from([1, 4, 5])];
        let room = |is_short| Room {
            free: 0,
            reserve: 0,
            is_short,
        };
        let with = |short: &[u64]| {
            let ids = 1..=5;
            ids.map(|id| (id, room(short.contains(&id)))).collect()
        };
        assert_eq!(verdict(1, &configs, &with(&[2])), Verdict::Open);
        assert_eq!(verdict(1, &configs, &with(&[4, 5])), Verdict::Closed);
    }
}
