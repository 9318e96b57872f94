//! Splicing connections within the node, where the operator names a cgroup and both services asked for it.
//!
//! ```text
//!  <bpffs>/links/splice             the link of weft_splice_sock to the cgroup
//!         /v<LAYOUT>/maps/SPLICE_...  SPLICE_SOCKETS holds weft_splice_message
//! ```
//!
//! Both outlive the daemon: connections that are spliced stay so while it is away, and new ones become so.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    maps::{Array, MapData, MapInfo, SockHash},
    programs::{
        CgroupAttachMode, SkMsg, SockOps,
        links::{FdLink, PinnedLink},
    },
    util::KernelVersion,
};
use ebpf_common::splice::Offsets;

use super::{
    DatapathError, bpffs,
    btf::{Btf, BtfError},
    object::{map_error, open_map, patiently, program_error},
    places::FLOWS_DIRECT,
    raw::Raw,
    stem,
};

/// The first kernel that counts bytes handed to a socket as its receive memory (`bpf_tcp_ingress`; measured on 6.18), without
/// which nothing holds a sender back.
const OLDEST: KernelVersion = KernelVersion::new(6, 13, 0);
/// The running kernel's types.
const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";
const OFFSETS: &str = "SPLICE_OFFSETS";
const SOCKETS: &str = "SPLICE_SOCKETS";
const SOCK: &str = "weft_splice_sock";
const MESSAGE: &str = "weft_splice_message";

/// Why connections are not spliced.
#[derive(Debug, thiserror::Error)]
pub enum SpliceError {
    /// The kernel does not hold a sender back.
    #[error("it needs Linux 6.13 or later: an older one holds no sender back")]
    TooOld,
    /// The kernel does not say where it keeps what the programs must read.
    #[error("{KERNEL_BTF} does not serve")]
    Types(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The cgroup cannot be opened.
    #[error("{} is no folder of the cgroup v2 hierarchy", path.display())]
    Cgroup {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The kernel refuses.
    #[error(transparent)]
    Datapath(#[from] Box<DatapathError>),
}

impl From<DatapathError> for SpliceError {
    fn from(error: DatapathError) -> Self {
        Self::Datapath(Box::new(error))
    }
}

fn link_pin(bpffs: &Path) -> PathBuf {
    stem::links(bpffs).join("splice")
}

/// Splices from now on what the cgroup's processes connect.
pub(super) fn start(
    object: &mut Ebpf,
    (bpffs, maps): (&Path, &Path),
    cgroup: &Path,
) -> Result<(), SpliceError> {
    if KernelVersion::current().is_ok_and(|running| running < OLDEST) {
        return Err(SpliceError::TooOld);
    }
    let cgroup = File::open(cgroup).map_err(|source| SpliceError::Cgroup {
        path: cgroup.to_owned(),
        source,
    })?;
    let offsets = Offsets {
        maps: identity(maps)?,
        ..kernel_offsets()?
    };
    hold_messages(object, maps)?;
    write(maps, offsets)?;
    Ok(watch(object, bpffs, &cgroup)?)
}

/// No further connection is spliced, and what is written from now on to those that are goes by TCP.
pub(super) fn stop(bpffs: &Path, maps: &Path) -> Result<(), DatapathError> {
    bpffs::unpin(&link_pin(bpffs))?;
    if maps.join(OFFSETS).exists() {
        write(maps, Offsets::default())?;
    }
    Ok(())
}

fn write(maps: &Path, offsets: Offsets) -> Result<(), DatapathError> {
    let mut map: Array<MapData, Raw<Offsets>> = open_map(&maps.join(OFFSETS), OFFSETS)?;
    map.set(0, Raw(offsets), 0)
        .map_err(|source| map_error(OFFSETS, "be written", source))
}

/// A number for the maps that a spliced connection's programs read and count in. They keep those with which they were
/// loaded: once a daemon has moved to others, what they read is old.
fn identity(maps: &Path) -> Result<u32, DatapathError> {
    ["BACKENDS", FLOWS_DIRECT, "FLOWS", "FLOWS_LRU", "VIP_COUNTS"]
        .into_iter()
        .try_fold(0_u32, |all, name| {
            let info = MapInfo::from_pin(maps.join(name))
                .map_err(|source| map_error(name, "be asked", source))?;
            Ok(all.rotate_left(8) ^ info.id())
        })
}

fn kernel_offsets() -> Result<Offsets, SpliceError> {
    let bytes = fs::read(KERNEL_BTF).map_err(|error| SpliceError::Types(error.into()))?;
    let read = || -> Result<Offsets, BtfError> {
        let btf = Btf::parse(&bytes)?;
        Ok(Offsets {
            maps: 0,
            write_seq: btf.offset("tcp_sock", &["write_seq"])?,
            rmem_alloc: btf.offset("sock", &["sk_backlog", "rmem_alloc"])?,
            ulp: btf.offset("inet_connection_sock", &["icsk_ulp_ops"])?,
        })
    };
    read().map_err(|error| SpliceError::Types(error.into()))
}

/// Lets the map of sockets hold the program for their messages; a predecessor's is replaced at once.
fn hold_messages(object: &mut Ebpf, maps: &Path) -> Result<(), DatapathError> {
    let failed = |what| move |source| program_error(what, MESSAGE, source);
    let sockets: SockHash<MapData, u64> = open_map(&maps.join(SOCKETS), SOCKETS)?;
    let fd = sockets.fd();
    let fd = fd.try_clone().map_err(|source| DatapathError::File {
        what: "hold",
        path: maps.join(SOCKETS),
        source,
    })?;
    let program: &mut SkMsg = object
        .program_mut(MESSAGE)
        .ok_or(DatapathError::Missing(MESSAGE))?
        .try_into()
        .map_err(failed("use"))?;
    patiently(|| program.load()).map_err(failed("load"))?;
    let link = program
        .attach(&fd)
        .and_then(|id| program.take_link(id))
        .map_err(failed("attach"))?;
    // Dropped, it would be detached; it is meant to outlive this process.
    std::mem::forget(link);
    Ok(())
}

/// Links the program for the cgroup's sockets; a predecessor's link goes once the new one is there.
fn watch(object: &mut Ebpf, bpffs: &Path, cgroup: &File) -> Result<(), DatapathError> {
    let failed = |what| move |source| program_error(what, SOCK, source);
    let program: &mut SockOps = object
        .program_mut(SOCK)
        .ok_or(DatapathError::Missing(SOCK))?
        .try_into()
        .map_err(failed("use"))?;
    patiently(|| program.load()).map_err(failed("load"))?;
    let link = program
        .attach(cgroup, CgroupAttachMode::Single)
        .and_then(|id| program.take_link(id))
        .map_err(failed("attach"))?;
    let link: FdLink = link.try_into().expect("this kernel attaches by links");
    let pin = link_pin(bpffs);
    bpffs::unpin(&pin)?;
    let pinned: PinnedLink = link
        .pin(&pin)
        .map_err(|source| DatapathError::Pin { path: pin, source })?;
    drop(pinned);
    Ok(())
}
