//! What the agent keeps over restarts: one JSON file per subject in its state directory.
//!
//! Files are replaced whole (write, sync, rename), in order, by one task, so that the engine never waits for a
//! disk. Without a directory nothing is kept. A file that cannot be read stops the agent at its start: the
//! ledger says what must *not* run.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use netmanager_api::table::Table;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::sync::mpsc;

use crate::{
    cluster::{Charge, Kept},
    nodes::Known,
    reconcile::Ledger,
};

/// Why the state cannot be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file or directory cannot be used.
    #[error("failed to use {path}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path} cannot be read: move the state directory away to start without it")]
    Corrupt {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The directory belongs to somebody else.
    #[error(
        "{path} holds the state of {found}, and this is {own}: give each agent a directory of its own"
    )]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        found: String,
        /// Who asks.
        own: String,
    },
}

/// The end of a lease, on a clock that goes on over a restart of the agent (not of the machine).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct LeaseEnd {
    boot: String,
    /// Since the machine's boot, milliseconds.
    ends_ms: u64,
}

/// The state directory.
#[derive(Debug)]
pub struct Store {
    writes: Option<mpsc::UnboundedSender<(PathBuf, Vec<u8>)>>,
    dir: PathBuf,
}

/// Writes what the [`Store`] was given.
#[derive(Debug)]
pub struct Writer(mpsc::UnboundedReceiver<(PathBuf, Vec<u8>)>);

impl Store {
    /// Opens `dir` for the agent `owner`; `None` keeps nothing.
    ///
    /// # Errors
    /// When the directory or a file in it cannot be used, or belongs to another agent.
    pub fn open(
        dir: Option<&Path>,
        owner: &str,
        now: Instant,
    ) -> Result<(Self, Writer, Kept), StoreError> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut store = Self {
            writes: None,
            dir: PathBuf::new(),
        };
        let mut kept = Kept::default();
        if let Some(dir) = dir {
            store.dir = dir.to_owned();
            fs::create_dir_all(store.dir.join("nodes")).map_err(|source| at(dir, source))?;
            fs::create_dir_all(store.dir.join("tables")).map_err(|source| at(dir, source))?;
            store.claim(owner)?;
            kept = store.read(now)?;
            store.writes = Some(sender);
        }
        Ok((store, Writer(receiver), kept))
    }

    fn claim(&self, owner: &str) -> Result<(), StoreError> {
        let path = self.dir.join("owner.json");
        match load::<String>(&path)? {
            Some(found) if found != owner => Err(StoreError::Foreign {
                path: self.dir.clone(),
                found,
                own: owner.to_owned(),
            }),
            Some(_) => Ok(()),
            None => replace(&path, &encode(&owner)).map_err(|source| at(&path, source)),
        }
    }

    fn read(&self, now: Instant) -> Result<Kept, StoreError> {
        let lease: Option<LeaseEnd> = load(&self.dir.join("lease.json"))?;
        Ok(Kept {
            charge: load(&self.dir.join("charge.json"))?.unwrap_or_default(),
            ledger: load(&self.dir.join("ledger.json"))?.unwrap_or_default(),
            tables: load_all(&self.dir.join("tables"))?,
            known: load_all(&self.dir.join("nodes"))?,
            lease_ends: lease.and_then(|lease| still_to_come(&lease, now)),
        })
    }

    /// Keeps what the leads said.
    pub fn keep_charge(&self, charge: &Charge) {
        self.put("charge.json", charge);
    }

    /// Keeps what was decided for good.
    pub fn keep_ledger(&self, ledger: &Ledger) {
        self.put("ledger.json", ledger);
    }

    /// Keeps a node's table.
    pub fn keep_table(&self, node: &str, table: &Table) {
        self.put(&format!("tables/{node}.json"), table);
    }

    /// Keeps what a node said.
    pub fn keep_known(&self, node: &str, known: &Known) {
        self.put(&format!("nodes/{node}.json"), known);
    }

    /// Keeps when the lease ends, `left` from now.
    pub fn keep_lease(&self, left: Duration) {
        if let (true, Some((boot, uptime))) = (self.writes.is_some(), boot_clock()) {
            let ends = uptime + left;
            let ends_ms = u64::try_from(ends.as_millis()).unwrap_or(u64::MAX);
            self.put("lease.json", &LeaseEnd { boot, ends_ms });
        }
    }

    fn put(&self, name: &str, value: &impl Serialize) {
        if let Some(writes) = &self.writes {
            // The writer ends only after the engine, which owns this.
            let _ = writes.send((self.dir.join(name), encode(value)));
        }
    }
}

