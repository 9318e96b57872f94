//! Network namespaces, and work inside them.
//!
//! A namespace belongs to a thread, so work inside another one has a thread of its own that ends with it; this
//! process's main thread never leaves the runtime's.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd, RawFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::Path,
};

use nix::{
    fcntl::OFlag,
    sched::{CloneFlags, setns},
    sys::statfs::{NSFS_MAGIC, fstatfs},
};
use rtnetlink::Handle;

use crate::error::Error;

/// An open network namespace.
#[derive(Debug)]
pub(crate) struct Netns(File);

impl Netns {
    /// Opens a namespace by its file.
    ///
    /// # Errors
    /// `NotFound` when there is no such file, `InvalidInput` when the file is not a namespace (any more).
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(path)?;
        if fstatfs(&file)?.filesystem_type() != NSFS_MAGIC {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is not a namespace",
            ));
        }
        Ok(Self(file))
    }

    /// Whether this is the namespace that the plugin was started in.
    pub(crate) fn is_own(&self) -> io::Result<bool> {
        let (this, own) = (self.0.metadata()?, std::fs::metadata("/proc/self/ns/net")?);
        Ok((this.dev(), this.ino()) == (own.dev(), own.ino()))
    }

    pub(crate) fn raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Runs `work` inside, with a netlink socket of that namespace.
    pub(crate) fn inside<T: Send>(
        &self,
        work: impl AsyncFnOnce(&Handle) -> Result<T, Error> + Send,
    ) -> Result<T, Error> {
        let enter = || {
            setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET)
                .map_err(|errno| Error::io("enter the pod's network namespace", errno.into()))?;
            runtime()?.block_on(async { work(&netlink()?).await })
        };
        std::thread::scope(|scope| {
            scope
                .spawn(enter)
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// A runtime for one thread.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, Error> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| Error::io("start a runtime", source))
}

/// A netlink socket of this thread's namespace, served by its runtime.
pub(crate) fn netlink() -> Result<Handle, Error> {
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(|source| Error::io("open a netlink socket", source))?;
    tokio::spawn(connection);
    Ok(handle)
}
