//! Small values on disk that survive a crash at any instant: written beside, synced, renamed.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Write},
    os::{linux::fs::MetadataExt as _, unix::fs::PermissionsExt},
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};

/// Why the state directory does not serve.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another daemon has it.
    #[error(
        "another NetManager{} runs on the state directory {directory}: stop it, or give this one its own with --state",
        process_of(*pid)
    )]
    InUse {
        /// The state directory.
        directory: PathBuf,
        /// Its process, where it can be seen from here.
        pid: Option<u32>,
    },
    /// A file operation failed.
    #[error("failed to {what} {path}")]
    File {
        /// What was tried.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path} does not hold what it should: move it away to start without it")]
    Content {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

/// A state directory that this process alone uses.
#[derive(Debug)]
pub struct Store {
    directory: PathBuf,
    _lock: File,
}

impl Store {
    /// Takes a state directory, which is made where there is none.
    ///
    /// # Errors
    /// When another process has it, or it cannot be made.
    pub fn open(directory: &Path) -> Result<Self, StoreError> {
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| StoreError::File { what, path, source }
        };
        fs::create_dir_all(directory).map_err(failed("create", directory))?;
        let private = fs::Permissions::from_mode(0o700);
        fs::set_permissions(directory, private).map_err(failed("protect", directory))?;
        let path = directory.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(failed("open", &path))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self {
                directory: directory.to_owned(),
                _lock: lock,
            }),
            Err(TryLockError::WouldBlock) => Err(StoreError::InUse {
                directory: directory.to_owned(),
                pid: holder(&lock),
            }),
            Err(TryLockError::Error(source)) => Err(failed("lock", &path)(source)),
        }
    }

    /// The value of `name`; `None` where none was ever saved.
    ///
    /// # Errors
    /// When the file cannot be read or is not such a value.
    pub fn load<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StoreError> {
        let path = self.directory.join(name);
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|source| StoreError::Content { path, source }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(StoreError::File {
                what: "read",
                path,
                source,
            }),
        }
    }

    /// Whether any of these was ever saved.
    #[must_use]
    pub fn has_any(&self, names: &[&str]) -> bool {
        names.iter().any(|name| self.directory.join(name).exists())
    }

    /// Saves a value that matters while the machine runs: when this returns it survives the process.
    ///
    /// # Errors
    /// When the disk refuses; the old value is still there.
    pub fn note<T: Serialize>(&self, name: &str, value: &T) -> Result<(), StoreError> {
        let path = self.directory.join(name);
        let bytes = to_bytes(value, &path)?;
        let written = self.directory.join(format!(".{name}.new"));
        fs::write(&written, &bytes)
            .and_then(|()| fs::rename(&written, &path))
            .map_err(|source| StoreError::File {
                what: "write",
                path,
                source,
            })
    }

    /// Saves the value of `name`; when this returns it survives a power cut.
    ///
    /// # Errors
    /// When the disk refuses; the old value is still there.
    pub fn save<T: Serialize>(&self, name: &str, value: &T) -> Result<(), StoreError> {
        let path = self.directory.join(name);
        let bytes = to_bytes(value, &path)?;
        let written = self.directory.join(format!(".{name}.new"));
        write_synced(&written, &bytes)
            .and_then(|()| fs::rename(&written, &path))
            .and_then(|()| File::open(&self.directory)?.sync_all())
            .map_err(|source| StoreError::File {
                what: "write",
                path,
                source,
            })
    }
}

/// The process that holds the lock of an open file, where it can be seen from here (`/proc/locks`, proc(5)).
#[must_use]
pub(crate) fn holder(file: &File) -> Option<u32> {
    let found = file.metadata().ok()?;
    let (major, minor) = (
        nix::sys::stat::major(found.st_dev()),
        nix::sys::stat::minor(found.st_dev()),
    );
    let place = format!("{major:02x}:{minor:02x}:{}", found.st_ino());
    let locks = fs::read_to_string("/proc/locks").ok()?;
    holder_of(&place, &locks)
}

/// A line reads `1: FLOCK  ADVISORY  WRITE 3485 fe:00:838125 0 EOF`; who waits has an arrow in it.
fn holder_of(place: &str, locks: &str) -> Option<u32> {
    locks
        .lines()
        .map(|line| line.split_whitespace().skip(1).collect::<Vec<_>>())
        .find(|words| words.first() == Some(&"FLOCK") && words.get(4) == Some(&place))
        .and_then(|words| words.get(3)?.parse().ok())
        .filter(|pid| *pid != 0)
}

fn to_bytes<T: Serialize>(value: &T, path: &Path) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(value).map_err(|source| StoreError::Content {
        path: path.to_owned(),
        source,
    })
}

/// For a message: which process, if it is known.
pub(crate) fn process_of(pid: Option<u32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" (process {pid})"))
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_survives_and_a_second_daemon_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        let store = Store::open(&path).unwrap();
        assert_eq!(store.load::<Vec<u32>>("x.json").unwrap(), None);
        store.save("x.json", &vec![1, 2]).unwrap();
        assert_eq!(store.load::<Vec<u32>>("x.json").unwrap(), Some(vec![1, 2]));
        let error = Store::open(&path).unwrap_err();
        let own = format!("(process {})", std::process::id());
        for part in [&path.display().to_string(), &own] {
            assert!(error.to_string().contains(part), "{error}");
        }
        drop(store);
        assert!(Store::open(&path).is_ok());
    }

    #[test]
    fn who_holds_a_lock_is_told_from_who_waits_for_it() {
        let locks = "1: POSIX  ADVISORY  WRITE 7 fe:00:12 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 3485 fe:00:12 0 EOF\n\
                     2: -> FLOCK  ADVISORY  READ 9 fe:00:12 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 0 fe:00:13 0 EOF\n";
        assert_eq!(holder_of("fe:00:12", locks), Some(3485));
        assert_eq!(
            holder_of("fe:00:13", locks),
            None,
            "of another pid namespace"
        );
        assert_eq!(holder_of("fe:00:14", locks), None);
    }

    #[test]
    fn a_half_written_value_never_replaces_the_old_one() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        store.save("x.json", &1).unwrap();
        fs::write(directory.path().join(".x.json.new"), "{").unwrap();
        assert_eq!(store.load::<u32>("x.json").unwrap(), Some(1));
        fs::write(directory.path().join("x.json"), "{").unwrap();
        assert!(matches!(
            store.load::<u32>("x.json"),
            Err(StoreError::Content { .. })
        ));
    }
}