impl Writer {
    /// Writes until the store is dropped, the newest of what waits for the same file only.
    pub async fn run(mut self) {
        let mut waiting = BTreeMap::new();
        while let Some((path, bytes)) = self.0.recv().await {
            waiting.insert(path, bytes);
            while let Ok((path, bytes)) = self.0.try_recv() {
                waiting.insert(path, bytes);
            }
            let batch = std::mem::take(&mut waiting);
            let written = tokio::task::spawn_blocking(move || {
                for (path, bytes) in batch {
                    if let Err(error) = replace(&path, &bytes) {
                        tracing::error!(path = %path.display(), %error, "failed to keep state");
                    }
                }
            });
            if written.await.is_err() {
                tracing::error!("the writer of the state directory panicked");
            }
        }
    }
}

fn at(path: &Path, source: io::Error) -> StoreError {
    StoreError::Io {
        path: path.to_owned(),
        source,
    }
}

fn encode(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("state types have string keys and no failing serializer")
}

/// Replaces a file whole; what was there stays until the new one is on the disk.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = fs::File::create(&new)?;
    file.write_all(bytes)?;
    file.sync_data()?;
    fs::rename(&new, path)
}

fn load<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StoreError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(at(path, source)),
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|source| StoreError::Corrupt {
            path: path.to_owned(),
            source,
        })
}

fn load_all<T: DeserializeOwned>(dir: &Path) -> Result<BTreeMap<String, T>, StoreError> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(dir).map_err(|source| at(dir, source))? {
        let path = entry.map_err(|source| at(dir, source))?.path();
        let is_json = path
            .extension()
            .is_some_and(|extension| extension == "json");
        if let (true, Some(name)) = (is_json, path.file_stem().and_then(|stem| stem.to_str())) {
            let value = load(&path)?;
            all.extend(value.map(|value| (name.to_owned(), value)));
        }
    }
    Ok(all)
}

/// The machine's boot and the time since then, suspended time included.
fn boot_clock() -> Option<(String, Duration)> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let uptime = fs::read_to_string("/proc/uptime").ok()?;
    let seconds: f64 = uptime.split_whitespace().next()?.parse().ok()?;
    Some((
        boot.trim().to_owned(),
        Duration::try_from_secs_f64(seconds).ok()?,
    ))
}

fn still_to_come(lease: &LeaseEnd, now: Instant) -> Option<Instant> {
    let (boot, uptime) = boot_clock()?;
    let left = Duration::from_millis(lease.ends_ms).checked_sub(uptime)?;
    (boot == lease.boot).then(|| now + left)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(session: u64) -> Charge {
        Charge {
            session: Some(session),
            lease: Some(Duration::from_secs(10)),
            orders: None,
        }
    }

    #[tokio::test]
    async fn what_was_kept_last_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let now = Instant::now();
        let owner = "weft://m/agent/edge";
        let (store, writer, kept) = Store::open(Some(dir.path()), owner, now).unwrap();
        assert_eq!(kept.charge, Charge::default());
        store.keep_charge(&session(1));
        store.keep_charge(&session(2));
        store.keep_known("n1", &Known::default());
        store.keep_lease(Duration::from_secs(60));
        drop(store);
        writer.run().await;
        let (_, _, kept) = Store::open(Some(dir.path()), owner, now).unwrap();
        assert_eq!(kept.charge, session(2));
        assert_eq!(kept.known["n1"], Known::default());
        let left = kept.lease_ends.unwrap() - now;
        assert!(
            left > Duration::from_secs(50) && left <= Duration::from_secs(60),
            "{left:?}"
        );
    }

    #[test]
    fn the_lease_of_an_earlier_boot_is_over() {
        let lease = LeaseEnd {
            boot: "another".to_owned(),
            ends_ms: u64::MAX,
        };
        assert_eq!(still_to_come(&lease, Instant::now()), None);
    }

    #[test]
    fn a_damaged_file_or_a_foreign_directory_stops_the_agent() {
        let dir = tempfile::tempdir().unwrap();
        let now = Instant::now();
        Store::open(Some(dir.path()), "weft://m/agent/edge", now).unwrap();
        let foreign = Store::open(Some(dir.path()), "weft://m/agent/fog", now).unwrap_err();
        assert!(matches!(foreign, StoreError::Foreign { .. }), "{foreign}");
        fs::write(dir.path().join("ledger.json"), "{").unwrap();
        let corrupt = Store::open(Some(dir.path()), "weft://m/agent/edge", now).unwrap_err();
        assert!(corrupt.to_string().contains("ledger.json"), "{corrupt}");
    }
}
