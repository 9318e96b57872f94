//! Small values on disk that survive a crash at any instant: written beside, synced, renamed.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};

/// Why the state directory does not serve.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another daemon has it.
    #[error(
        "another NetManager runs on the state directory {0}: stop it, or give this one its own with --state"
    )]
    InUse(PathBuf),
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
            Err(TryLockError::WouldBlock) => Err(StoreError::InUse(directory.to_owned())),
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

    /// Saves the value of `name`; when this returns it survives a power cut.
    ///
    /// # Errors
    /// When the disk refuses; the old value is still there.
    pub fn save<T: Serialize>(&self, name: &str, value: &T) -> Result<(), StoreError> {
        let path = self.directory.join(name);
        let bytes = serde_json::to_vec(value).map_err(|source| StoreError::Content {
            path: path.clone(),
            source,
        })?;
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
        assert!(
            error.to_string().contains(&path.display().to_string()),
            "{error}"
        );
        drop(store);
        assert!(Store::open(&path).is_ok());
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
