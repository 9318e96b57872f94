//! What a lead finds around it: a disk, a way to the other leads, the time of day, threads.
//!
//! ```text
//!  Running --+-- Storage   a folder of the machine's     | what a simulation calls a disk
//!            +-- Wire      HTTP/2 over TLS to their doors | what a simulation calls a network
//!            +-- Clock     the system's                   | one that jumps
//!            '-- Aside     threads of their own           | in turn with everything else
//! ```
//!
//! Timers and the monotonic clock are tokio's, which a simulation stops by itself. What goes over these seams
//! (pages of redb, requests to a door) is the same on both sides.

use std::{
    fmt,
    fs::{self, File},
    future::Future,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use http::{Request, StatusCode};
use redb::{Builder, Database, backends::FileBackend};
use tokio::sync::oneshot;

use crate::{
    dial::DialError,
    raft::{DiskError, Flaw, examine},
    room::Space,
};

/// A boxed future.
pub type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Where the database lies, and how its writes are waited for; shown as the place that it is.
pub trait Storage: fmt::Debug + fmt::Display + Send + Sync {
    /// Opens the database, making it where it is missing.
    ///
    /// # Errors
    /// When it cannot be made, or is not a sound database.
    fn open(&self, builder: &Builder) -> Result<Database, DiskError>;

    /// Runs work that waits for the disk.
    fn run(&self, work: Box<dyn FnOnce() + Send>) -> Boxed<'static, ()>;

    /// How much room there is; unless it says, more than anybody writes.
    ///
    /// # Errors
    /// When it cannot be found out.
    fn space(&self) -> io::Result<Space> {
        Ok(Space {
            free: u64::MAX,
            total: u64::MAX,
        })
    }
}

/// The way to the other leads.
pub trait Wire: fmt::Debug + Send + Sync {
    /// Sends a request to the door of lead `name` and reads the whole answer.
    fn exchange(
        &self,
        name: &str,
        address: SocketAddr,
        request: Request<Bytes>,
    ) -> Boxed<'_, Result<(StatusCode, Bytes), DialError>>;
}

/// The time of day, milliseconds since the Unix epoch.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> u64 + Send + Sync>);

impl Clock {
    /// A clock that shows what `now_ms` says.
    pub fn new(now_ms: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        Self(Arc::new(now_ms))
    }

    /// What it shows.
    pub(crate) fn now_ms(&self) -> u64 {
        (self.0)()
    }
}

impl Default for Clock {
    /// The system's.
    fn default() -> Self {
        Self::new(|| {
            let since = SystemTime::now().duration_since(UNIX_EPOCH);
            since.map_or(0, |since| {
                u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
            })
        })
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Clock").field(&self.now_ms()).finish()
    }
}

/// What is worked out at one go.
pub type Work = Box<dyn FnOnce() + Send>;

/// Where something is worked out that takes long: beside what must be answered meanwhile.
#[derive(Clone)]
pub struct Aside(Arc<dyn Fn(Work) -> Boxed<'static, ()> + Send + Sync>);

impl Aside {
    /// Where `run` does it.
    pub fn new(run: impl Fn(Work) -> Boxed<'static, ()> + Send + Sync + 'static) -> Self {
        Self(Arc::new(run))
    }

    /// Nowhere else: everything waits until it is done, so that it always takes its turn alike.
    #[must_use]
    pub fn in_turn() -> Self {
        Self::new(|work| {
            work();
            Box::pin(async {})
        })
    }

    /// What comes of `work`; nothing when it panicked.
    pub(crate) async fn work<R: Send + 'static>(
        &self,
        work: impl FnOnce() -> R + Send + 'static,
    ) -> Option<R> {
        let (reply, result) = oneshot::channel();
        let work = Box::new(move || {
            // Who asked may be gone.
            let _ = reply.send(work());
        });
        (self.0)(work).await;
        result.await.ok()
    }
}

impl Default for Aside {
    /// Threads of their own.
    fn default() -> Self {
        Self::new(|work| {
            Box::pin(async {
                // Work that died has not answered, which is how its asker knows.
                let _ = tokio::task::spawn_blocking(work).await;
            })
        })
    }
}

impl fmt::Debug for Aside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Aside").finish_non_exhaustive()
    }
}

/// All of it.
#[derive(Clone, Debug)]
pub struct World {
    /// The disk.
    pub storage: Arc<dyn Storage>,
    /// The network.
    pub wire: Arc<dyn Wire>,
    /// The clock.
    pub clock: Clock,
    /// Where it works out what takes long.
    pub aside: Aside,
}

/// The database's name.
pub(crate) const FILE: &str = "lead.redb";

/// A folder of the machine's, with the database `lead.redb`.
#[derive(Clone, Debug)]
pub(crate) struct Folder(pub(crate) PathBuf);

impl fmt::Display for Folder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

/// Makes an empty database, or none: what has its name was whole once.
fn make(dir: &Path, builder: &Builder) -> Result<(), DiskError> {
    let early = dir.join(format!("{FILE}.new"));
    let made = || {
        if early.exists() {
            fs::remove_file(&early)?;
        }
        Ok(early.clone())
    };
    let early = made().map_err(DiskError::Folder)?;
    drop(builder.create(&early)?);
    let named = fs::rename(early, dir.join(FILE)).and_then(|()| File::open(dir)?.sync_all());
    named.map_err(DiskError::Folder)
}

impl Storage for Folder {
    fn open(&self, builder: &Builder) -> Result<Database, DiskError> {
        fs::create_dir_all(&self.0).map_err(DiskError::Folder)?;
        let path = self.0.join(FILE);
        if !path.exists() {
            make(&self.0, builder)?;
        }
        let open = || {
            let file = File::options().read(true).write(true).open(path)?;
            // Where another process has it, redb says so.
            let looked_at = file.try_lock().is_ok().then(|| file.try_clone());
            Ok((looked_at.transpose()?, file.metadata()?.len(), file))
        };
        let (looked_at, length, file) = open().map_err(redb::StorageError::Io)?;
        if length == 0 {
            return Err(Flaw::database("an empty file").into());
        }
        if let Some(file) = looked_at {
            examine(Arc::new(FileBackend::new(file)?), builder)?;
        }
        Ok(builder.create_with_backend(FileBackend::new(file)?)?)
    }

    fn run(&self, work: Box<dyn FnOnce() + Send>) -> Boxed<'static, ()> {
        Box::pin(async {
            // Work that died has not answered, which is how its asker knows.
            let _ = tokio::task::spawn_blocking(work).await;
        })
    }

    fn space(&self) -> io::Result<Space> {
        // The folder is made later; where it will be there is something.
        let here = |path: &&Path| path.exists();
        let found = self.0.ancestors().find(here).unwrap_or(Path::new("."));
        let stat = rustix::fs::statvfs(found)?;
        Ok(Space {
            free: stat.f_bavail.saturating_mul(stat.f_frsize),
            total: stat.f_blocks.saturating_mul(stat.f_frsize),
        })
    }
}
