//! What outlives every version of the programs: the links, their dispatchers, and the slots that these call.
//!
//! ```text
//!  <bpffs>/links/IFINDEX                     a TCX link per device
//!         /programs/weft_dispatch_...        the dispatchers, loaded once and then kept
//!         /programs/PROGRAMS                 one tail-call slot per program: one update switches every link
//!         /v1/{links, programs, maps/PROGRAMS}  -> the same, where a NetManager of layout 1 looks for them
//! ```
//!
//! A NetManager of layout 1 had these in its own folder. They are moved out of it by renaming, and symbolic
//! links stay behind, so that it finds the switch again if it is brought back.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use super::{DatapathError, bpffs};

/// Name of the array of programs, as a map and as a pin.
pub(super) const PROGRAMS: &str = "PROGRAMS";

/// The folder of the links.
pub(super) fn links(bpffs: &Path) -> PathBuf {
    bpffs.join("links")
}

/// The pin of a dispatcher.
pub(super) fn dispatcher(bpffs: &Path, name: &str) -> PathBuf {
    bpffs.join("programs").join(name)
}

/// The pin of the array of programs.
pub(super) fn programs(bpffs: &Path) -> PathBuf {
    dispatcher(bpffs, PROGRAMS)
}

/// Makes the folders, takes over those of layout 1 and leaves it its way to them.
pub(super) fn ensure(bpffs: &Path) -> Result<(), DatapathError> {
    let first = bpffs.join("v1");
    bpffs::directory(&first.join("maps"))?;
    for (own, old, way) in [
        (links(bpffs), first.join("links"), "../links"),
        (
            bpffs.join("programs"),
            first.join("programs"),
            "../programs",
        ),
    ] {
        take(&own, &old)?;
        bpffs::directory(&own)?;
        leave(&old, way)?;
    }
    let old = first.join("maps").join(PROGRAMS);
    take(&programs(bpffs), &old)?;
    leave(&old, "../../programs/PROGRAMS")
}

/// Moves what a NetManager of layout 1 made, unless it was moved before.
fn take(own: &Path, old: &Path) -> Result<(), DatapathError> {
    let is_made = fs::symlink_metadata(old).is_ok_and(|found| !found.is_symlink());
    if !is_made || own.exists() {
        return Ok(());
    }
    fs::rename(old, own).map_err(|source| DatapathError::File {
        what: "move",
        path: old.to_owned(),
        source,
    })
}

fn leave(old: &Path, way: &str) -> Result<(), DatapathError> {
    match symlink(way, old) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => Err(DatapathError::File {
            what: "make the symbolic link",
            path: old.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}
