//! What the agent keeps over restarts: one JSON file per subject in its state directory.
//!
//! Files are replaced whole (write, sync, rename), in order, by one task, so that the engine never waits for a
//! disk. Without a shelf nothing is kept. A file that cannot be read stops the agent at its start: the
//! ledger says what must *not* run.

use std::{
    collections::BTreeMap,
    fmt, fs,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use futures::future::BoxFuture;
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

/// Work that waits for a disk.
pub type Work = Box<dyn FnOnce() + Send>;

/// Where the state is kept, by names with `/` between folder and file; shown as the place that it is.
pub trait Shelf: fmt::Debug + fmt::Display + Send + Sync {
    /// What a file holds; `None` when it is not there.
    ///
    /// # Errors
    /// When it cannot be read.
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>>;

    /// The names of the files in a folder.
    ///
    /// # Errors
    /// When it cannot be listed.
    fn list(&self, folder: &str) -> io::Result<Vec<String>>;

    /// Replaces a file whole; what was there stays until the new one is on the disk.
    ///
    /// # Errors
    /// When it cannot be written.
    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()>;

    /// Runs work that waits for the disk.
    fn run(&self, work: Work) -> BoxFuture<'static, ()>;

    /// The machine's boot and the time since then, suspended time included; `None` where nobody knows.
    fn boot_clock(&self) -> Option<(String, Duration)>;
}

/// A directory of the machine's.
#[derive(Clone, Debug)]
pub struct Folder(pub PathBuf);

impl fmt::Display for Folder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

impl Shelf for Folder {
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        match fs::read(self.0.join(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        let dir = self.0.join(folder);
        fs::create_dir_all(&dir)?;
        let names = fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().into_string().ok()));
        let names: io::Result<Vec<_>> = names.collect();
        Ok(names?.into_iter().flatten().collect())
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let path = self.0.join(name);
        let new = path.with_extension("new");
        let mut file = fs::File::create(&new)?;
        file.write_all(bytes)?;
        file.sync_data()?;
        fs::rename(&new, path)
    }

    fn run(&self, work: Work) -> BoxFuture<'static, ()> {
        Box::pin(async {
            if tokio::task::spawn_blocking(work).await.is_err() {
                tracing::error!("the writer of the state directory panicked");
            }
        })
    }

    fn boot_clock(&self) -> Option<(String, Duration)> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let uptime = fs::read_to_string("/proc/uptime").ok()?;
        let seconds: f64 = uptime.split_whitespace().next()?.parse().ok()?;
        Some((
            boot.trim().to_owned(),
            Duration::try_from_secs_f64(seconds).ok()?,
        ))
    }
}

/// What the engine keeps.
#[derive(Debug)]
pub struct Store(Option<Keeping>);

#[derive(Debug)]
struct Keeping {
    shelf: Arc<dyn Shelf>,
    writes: mpsc::UnboundedSender<(String, Vec<u8>)>,
}

/// Writes what the [`Store`] was given.
#[derive(Debug)]
pub struct Writer {
    shelf: Option<Arc<dyn Shelf>>,
    writes: mpsc::UnboundedReceiver<(String, Vec<u8>)>,
}

impl Store {
    /// Opens `shelf` for the agent `owner`; `None` keeps nothing.
    ///
    /// # Errors
    /// When a file on it cannot be used, or it belongs to another agent.
    pub fn open(
        shelf: Option<Arc<dyn Shelf>>,
        owner: &str,
        now: Instant,
    ) -> Result<(Self, Writer, Kept), StoreError> {
        let (sender, writes) = mpsc::unbounded_channel();
        let mut kept = Kept::default();
        if let Some(shelf) = shelf.as_deref() {
            // Listed first, which makes the folders.
            let tables = load_all(shelf, "tables")?;
            let known = load_all(shelf, "nodes")?;
            claim(shelf, owner)?;
            let lease: Option<LeaseEnd> = load(shelf, "lease.json")?;
            kept = Kept {
                charge: load(shelf, "charge.json")?.unwrap_or_default(),
                ledger: load(shelf, "ledger.json")?.unwrap_or_default(),
                tables,
                known,
                lease_ends: lease.and_then(|lease| still_to_come(shelf, &lease, now)),
            };
        }
        let keeping = shelf.clone().map(|shelf| Keeping {
            shelf,
            writes: sender,
        });
        Ok((Self(keeping), Writer { shelf, writes }, kept))
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
        let clock = self.0.as_ref().and_then(|it| it.shelf.boot_clock());
        if let Some((boot, uptime)) = clock {
            let ends = uptime + left;
            let ends_ms = u64::try_from(ends.as_millis()).unwrap_or(u64::MAX);
            self.put("lease.json", &LeaseEnd { boot, ends_ms });
        }
    }

