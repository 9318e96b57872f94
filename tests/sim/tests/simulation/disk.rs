//! The disk of a simulated lead: what was synced stays, what was not may be lost, or half of it.
//!
//! ```text
//!  redb --write--> now (what reads see) + unsynced --sync_data--> durable
//!                                              '--power cut--> any sectors of it reach durable, in any order
//! ```
//!
//! The power may go at any single write or sync (`fuse`), also in the midst of a commit.

use std::{
    fmt, io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use redb::{Builder, Database, StorageBackend};
use tokio::time::sleep;
use weft_lead::{Boxed, DiskError, Storage};

use crate::random::Random;

/// What a disk writes whole, bytes.
const SECTOR: usize = 512;

/// A change that is not synced.
#[derive(Debug)]
enum Unsynced {
    Write { offset: usize, data: Vec<u8> },
    Length(usize),
}

#[derive(Debug)]
struct Platter {
    random: Random,
    durable: Vec<u8>,
    now: Vec<u8>,
    unsynced: Vec<Unsynced>,
    /// Writes and syncs until the power goes.
    fuse: Option<u64>,
    /// Whether the next sync fails.
    bad_sync: bool,
    /// Whether one did.
    failed: bool,
    dead: bool,
    writes: u64,
    syncs: u64,
}

/// A disk, as one start of a lead holds it.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    platter: Arc<Mutex<Platter>>,
    /// The longest that a write usually waits, milliseconds.
    slowness: u64,
}

impl Disk {
    /// A disk with these bytes on it.
    pub(crate) fn new(image: Vec<u8>, slowness: u64, random: Random) -> Self {
        let platter = Platter {
            random,
            now: image.clone(),
            durable: image,
            unsynced: Vec::new(),
            fuse: None,
            bad_sync: false,
            failed: false,
            dead: false,
            writes: 0,
            syncs: 0,
        };
        Self {
            platter: Arc::new(Mutex::new(platter)),
            slowness,
        }
    }

    fn platter(&self) -> MutexGuard<'_, Platter> {
        self.platter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cuts the power at the `operations`-th write or sync from now.
    pub(crate) fn light_fuse(&self, operations: u64) {
        self.platter().fuse = Some(operations);
    }

    /// Makes the next sync fail.
    pub(crate) fn break_sync(&self) {
        self.platter().bad_sync = true;
    }

    /// Takes back what was to go wrong and did not yet.
    pub(crate) fn mend(&self) {
        let mut platter = self.platter();
        (platter.fuse, platter.bad_sync) = (None, false);
    }

    /// Whether a sync has failed.
    pub(crate) fn has_failed(&self) -> bool {
        self.platter().failed
    }

    /// Whether the power is gone.
    pub(crate) fn is_dead(&self) -> bool {
        self.platter().dead
    }

    /// Cuts the power now, if it is still there; what the disk holds afterwards.
    pub(crate) fn cut(&self) -> Vec<u8> {
        let mut platter = self.platter();
        platter.die();
        platter.durable.clone()
    }

    /// How many writes and syncs there were.
    pub(crate) fn operations(&self) -> (u64, u64) {
        let platter = self.platter();
        (platter.writes, platter.syncs)
    }
}

impl Platter {
    /// Whether the disk still works; burns the fuse.
    fn work(&mut self) -> io::Result<()> {
        if let Some(left) = &mut self.fuse {
            if *left == 0 {
                self.die();
            } else {
                *left -= 1;
            }
        }
        if self.dead {
            return Err(io::Error::other("the power is gone"));
        }
        Ok(())
    }

    fn die(&mut self) {
        if self.dead {
            return;
        }
        self.dead = true;
        let unsynced = std::mem::take(&mut self.unsynced);
        // Some power cuts keep all, some nothing, most something.
        let kept = *self.random.pick(&[0, 0, 300, 500, 900, 1000]);
        for change in unsynced {
            match change {
                Unsynced::Length(length) => {
                    if self.random.chance(kept.max(500)) {
                        self.durable.resize(length, 0);
                    }
                }
                Unsynced::Write { offset, data } => {
                    for (number, sector) in data.chunks(SECTOR).enumerate() {
                        if self.random.chance(kept) {
                            put(&mut self.durable, offset + number * SECTOR, sector);
                        }
                    }
                }
            }
        }
    }
}

/// Writes `data`, making the file longer where it must be.
fn put(file: &mut Vec<u8>, offset: usize, data: &[u8]) {
    let end = offset + data.len();
    if file.len() < end {
        file.resize(end, 0);
    }
    file[offset..end].copy_from_slice(data);
}

fn position(offset: u64) -> usize {
    usize::try_from(offset).expect("a simulated disk is small")
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.platter().now.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let platter = self.platter();
        let start = position(offset);
        let data = platter.now.get(start..start + out.len());
        out.copy_from_slice(data.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut platter = self.platter();
        platter.work()?;
        let length = position(len);
        platter.now.resize(length, 0);
        platter.unsynced.push(Unsynced::Length(length));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut platter = self.platter();
        platter.work()?;
        if std::mem::take(&mut platter.bad_sync) {
            platter.failed = true;
            return Err(io::Error::other("the sync failed"));
        }
        platter.syncs += 1;
        for change in std::mem::take(&mut platter.unsynced) {
            match change {
                Unsynced::Length(length) => platter.durable.resize(length, 0),
                Unsynced::Write { offset, data } => put(&mut platter.durable, offset, &data),
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut platter = self.platter();
        platter.work()?;
        platter.writes += 1;
        let offset = position(offset);
        put(&mut platter.now, offset, data);
        let data = data.to_vec();
        platter.unsynced.push(Unsynced::Write { offset, data });
        Ok(())
    }
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a simulated disk")
    }
}

impl Storage for Disk {
    fn open(&self, builder: &Builder) -> Result<Database, DiskError> {
        Ok(builder.create_with_backend(self.clone())?)
    }

    fn run(&self, work: Box<dyn FnOnce() + Send>) -> Boxed<'static, ()> {
        let wait = if self.slowness == 0 {
            0
        } else {
            let mut platter = self.platter();
            let slowness = self.slowness;
            // Now and then a disk is busy with something else.
            let slowness = if platter.random.chance(10) {
                20 * slowness
            } else {
                slowness
            };
            platter.random.within(0, slowness)
        };
        Box::pin(async move {
            sleep(Duration::from_millis(wait)).await;
            work();
        })
    }
}
