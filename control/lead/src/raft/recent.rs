//! The last entries of the log in memory, as they are on disk: each is sent to every lead and applied within
//! milliseconds of being written, and need not be read and decoded for each of these.

use std::{
    collections::BTreeMap,
    ops::{Bound, RangeBounds},
};

use openraft::Entry;

use super::Types;

/// How many bytes of encoded entries are kept at the most.
const LIMIT: usize = 8 << 20;

/// How many bytes of encoded entries are read at once; one entry always is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    left: usize,
    is_empty: bool,
}

impl Room {
    /// For so many bytes.
    pub(super) fn new(bytes: usize) -> Self {
        Self {
            left: bytes,
            is_empty: true,
        }
    }

    /// For every entry.
    pub(super) fn unlimited() -> Self {
        Self::new(usize::MAX)
    }

    /// Whether an entry of `size` bytes still has room.
    pub(super) fn takes(&mut self, size: usize) -> bool {
        let fits = self.left.checked_sub(size);
        let is_first = std::mem::take(&mut self.is_empty);
        self.left = fits.unwrap_or(0);
        fits.is_some() || is_first
    }
}

/// Consecutive entries, the newest of the log.
#[derive(Debug, Default)]
pub(super) struct Recent {
    /// By index, with the size on disk.
    entries: BTreeMap<u64, (Entry<Types>, usize)>,
    size: usize,
}

impl Recent {
    /// An entry was written, behind all others.
    pub(super) fn push(&mut self, entry: Entry<Types>, size: usize) {
        let index = entry.log_id.index;
        // After a gap what came before it is no part of the log's end any more.
        if index == 0 || !self.entries.contains_key(&(index - 1)) {
            self.truncate_from(0);
        }
        self.truncate_from(index);
        self.size += size;
        self.entries.insert(index, (entry, size));
        while self.size > LIMIT
            && let Some((_, (_, size))) = self.entries.pop_first()
        {
            self.size -= size;
        }
    }

    /// This entry and all after it are gone.
    pub(super) fn truncate_from(&mut self, index: u64) {
        let gone = self.entries.split_off(&index);
        self.size -= gone.values().map(|(_, size)| size).sum::<usize>();
    }

    /// This entry and all before it are gone.
    pub(super) fn purge_to(&mut self, index: u64) {
        let kept = self.entries.split_off(&index.saturating_add(1));
        self.size = kept.values().map(|(_, size)| size).sum();
        self.entries = kept;
    }

    /// The entries of `range`, as far as `room` goes; `None` where not all of them are here.
    pub(super) fn range(
        &self,
        range: &impl RangeBounds<u64>,
        mut room: Room,
    ) -> Option<Vec<Entry<Types>>> {
        let first = match range.start_bound() {
            Bound::Included(first) => *first,
            Bound::Excluded(before) => before.checked_add(1)?,
            Bound::Unbounded => return None,
        };
        let end = match range.end_bound() {
            Bound::Included(last) => last.checked_add(1)?,
            Bound::Excluded(end) => *end,
            Bound::Unbounded => return None,
        };
        if first >= end {
            return Some(Vec::new());
        }
        // They have no gaps, so the first and the last stand for all.
        let (first, last) = (first, end - 1);
        if !self.entries.contains_key(&first) || !self.entries.contains_key(&last) {
            return None;
        }
        let found = self.entries.range(first..=last);
        let found = found.take_while(|(_, (_, size))| room.takes(*size));
        Some(found.map(|(_, (entry, _))| entry.clone()).collect())
    }
}

#[cfg(test)]
mod tests {
    use openraft::{CommittedLeaderId, EntryPayload, LogId};

    use super::*;

    fn entry(term: u64, index: u64) -> Entry<Types> {
        Entry {
            log_id: LogId::new(CommittedLeaderId::new(term, 1), index),
            payload: EntryPayload::Blank,
        }
    }

    fn recent(indexes: impl IntoIterator<Item = u64>) -> Recent {
        let mut recent = Recent::default();
        for index in indexes {
            recent.push(entry(1, index), 10);
        }
        recent
    }

    fn found(recent: &Recent, range: impl RangeBounds<u64>) -> Option<Vec<u64>> {
        let entries = recent.range(&range, Room::unlimited())?;
        Some(entries.iter().map(|it| it.log_id.index).collect())
    }

    #[test]
    fn only_a_range_that_is_here_as_a_whole_is_answered() {
        let recent = recent(5..10);
        for (range, want) in [
            (5..10, Some(vec![5, 6, 7, 8, 9])),
            (6..8, Some(vec![6, 7])),
            (4..7, None),
            (8..11, None),
            (20..22, None),
        ] {
            assert_eq!(found(&recent, range.clone()), want, "{range:?}");
        }
        assert_eq!(found(&recent, 7..=9), Some(vec![7, 8, 9]));
        assert_eq!(found(&recent, 7..), None);
        assert_eq!(found(&recent, ..7), None);
    }

    #[test]
    fn what_has_no_room_waits_and_the_first_always_goes() {
        let recent = recent(5..10);
        for (bytes, want) in [(0, 1), (9, 1), (10, 1), (29, 2), (30, 3), (1000, 5)] {
            let entries = recent.range(&(5..10), Room::new(bytes)).unwrap();
            assert_eq!(entries.len(), want, "{bytes}");
        }
        let mut large = Recent::default();
        for (index, size) in [(1, 10), (2, 100), (3, 10)] {
            large.push(entry(1, index), size);
        }
        let entries = large.range(&(1..4), Room::new(50)).unwrap();
        assert_eq!(entries, [entry(1, 1)], "no gap");
    }

    #[test]
    fn what_is_cut_off_at_either_end_is_not_found_any_more() {
        let mut recent = recent(1..10);
        recent.truncate_from(8);
        recent.purge_to(2);
        assert_eq!(found(&recent, 3..8), Some(vec![3, 4, 5, 6, 7]));
        assert_eq!(found(&recent, 2..4), None);
        assert_eq!(found(&recent, 7..9), None);
        assert_eq!(recent.size, 50);
        recent.push(entry(2, 8), 10);
        assert_eq!(
            recent.range(&(8..9), Room::unlimited()),
            Some(vec![entry(2, 8)])
        );
    }

    #[test]
    fn an_entry_behind_a_gap_begins_anew() {
        let mut recent = recent(1..5);
        recent.push(entry(1, 9), 10);
        assert_eq!(found(&recent, 1..5), None);
        assert_eq!(found(&recent, 9..10), Some(vec![9]));
        assert_eq!(recent.size, 10);
    }

    #[test]
    fn the_oldest_leave_for_the_newest() {
        let mut recent = recent(1..4);
        recent.push(entry(1, 4), LIMIT - 10);
        assert_eq!(found(&recent, 3..5), Some(vec![3, 4]));
        assert_eq!(found(&recent, 2..5), None);
    }
}
