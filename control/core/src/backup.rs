//! Backups: the Knowledge Base as a file that a later version reads.
//!
//! ```text
//!  {"format":"weft-backup","version":1,"mesh":"demo",...,"checksum":"<FNV-1a 128 of the next line>"}
//!  {the Knowledge Base}
//! ```
//!
//! Two lines of JSON. The checksum is over the bytes of the second, so that a field which a later version adds does
//! not break it. The memory of idempotency keys is not in it.

use serde::{Deserialize, Serialize};

use crate::{base::KnowledgeBase, command::LEVEL, once::digest};

/// What the first line says a file is.
const FORMAT: &str = "weft-backup";
/// The version of the form that is written here.
const VERSION: u32 = 1;

/// The first line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// `weft-backup`.
    pub format: String,
    /// Version of the form.
    pub version: u32,
    /// The mesh.
    pub mesh: String,
    /// Its incarnation when the backup was taken.
    pub incarnation: u64,
    /// The last log entry that is in it.
    pub index: u64,
    /// The feature level that reads it.
    pub level: u32,
    /// Log time when it was taken.
    pub taken_ms: u64,
    /// Of the second line.
    pub checksum: String,
}

/// Why a file is not taken for a backup.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackupError {
    /// It is something else.
    #[error("it is not a backup of weft backup: {0}")]
    Other(String),
    /// It was written by a later version.
    #[error(
        "it has version {version} and feature level {level}, this weft reads {VERSION} and {LEVEL}: upgrade the leads first"
    )]
    Newer {
        /// Its version.
        version: u32,
        /// Its feature level.
        level: u32,
    },
    /// It is damaged.
    #[error("it is damaged: its checksum is {found}, not {said}")]
    Damaged {
        /// Of what is there.
        found: String,
        /// What its header says.
        said: String,
    },
}

fn checksum(body: &[u8]) -> String {
    let [high, low] = digest(&[body]);
    format!("{high:016x}{low:016x}")
}

/// The backup of `base`; `None` where there is no mesh to back up.
#[must_use]
pub fn write(base: &KnowledgeBase) -> Option<String> {
    let mesh = base.mesh.as_ref()?;
    let body = serde_json::to_string(&base.sketch()).expect("the Knowledge Base is plain data");
    let header = Header {
        format: FORMAT.to_owned(),
        version: VERSION,
        mesh: mesh.name.clone(),
        incarnation: mesh.incarnation,
        index: base.index,
        level: base.level,
        taken_ms: base.log_time_ms,
        checksum: checksum(body.as_bytes()),
    };
    let header = serde_json::to_string(&header).expect("a header is plain data");
    Some(format!("{header}\n{body}\n"))
}

/// What is in a backup.
///
/// # Errors
/// When it is none, is damaged, or is of a later version.
pub fn read(text: &str) -> Result<(Header, KnowledgeBase), BackupError> {
    let other = |error: &dyn std::fmt::Display| BackupError::Other(error.to_string());
    let mut lines = text.lines();
    let header = lines.next().unwrap_or_default();
    let header: Header = serde_json::from_str(header).map_err(|error| other(&error))?;
    if header.format != FORMAT {
        return Err(other(&format!("its format is {:?}", header.format)));
    }
    if header.version > VERSION || header.level > LEVEL {
        return Err(BackupError::Newer {
            version: header.version,
            level: header.level,
        });
    }
    let body = lines.next().unwrap_or_default();
    let found = checksum(body.as_bytes());
    if found != header.checksum {
        return Err(BackupError::Damaged {
            found,
            said: header.checksum,
        });
    }
    let base = serde_json::from_str(body).map_err(|error| other(&error))?;
    Ok((header, base))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::{SHOP, World};

    #[test]
    fn what_was_written_is_read() {
        let mut world = World::new();
        world.apply(SHOP).unwrap();
        world.settle();
        let text = write(&world.kb).unwrap();
        let (header, base) = read(&text).unwrap();
        assert_eq!(base, world.kb.sketch());
        assert_eq!(
            (header.mesh.as_str(), header.index),
            ("test", world.kb.index)
        );
        assert_eq!(write(&KnowledgeBase::default()), None);
    }

    #[test]
    fn another_file_a_damaged_one_and_a_later_one_are_refused() {
        let text = write(&World::new().kb).unwrap();
        let damaged = text.replace("\"tables_index\":", "\"tables_index\":1");
        assert!(matches!(read(&damaged), Err(BackupError::Damaged { .. })));
        let later = text.replacen("\"version\":1", "\"version\":2", 1);
        assert!(matches!(read(&later), Err(BackupError::Newer { .. })));
        let level = text.replacen("\"level\":0", "\"level\":99", 1);
        assert!(matches!(read(&level), Err(BackupError::Newer { .. })));
        for other in [
            "",
            "{}",
            "apiVersion: weft.dev/v1alpha1",
            &text.replace(FORMAT, "tar"),
        ] {
            assert!(
                matches!(read(other), Err(BackupError::Other(_))),
                "{other:?}"
            );
        }
        let short = text.lines().next().unwrap();
        assert!(matches!(read(short), Err(BackupError::Damaged { .. })));
    }
}