    fn put(&self, name: &str, value: &impl Serialize) {
        if let Some(keeping) = &self.0 {
            // The writer ends only after the engine, which owns this.
            let _ = keeping.writes.send((name.to_owned(), encode(value)));
        }
    }
}

impl Writer {
    /// Writes until the store is dropped, the newest of what waits for the same file only.
    pub async fn run(mut self) {
        let Some(shelf) = self.shelf else {
            return;
        };
        let mut waiting = BTreeMap::new();
        while let Some((name, bytes)) = self.writes.recv().await {
            waiting.insert(name, bytes);
            while let Ok((name, bytes)) = self.writes.try_recv() {
                waiting.insert(name, bytes);
            }
            let (batch, disk) = (std::mem::take(&mut waiting), shelf.clone());
            let writing = shelf.run(Box::new(move || {
                for (name, bytes) in batch {
                    if let Err(error) = disk.replace(&name, &bytes) {
                        tracing::error!(shelf = %disk, name, %error, "failed to keep state");
                    }
                }
            }));
            writing.await;
        }
    }
}

/// Makes the shelf `owner`'s, unless it is somebody else's.
fn claim(shelf: &dyn Shelf, owner: &str) -> Result<(), StoreError> {
    const NAME: &str = "owner.json";
    match load::<String>(shelf, NAME)? {
        Some(found) if found != owner => Err(StoreError::Foreign {
            path: shelf.to_string().into(),
            found,
            own: owner.to_owned(),
        }),
        Some(_) => Ok(()),
        None => {
            let written = shelf.replace(NAME, &encode(&owner));
            written.map_err(|source| at(shelf, NAME, source))
        }
    }
}

fn at(shelf: &dyn Shelf, name: &str, source: io::Error) -> StoreError {
    StoreError::Io {
        path: path(shelf, name),
        source,
    }
}

fn path(shelf: &dyn Shelf, name: &str) -> PathBuf {
    Path::new(&shelf.to_string()).join(name)
}

fn encode(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("state types have string keys and no failing serializer")
}

fn load<T: DeserializeOwned>(shelf: &dyn Shelf, name: &str) -> Result<Option<T>, StoreError> {
    let bytes = shelf.read(name).map_err(|source| at(shelf, name, source))?;
    let value = bytes.map(|bytes| serde_json::from_slice(&bytes));
    value.transpose().map_err(|source| StoreError::Corrupt {
        path: path(shelf, name),
        source,
    })
}

fn load_all<T: DeserializeOwned>(
    shelf: &dyn Shelf,
    folder: &str,
) -> Result<BTreeMap<String, T>, StoreError> {
    let mut all = BTreeMap::new();
    let names = shelf.list(folder);
    for name in names.map_err(|source| at(shelf, folder, source))? {
        if let Some(stem) = name.strip_suffix(".json") {
            let value = load(shelf, &format!("{folder}/{name}"))?;
            all.extend(value.map(|value| (stem.to_owned(), value)));
        }
    }
    Ok(all)
}

fn still_to_come(shelf: &dyn Shelf, lease: &LeaseEnd, now: Instant) -> Option<Instant> {
    let (boot, uptime) = shelf.boot_clock()?;
    let left = Duration::from_millis(lease.ends_ms).checked_sub(uptime)?;
    (boot == lease.boot).then(|| now + left)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path, owner: &str, now: Instant) -> Result<(Store, Writer, Kept), StoreError> {
        let shelf = Arc::new(Folder(dir.to_owned()));
        Store::open(Some(shelf), owner, now)
    }

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
        let (store, writer, kept) = open(dir.path(), owner, now).unwrap();
        assert_eq!(kept.charge, Charge::default());
        store.keep_charge(&session(1));
        store.keep_charge(&session(2));
        store.keep_known("n1", &Known::default());
        store.keep_lease(Duration::from_secs(60));
        drop(store);
        writer.run().await;
        let (_, _, kept) = open(dir.path(), owner, now).unwrap();
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
        let shelf = Folder(PathBuf::new());
        assert_eq!(still_to_come(&shelf, &lease, Instant::now()), None);
    }

    #[test]
    fn a_damaged_file_or_a_foreign_directory_stops_the_agent() {
        let dir = tempfile::tempdir().unwrap();
        let now = Instant::now();
        open(dir.path(), "weft://m/agent/edge", now).unwrap();
        let foreign = open(dir.path(), "weft://m/agent/fog", now).unwrap_err();
        assert!(matches!(foreign, StoreError::Foreign { .. }), "{foreign}");
        fs::write(dir.path().join("ledger.json"), "{").unwrap();
        let corrupt = open(dir.path(), "weft://m/agent/edge", now).unwrap_err();
        assert!(corrupt.to_string().contains("ledger.json"), "{corrupt}");
    }
}
