//! The BPF file system that outlives the daemon.

use std::{
    fs::{self, File, TryLockError},
    io,
    path::Path,
};

use ebpf_common::layout::LAYOUT_VERSION;
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use super::DatapathError;
use crate::store::holder;

/// Makes `path` a directory on a BPF file system: a folder of one that is there, else one mounted on `path`.
pub(super) fn ensure(path: &Path) -> Result<(), DatapathError> {
    let failed = |source: io::Error| DatapathError::NoBpffs {
        path: path.to_owned(),
        source,
    };
    fs::create_dir_all(path).map_err(failed)?;
    if is_bpffs(path).map_err(failed)? {
        return Ok(());
    }
    mount(
        Some("bpf"),
        path,
        Some("bpf"),
        MsFlags::empty(),
        None::<&str>,
    )
    .map_err(|errno| failed(errno.into()))?;
    tracing::info!(path = %path.display(), "mounted a bpf file system");
    Ok(())
}

/// Takes the lock of a directory of pins, which is there: the node has one NetManager.
///
/// # Errors
/// When another process has it.
pub(super) fn lock(path: &Path) -> Result<File, DatapathError> {
    let failed = |source| DatapathError::File {
        what: "lock",
        path: path.to_owned(),
        source,
    };
    let directory = File::open(path).map_err(failed)?;
    match directory.try_lock() {
        Ok(()) => Ok(directory),
        Err(TryLockError::WouldBlock) => Err(DatapathError::InUse {
            path: path.to_owned(),
            pid: holder(&directory),
        }),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

/// Makes a directory below [`ensure`]d ones.
pub(super) fn directory(path: &Path) -> Result<(), DatapathError> {
    fs::create_dir_all(path).map_err(|source| DatapathError::File {
        what: "create the directory",
        path: path.to_owned(),
        source,
    })
}

/// Removes a pin; one that is not there is removed already.
pub(super) fn unpin(path: &Path) -> Result<(), DatapathError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(DatapathError::File {
            what: "remove the pin",
            path: path.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

/// Removes a directory with all pins below it; one that is not there is removed already.
pub(super) fn remove(path: &Path) -> Result<(), DatapathError> {
    match fs::remove_dir_all(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(DatapathError::File {
            what: "remove",
            path: path.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

/// Gives a directory another name.
pub(super) fn rename(from: &Path, to: &Path) -> Result<(), DatapathError> {
    fs::rename(from, to).map_err(|source| DatapathError::File {
        what: "rename",
        path: from.to_owned(),
        source,
    })
}

/// Removes everything that the daemon pinned, and the file system if it was mounted for that; forwarding
/// ends.
///
/// # Errors
/// When the pins cannot be removed.
pub fn remove_pins(path: &Path) -> Result<(), DatapathError> {
    for layout in 1..=LAYOUT_VERSION {
        remove(&path.join(format!("v{layout}")))?;
    }
    for folder in ["links", "programs"] {
        remove(&path.join(folder))?;
    }
    match umount2(path, MntFlags::MNT_DETACH) {
        // Not a mount point: a folder of a file system that others use too.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(errno) => Err(DatapathError::File {
            what: "unmount",
            path: path.to_owned(),
            source: errno.into(),
        }),
    }
}

fn is_bpffs(path: &Path) -> io::Result<bool> {
    Ok(statfs(path)?.filesystem_type() == BPF_FS_MAGIC)
}
