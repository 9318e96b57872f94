//! A table from a file, for nodes without an agent: followed as an agent is.
//!
//! The file is looked at by its metadata several times a second and read when that changed, so that any way to
//! write it serves; write it whole beside and rename it. A file that is missing or wrong is named once and
//! the last good table stays.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use netmanager_api::table::Table;
use tokio::{sync::mpsc, time::sleep};

const LOOK: Duration = Duration::from_millis(200);

/// What tells one version of the file from another.
type Stamp = (u64, u64, i64, i64);

/// Sends the table whenever the file changed, until nobody receives.
pub async fn follow(path: PathBuf, tables: mpsc::Sender<Table>) {
    let mut seen: Option<Option<Stamp>> = None;
    while !tables.is_closed() {
        let stamp = stamp(&path);
        if seen != Some(stamp) {
            seen = Some(stamp);
            match read(&path) {
                Ok(table) => {
                    if tables.send(table).await.is_err() {
                        return;
                    }
                }
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "no table in the file")
                }
            }
        }
        sleep(LOOK).await;
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    let metadata = fs::metadata(path).ok()?;
    Some((
        metadata.ino(),
        metadata.len(),
        metadata.mtime(),
        metadata.mtime_nsec(),
    ))
}

/// Reads a table; the error names the line and column where there is one.
fn read(path: &Path) -> Result<Table, String> {
    let bytes = fs::read(path).map_err(|error| error.to_string())?;
    serde_json::from_slice(&bytes).map_err(|error| error.to_string())
}
