//! What an agent keeps, in the simulation: files that are replaced whole, of which a power cut may take back the last.

use std::{
    collections::BTreeMap,
    fmt, io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::future::BoxFuture;
use tokio::time::sleep;
use weft_agent::store::{Shelf, Work};

use crate::{random::Random, time::HostClock};

/// So long after a rename a power cut may undo it, milliseconds: file systems write their directories every few seconds.
const DIRECTORY: u64 = 5_000;

#[derive(Debug)]
struct File {
    bytes: Vec<u8>,
    /// What was there before, and when it was replaced.
    before: Option<Vec<u8>>,
    replaced: u64,
}

#[derive(Debug)]
struct Inner {
    random: Random,
    files: BTreeMap<String, File>,
    boot: u64,
    /// When the lease ends that was kept last, since the first boot, milliseconds.
    lease_ends: Option<u64>,
    /// The longest that work waits for the disk, milliseconds.
    slowness: u64,
}

/// The state directory of one machine.
#[derive(Clone, Debug)]
pub(crate) struct SimShelf {
    inner: Arc<Mutex<Inner>>,
    /// The machine's own clock since its first boot.
    clock: HostClock,
}

impl SimShelf {
    pub(crate) fn new(mut random: Random, clock: HostClock) -> Self {
        let inner = Inner {
            slowness: *random.pick(&[1, 10, 80]),
            random,
            files: BTreeMap::new(),
            boot: 0,
            lease_ends: None,
        };
        Self {
            inner: Arc::new(Mutex::new(inner)),
            clock,
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When the lease ends that was kept last, since the first boot, milliseconds.
    pub(crate) fn lease_ends(&self) -> Option<u64> {
        self.inner().lease_ends
    }

    /// The power goes at `now` by the machine's clock.
    pub(crate) fn cut_power(&self, now: u64) {
        let mut inner = self.inner();
        let Inner { random, files, .. } = &mut *inner;
        files.retain(|_, file| {
            if now < file.replaced + DIRECTORY && random.chance(300) {
                match file.before.take() {
                    Some(before) => file.bytes = before,
                    None => return false,
                }
            }
            true
        });
        inner.boot += 1;
    }
}

impl fmt::Display for SimShelf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a simulated shelf")
    }
}

impl Shelf for SimShelf {
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        Ok(self.inner().files.get(name).map(|file| file.bytes.clone()))
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        let inner = self.inner();
        let names = inner.files.keys();
        let within = names.filter_map(|name| name.strip_prefix(folder)?.strip_prefix('/'));
        Ok(within.map(str::to_owned).collect())
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let replaced = self.clock.now();
        let mut inner = self.inner();
        if name == "lease.json" {
            let lease: Option<serde_json::Value> = serde_json::from_slice(bytes).ok();
            inner.lease_ends = lease.and_then(|it| it.get("ends_ms")?.as_u64());
        }
        let before = inner.files.remove(name).map(|file| file.bytes);
        let file = File {
            bytes: bytes.to_vec(),
            before,
            replaced,
        };
        inner.files.insert(name.to_owned(), file);
        Ok(())
    }

    fn run(&self, work: Work) -> BoxFuture<'static, ()> {
        let mut inner = self.inner();
        let slowness = inner.slowness;
        let wait = inner.random.within(0, slowness);
        Box::pin(async move {
            sleep(Duration::from_millis(wait)).await;
            work();
        })
    }

    fn boot_clock(&self) -> Option<(String, Duration)> {
        let since = Duration::from_millis(self.clock.now());
        Some((format!("boot {}", self.inner().boot), since))
    }
}
