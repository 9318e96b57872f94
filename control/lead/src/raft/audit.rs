//! Whether a lead's data hang together, looked at once before it starts.
//!
//! ```text
//!  snapshot  |-------------------------|
//!  purged    |------------------|
//!  log                          |------------------|  no gap, each entry at its index, terms that only rise
//!                                                  end: nothing that was written is missing
//!  vote      not of an earlier term than the last entry
//! ```
//!
//! What is not so was acknowledged once and is gone, so that the lead may not vote or acknowledge as the one that it was.

use openraft::{LogId, SnapshotMeta, Vote};
use serde::Deserialize;

use super::{
    Member, decode,
    disk::{Disk, DiskError, END, ODD},
    trouble::Flaw,
    voter::PROMISE,
};

/// An entry without what it is about.
#[derive(Deserialize)]
struct Head {
    log_id: LogId<u64>,
}

/// The log as far as it was looked at.
#[derive(Debug)]
struct Walk {
    /// The index that comes next.
    next: u64,
    last: Option<LogId<u64>>,
    purged: Option<LogId<u64>>,
}

impl Walk {
    /// Behind what was purged.
    fn new(purged: Option<LogId<u64>>) -> Self {
        Self {
            next: purged.map_or(0, |purged| purged.index + 1),
            last: purged,
            purged,
        }
    }

    fn see(&mut self, index: u64, log_id: LogId<u64>) -> Result<(), Flaw> {
        if index != self.next {
            let found = format!("log entry {index}");
            return Err(Flaw::new(
                "the log",
                format!("log entry {}", self.next),
                found,
            ));
        }
        let record = || format!("log entry {index}");
        if log_id.index != index {
            let found = format!("index {}", log_id.index);
            return Err(Flaw::new(record(), format!("index {index}"), found));
        }
        if let Some(last) = self.last
            && log_id.leader_id < last.leader_id
        {
            let expected = format!("term {} or later", last.leader_id.term);
            let found = format!("term {}", log_id.leader_id.term);
            return Err(Flaw::new(record(), expected, found));
        }
        self.next += 1;
        self.last = Some(log_id);
        Ok(())
    }

    fn ends(&self, end: u64, vote: Option<Vote<u64>>) -> Result<(), Flaw> {
        // What was purged may lie beyond: a snapshot took the place of all.
        let is_empty = self.last == self.purged;
        if self.next < end || (self.next > end && !is_empty) {
            let entry = |next: u64| format!("its end before entry {next}");
            return Err(Flaw::new("the log", entry(end), entry(self.next)));
        }
        let voted = vote.map_or(0, |vote| vote.leader_id().term);
        let term = self.last.map_or(0, |last| last.leader_id.term);
        match voted < term {
            true => Err(Flaw::new(
                "vote",
                format!("term {term} or later"),
                format!("term {voted}"),
            )),
            false => Ok(()),
        }
    }
}

/// Reads everything that Raft depends on.
pub(super) fn audit(disk: &Disk) -> Result<(), DiskError> {
    disk.check(|| {
        let odd: Option<Flaw> = disk.get(ODD)?;
        if let Some(flaw) = odd {
            return Err(flaw.into());
        }
        let vote: Option<Vote<u64>> = disk.get("vote")?;
        let purged: Option<LogId<u64>> = disk.get("purged")?;
        let _: Option<Option<LogId<u64>>> = disk.get("committed")?;
        let _: Option<u64> = disk.get(PROMISE)?;
        let meta: Option<SnapshotMeta<u64, Member>> = disk.get("snapshot_meta")?;
        let data = disk.get_bytes("snapshot_data")?;
        let end: Option<u64> = disk.get(END)?;
        let mut walk = Walk::new(purged);
        disk.each_entry(.., |index, entry| {
            let head: Head = decode(entry)?;
            walk.see(index, head.log_id)?;
            Ok(true)
        })?;
        walk.ends(end.unwrap_or(0), vote)?;
        let is_written = vote.is_some() || walk.last.is_some() || meta.is_some();
        if is_written && disk.read_identity()?.is_none() {
            return Err(Flaw::new("identity", "a name", "none").into());
        }
        if meta.is_some() != data.is_some() {
            let says = |is: bool| if is { "there" } else { "missing" };
            let (expected, found) = (says(meta.is_some()), says(data.is_some()));
            return Err(Flaw::new("snapshot_data", expected, found).into());
        }
        let snapshot = meta.and_then(|meta| meta.last_log_id);
        if snapshot < purged {
            let index = |it: Option<LogId<u64>>| {
                it.map_or("none".to_owned(), |it| format!("entry {}", it.index))
            };
            let expected = format!("{} or later", index(purged));
            return Err(Flaw::new("snapshot_meta", expected, index(snapshot)).into());
        }
        Ok(())
    })
}
