//! The BPF file system that outlives the daemon.

use std::{fs, io, path::Path};

use ebpf_common::layout::LAYOUT_VERSION;
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use super::DatapathError;

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

/// Removes everything that the daemon pinned, and the file system if it was mounted for that; forwarding
/// ends.
///
/// # Errors
/// When the pins cannot be removed.
pub fn remove_pins(path: &Path) -> Result<(), DatapathError> {
    let directory = path.join(format!("v{LAYOUT_VERSION}"));
    match fs::remove_dir_all(&directory) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            return Err(DatapathError::File {
                what: "remove",
                path: directory,
                source,
            });
        }
        _ => {}
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
