//! Whether a database is sound, before redb writes to it; and which of two commits counts, which redb believes a single bit.
//!
//! redb's header (redb's docs/design.md, format 3) holds the last two commits and a bit that says which counts. The bit is flipped
//! once the newer is on the disk; flipped by itself it would take an acknowledged commit back.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use redb::{Builder, StorageBackend, StorageError};

use super::DiskError;

/// How much of the file it is.
const SIZE: usize = 320;
const MAGIC: &[u8] = b"redb\x1a\x0a\xa9\x0d\x0a";
/// The byte with the flags.
const FLAGS: usize = 9;
/// The second of the two counts.
const SECOND: u8 = 1;
/// The one that counts was on the disk before it did, and redb does not look at the other.
const TWO_PHASES: u8 = 4;
/// The numbers of the two commits.
const NUMBERS: [usize; 2] = [64 + 104, 192 + 104];

/// The flags by which redb takes the newer of the two commits, if all of it is there; `None` where the newer counts.
fn either(header: &[u8; SIZE]) -> Option<u8> {
    let flags = header[FLAGS];
    let number = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&header[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    let [first, second] = NUMBERS.map(number);
    let is_older = match flags & SECOND {
        0 => first < second,
        _ => second < first,
    };
    let is_sure = header.starts_with(MAGIC) && flags & TWO_PHASES != 0;
    (is_sure && is_older).then_some(flags & !TWO_PHASES)
}

/// Finds out whether the database in `file` is sound before anything is written to it; what is not is left as it is.
///
/// Where the older commit counts, redb is let look at both: a crash between the two phases left it so, or the bit is wrong. A
/// damaged one that counts is not made up for by the other.
pub(crate) fn examine(file: Arc<dyn StorageBackend>, builder: &Builder) -> Result<(), DiskError> {
    let length = file.len().map_err(StorageError::from)?;
    if length == 0 {
        return Ok(());
    }
    let trial = Trial {
        file: file.clone(),
        length: Mutex::new(length),
        written: Mutex::default(),
    };
    drop(builder.create_with_backend(trial)?);
    let mut header = [0; SIZE];
    file.read(0, &mut header).map_err(StorageError::from)?;
    if let Some(flags) = either(&header) {
        let written = file.write(FLAGS as u64, &[flags]);
        let synced = written.and_then(|()| file.sync_data());
        synced.map_err(StorageError::from)?;
    }
    Ok(())
}

/// A file of which nothing is changed: what is written is only seen here.
#[derive(Debug)]
struct Trial {
    file: Arc<dyn StorageBackend>,
    length: Mutex<u64>,
    written: Mutex<Vec<(u64, Vec<u8>)>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl StorageBackend for Trial {
    fn len(&self) -> io::Result<u64> {
        Ok(*locked(&self.length))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let there = self.file.len()?.saturating_sub(offset);
        let there = usize::try_from(there).unwrap_or(usize::MAX).min(out.len());
        self.file.read(offset, &mut out[..there])?;
        out[there..].fill(0);
        let end = offset + out.len() as u64;
        for (at, data) in locked(&self.written).iter() {
            let from = offset.max(*at);
            let to = end.min(at + data.len() as u64);
            if from < to {
                let part = |start: u64| (from - start) as usize..(to - start) as usize;
                out[part(offset)].copy_from_slice(&data[part(*at)]);
            }
        }
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        *locked(&self.length) = length;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        locked(&self.written).push((offset, data.to_owned()));
        Ok(())
    }
}
