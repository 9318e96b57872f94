//! The kernel's side of forwarding: maps that are written, links that carry a program.
//!
//! [`BpfDatapath`] is the real one. What should stand in the maps is decided in [`plan`](crate::plan); which
//! links carry a program, by the daemon. Flows are the kernel's own and are only swept
//! ([`janitor`](crate::janitor)).

use std::{io, path::PathBuf};

use aya::{
    EbpfError,
    maps::MapError,
    pin::PinError,
    programs::{ProgramError, tc::TcError},
};

use crate::{
    plan::{KernelState, Op},
    store::process_of,
};

mod accounts;
mod batch;
mod bpf;
mod bpffs;
mod btf;
mod carry;
mod counts;
mod direct;
mod flow_table;
mod live;
mod log;
mod object;
mod peers;
mod places;
mod preflight;
mod raw;
mod reasons;
mod splice;
mod stem;
mod tables;
mod takeover;

pub use accounts::FlowAccounts;
pub use bpf::{BpfDatapath, HookMode, Options, Sizes};
pub use bpffs::remove_pins;
pub use counts::Counts;
pub use flow_table::FlowTable;
pub use log::{FlowLog, LogCounters, LogCounts};
pub use peers::Peers;
pub use places::Places;
pub use preflight::{Preflight, preflight};
pub use reasons::Reasons;
pub use splice::SpliceError;
pub use takeover::hand_back;

/// Which program a link carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    /// The host side of an endpoint: packets that come from it.
    Pod,
    /// The tunnel device: packets that come out of it.
    Tunnel,
}

/// What the daemon asks of the kernel.
pub trait Datapath {
    /// What the maps hold now.
    ///
    /// # Errors
    /// When a map cannot be read.
    fn state(&self) -> Result<KernelState, DatapathError>;

    /// Does writes, one after the other.
    ///
    /// # Errors
    /// When a map refuses one; those before it are done.
    fn apply(&mut self, ops: &[Op]) -> Result<(), DatapathError>;

    /// Makes a link carry its program; nothing happens where it does already.
    ///
    /// # Errors
    /// When the link is gone or the kernel refuses.
    fn attach(&mut self, ifindex: u32, hook: Hook) -> Result<(), DatapathError>;

    /// Whether a link carries its program.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    fn is_attached(&self, ifindex: u32, hook: Hook) -> Result<bool, DatapathError>;

    /// Forgets a link, whether it still exists or not.
    ///
    /// # Errors
    /// When what is pinned for it cannot be removed.
    fn detach(&mut self, ifindex: u32) -> Result<(), DatapathError>;
}

/// Why the kernel's side failed.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// The kernel is older than what Weft runs on.
    #[error("kernel {found} is too old: Weft needs Linux {needed} or later")]
    KernelTooOld {
        /// Its version.
        found: String,
        /// The oldest that serves.
        needed: &'static str,
    },
    /// The process may not do what it must.
    #[error(
        "missing capability {0}: run as root, or grant it to the container (securityContext.capabilities.add)"
    )]
    Capability(&'static str),
    /// There is no BPF file system where pins should go, and none can be mounted.
    #[error(
        "no bpf file system at {path}: mount one (mount -t bpf bpf {path}) or name another with --bpffs"
    )]
    NoBpffs {
        /// The path.
        path: PathBuf,
        /// Why it could not be mounted.
        #[source]
        source: io::Error,
    },
    /// Another daemon forwards by these pins.
    #[error(
        "another NetManager{} forwards by the pins in {path}: stop it, there is one on a node",
        process_of(*pid)
    )]
    InUse {
        /// The directory.
        path: PathBuf,
        /// Its process, where it can be seen from here.
        pid: Option<u32>,
    },
    /// A file or directory operation failed.
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
    /// More is in use than a configured size has room for.
    #[error(
        "{option} {given} is too small: {used} are in use on this node, give at least {used}, or leave the size until fewer are"
    )]
    NoRoom {
        /// The option.
        option: &'static str,
        /// What was given.
        given: u32,
        /// What is in use.
        used: u32,
    },
    /// No programs forward here.
    #[error(
        "nothing is pinned below {0}: no NetManager ever forwarded here, or another --bpffs is meant"
    )]
    NothingRuns(PathBuf),
    /// The object lacks a map or program.
    #[error("the kernel object has no {0}")]
    Missing(&'static str),
    /// The object cannot be loaded.
    #[error("failed to load the kernel object")]
    Load(#[source] Box<EbpfError>),
    /// A program cannot be loaded, attached or put into its slot.
    #[error("failed to {what} program {name}")]
    Program {
        /// What was tried.
        what: &'static str,
        /// Which program.
        name: &'static str,
        /// Why.
        #[source]
        source: Box<ProgramError>,
    },
    /// A program or link cannot be pinned.
    #[error("failed to pin {path}")]
    Pin {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: PinError,
    },
    /// Traffic control refuses.
    #[error("failed to prepare link {ifindex} for a classifier")]
    Tc {
        /// The link.
        ifindex: u32,
        /// Why.
        #[source]
        source: TcError,
    },
    /// The link does not exist.
    #[error("there is no link with index {ifindex} in this network namespace")]
    NoLink {
        /// The link.
        ifindex: u32,
    },
    /// A map refuses.
    #[error("map {map} refused to {what}")]
    Map {
        /// Which map.
        map: &'static str,
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: MapError,
    },
    /// A map refuses many entries at once.
    #[error("map {map} refused to {what}")]
    Batch {
        /// Which map.
        map: &'static str,
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}
