//! A lab's folder and manifest: all of its state, and enough to take it down.
//!
//! ```text
//!  /run/weft-lab/ID/manifest.json     written before anything else is made
//!                  /log/NAME.log      what the processes say
//!                  /ca  /credentials/NAME  /config  /lead/NAME  /agent/NAME  /node/NAME
//!                  /bpf               a bpffs of the lab's own
//! ```

use std::{
    fs,
    hash::{BuildHasher, Hasher, RandomState},
    io::ErrorKind,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    error::LabError,
    process::{self, ProcessId},
    spec::Spec,
};

/// Where labs are kept.
pub(crate) const LABS: &str = "/run/weft-lab";

/// What a lab's manifest says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) spec: Spec,
    /// The process whose end makes the lab a dead one; none once it stands on its own.
    pub(crate) owner: Option<ProcessId>,
    /// Where the product's binaries are.
    pub(crate) binaries: PathBuf,
    /// What was started, so that it can be started again.
    pub(crate) programs: Vec<Program>,
}

/// A program of the lab, running or not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Program {
    /// The machine it runs on; the program's name too.
    pub(crate) machine: String,
    /// The binary's name and its arguments.
    pub(crate) command: Vec<String>,
}

/// A lab by its ID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lab {
    pub(crate) id: String,
    pub(crate) dir: PathBuf,
}

impl Lab {
    /// Makes a folder with a new ID and writes its manifest.
    pub(crate) fn create(manifest: &Manifest) -> Result<Self, LabError> {
        fs::create_dir_all(LABS).map_err(LabError::file(LABS))?;
        loop {
            let lab = Self::of(&random_id());
            match fs::create_dir(&lab.dir) {
                Ok(()) => {
                    lab.write(manifest)?;
                    return Ok(lab);
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(LabError::file(&lab.dir)(error)),
            }
        }
    }

    fn of(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            dir: Path::new(LABS).join(id),
        }
    }

    /// Every lab that has a folder, by ID.
    pub(crate) fn all() -> Result<Vec<Self>, LabError> {
        let entries = match fs::read_dir(LABS) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(LabError::file(LABS)(error)),
        };
        let mut labs: Vec<Self> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .map(|id| Self::of(&id))
            .collect();
        labs.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(labs)
    }

    /// The lab of this ID, or the only one that is not dead.
    pub(crate) fn find(id: Option<&str>) -> Result<Self, LabError> {
        let labs = Self::all()?;
        if let Some(id) = id {
            return labs
                .into_iter()
                .find(|lab| lab.id == id)
                .ok_or_else(|| LabError::NoLab { id: id.to_owned() });
        }
        let mut live: Vec<Self> = labs.into_iter().filter(|lab| !lab.is_dead()).collect();
        if live.len() == 1 {
            return Ok(live.remove(0));
        }
        Err(LabError::WhichLab {
            count: live.len(),
            ids: ids(&live),
        })
    }

    /// Whether its owner is gone, or its manifest was never finished.
    pub(crate) fn is_dead(&self) -> bool {
        match self.manifest() {
            Ok(manifest) => manifest.owner.is_some_and(|owner| !process::lives(owner)),
            Err(_) => true,
        }
    }

    /// Reads the manifest.
    pub(crate) fn manifest(&self) -> Result<Manifest, LabError> {
        let path = self.path("manifest.json");
        let text = fs::read(&path).map_err(LabError::file(&path))?;
        serde_json::from_slice(&text).map_err(|source| LabError::Manifest { path, source })
    }

    /// Replaces the manifest at once.
    pub(crate) fn write(&self, manifest: &Manifest) -> Result<(), LabError> {
        let path = self.path("manifest.json");
        let new = self.path("manifest.new");
        let text = serde_json::to_vec_pretty(manifest).map_err(|source| LabError::Manifest {
            path: path.clone(),
            source,
        })?;
        fs::write(&new, text).map_err(LabError::file(&new))?;
        fs::rename(&new, &path).map_err(LabError::file(&path))
    }

    /// A path inside the folder.
    pub(crate) fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        self.dir.join(inside)
    }

    /// A folder inside, made if it is not there.
    pub(crate) fn folder(&self, inside: impl AsRef<Path>) -> Result<PathBuf, LabError> {
        let path = self.path(inside);
        fs::create_dir_all(&path).map_err(LabError::file(&path))?;
        Ok(path)
    }

    /// The namespace of a machine or of an attached pod.
    pub(crate) fn netns(&self, machine: &str) -> String {
        format!("{}{machine}", self.prefix())
    }

    /// What the names of the lab's namespaces begin with.
    pub(crate) fn prefix(&self) -> String {
        format!("weft-{}-", self.id)
    }
}

/// The IDs of labs, for people.
pub(crate) fn ids(labs: &[Lab]) -> String {
    let ids: Vec<_> = labs.iter().map(|lab| lab.id.as_str()).collect();
    ids.join(", ")
}

/// Four letters and digits that start with a letter.
fn random_id() -> String {
    let mut random = RandomState::new().build_hasher().finish();
    let mut id = String::new();
    for alphabet in [&b"bcdfghjkmnpqrstvwxz"[..], b"bcdfghjkmnpqrstvwxz23456789"]
        .into_iter()
        .cycle()
        .take(4)
    {
        let length = alphabet.len() as u64;
        id.push(char::from(
            alphabet[usize::try_from(random % length).unwrap_or(0)],
        ));
        random /= length;
    }
    id
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_four_lower_case_letters_and_digits_and_begins_with_a_letter() {
        for _ in 0..1000 {
            let id = random_id();
            assert_eq!(id.len(), 4, "{id}");
            assert!(
                id.starts_with(|first: char| first.is_ascii_lowercase()),
                "{id}"
            );
            assert!(
                id.bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
            );
        }
    }
}
