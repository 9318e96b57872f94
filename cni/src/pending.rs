//! Releases that wait for a NetManager: one file per attachment beside the socket.
//!
//! A file appears whole (written under another name, then renamed) and is carried out by whoever comes first:
//! the NetManager when it starts, a GC, or an ADD of the same attachment, which must not be undone by it later.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use netmanager_api::cni::{AttachmentKey, Request, pending_dir};

use crate::{door::Door, error::Error};

/// Queues the release of `key`.
pub(crate) fn queue(socket: &Path, key: &AttachmentKey) -> Result<(), Error> {
    let dir = pending_dir(socket);
    let file = dir.join(key.file_name());
    let new = dir.join(format!(".{}.{}", key.file_name(), std::process::id()));
    let mut line = serde_json::to_string(&Request::Release { key: key.clone() })
        .map_err(|error| Error::io("encode a release", error.into()))?;
    line.push('\n');
    fs::create_dir_all(&dir)
        .and_then(|()| fs::write(&new, line))
        .and_then(|()| fs::rename(&new, &file))
        .map_err(|source| Error::io(format!("queue the release in {}", file.display()), source))
}

/// Takes back what is queued for `key`.
pub(crate) fn forget(socket: &Path, key: &AttachmentKey) -> Result<(), Error> {
    remove(&pending_dir(socket).join(key.file_name()))
}

/// Whether a release of `key` waits.
pub(crate) fn waits(socket: &Path, key: &AttachmentKey) -> bool {
    pending_dir(socket).join(key.file_name()).exists()
}

/// Carries out all that waits; goes on after an error and returns every one.
pub(crate) async fn replay(door: &Door) -> Vec<Error> {
    let mut failures = Vec::new();
    for file in list(&pending_dir(&door.socket)) {
        failures.extend(replay_one(door, &file).await.err());
    }
    failures
}

async fn replay_one(door: &Door, file: &Path) -> Result<(), Error> {
    let unread = |source| Error::io(format!("read the release in {}", file.display()), source);
    let line = fs::read(file).map_err(unread)?;
    let request: Request = serde_json::from_slice(&line).map_err(|error| unread(error.into()))?;
    let Request::Release { .. } = request else {
        return Err(unread(io::Error::other("it is another request")));
    };
    door.request(&request).await?;
    remove(file)
}

fn list(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| !entry.file_name().to_string_lossy().starts_with('.'))
        .map(|entry| entry.path())
        .collect();
    files.sort();
    files
}

fn remove(file: &Path) -> Result<(), Error> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(format!("remove {}", file.display()), error))
        }
        _ => Ok(()),
    }
}
