//! [`Datapath`] over pinned eBPF maps and programs.
//!
//! ```text
//!  device --TCX ingress--> dispatcher --tail call--> PROGRAMS[slot] --> the program of the running version
//!            (links/IFINDEX)  (programs/...)                             (over v<LAYOUT_VERSION>/maps/NAME)
//! ```
//!
//! A restarted or upgraded daemon loads its own programs, which use the maps that are there, and puts them into
//! the slots of `PROGRAMS` ([`takeover`]): one write moves the whole node, and links are never touched. Where the
//! kernel has no TCX, the dispatcher is a classifier of the device's clsact qdisc, which needs no pin. The pin of
//! `PROGRAMS` is never removed while a device carries a dispatcher: its slots would be emptied at once.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    path::PathBuf,
};

use aya::{
    maps::{MapData, MapInfo, ProgramArray},
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType,
        links::{FdLink, PinnedLink},
        tc::{self, NlOptions, TcAttachOptions, TcError, TcHandle},
    },
};
use ebpf_common::layout::{PROGRAM_POD, PROGRAM_TUNNEL};
use nix::net::if_::if_indextoname;

use super::{
    Counts, Datapath, DatapathError, FlowAccounts, FlowLog, FlowTable, Hook, LogCounters, Peers,
    Reasons, bpffs,
    live::Live,
    object::{MAPS, open_map, program_error, take_over_dispatcher},
    splice,
    stem::{self, PROGRAMS},
    tables::Tables,
    takeover,
};
use crate::{
    follow::chain,
    plan::{Capacity, KernelState, Op},
};

/// Priority and handle of the classifier where there is no TCX; fixed, so that a restart finds its own.
const CLSACT_PRIORITY: u16 = 0x5746;
const CLSACT_HANDLE: TcHandle = TcHandle::new(0, 1);

/// How a device carries the dispatcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookMode {
    /// A TCX link (Linux 6.6 and later).
    Tcx,
    /// A classifier of the clsact qdisc.
    Clsact,
}

/// How much the maps hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Entries of `ENDPOINTS`; `LOCAL` has twice as many.
    pub endpoints: u32,
    /// Elements of `BACKENDS`.
    pub backends: u32,
    /// Elements of `SLOTS`.
    pub slots: u32,
    /// Entries of `VIPS`.
    pub vips: u32,
    /// Entries of `FLOWS`; `FLOWS_LRU` has half as many.
    pub flows: u32,
}

/// Where and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// A directory on a BPF file system, or one on which to mount it.
    pub bpffs: PathBuf,
    /// How devices carry the dispatcher.
    pub mode: HookMode,
    /// Sizes of the maps; what is in maps of other sizes is moved.
    pub sizes: Sizes,
    /// The cgroup v2 folder whose processes' connections may be spliced; `None` splices none.
    pub splice: Option<PathBuf>,
}

/// See the module.
pub struct BpfDatapath {
    bpffs: PathBuf,
    _lock: File,
    maps: PathBuf,
    mode: HookMode,
    dispatchers: BTreeMap<Hook, SchedClassifier>,
    /// Devices that carry a classifier, in [`HookMode::Clsact`].
    classifiers: BTreeSet<u32>,
    tables: Tables,
    counts: Counts,
    /// Held, because an array of programs is emptied when its last holder in user space goes.
    _programs: ProgramArray<MapData>,
}

impl Hook {
    pub(super) const ALL: [Self; 2] = [Self::Pod, Self::Tunnel];

    /// The dispatcher, the program it tail-calls, and the slot between them.
    pub(super) const fn names(self) -> (&'static str, &'static str, u32) {
        match self {
            Self::Pod => ("weft_dispatch_pod", "weft_pod", PROGRAM_POD),
            Self::Tunnel => ("weft_dispatch_tunnel", "weft_tunnel", PROGRAM_TUNNEL),
        }
    }
}

impl BpfDatapath {
    /// Loads the programs over the maps that are pinned, or makes both, and switches the node to them.
    ///
    /// # Errors
    /// When there is no BPF file system, what is in use does not fit the sizes, or the kernel refuses a program.
    pub fn open(options: &Options) -> Result<Self, DatapathError> {
        let bpffs = options.bpffs.clone();
        bpffs::ensure(&bpffs)?;
        let lock = bpffs::lock(&bpffs)?;
        stem::ensure(&bpffs)?;
        let (mut object, maps) = takeover::take_over(&bpffs, &options.sizes)?;
        let mut dispatchers = BTreeMap::new();
        for hook in Hook::ALL {
            let (dispatcher, _, _) = hook.names();
            let pin = stem::dispatcher(&bpffs, dispatcher);
            dispatchers.insert(hook, take_over_dispatcher(&mut object, dispatcher, &pin)?);
        }
        match &options.splice {
            None => splice::stop(&bpffs, &maps)?,
            Some(cgroup) => match splice::start(&mut object, (&bpffs, &maps), cgroup) {
                Ok(()) => tracing::info!(cgroup = %cgroup.display(), "splicing within the node"),
                // What is not spliced goes by TCP, as ever.
                Err(error) => {
                    tracing::error!(error = chain(&error), "connections are not spliced");
                    // What a predecessor left would go by tables that nobody keeps.
                    splice::stop(&bpffs, &maps)?;
                }
            },
        }
        Ok(Self {
            mode: options.mode,
            dispatchers,
            classifiers: BTreeSet::new(),
            tables: Tables::open(&maps)?,
            counts: Counts::open(&maps)?,
            _programs: open_map(&stem::programs(&bpffs), PROGRAMS)?,
            bpffs,
            _lock: lock,
            maps,
        })
    }

    /// How much the planner may give out.
    ///
    /// # Errors
    /// When a map cannot be asked.
    pub fn capacity(&self) -> Result<Capacity, DatapathError> {
        self.tables.capacity(self.counts.len())
    }

    /// The flow maps, for the janitor: TCP, and the rest.
    ///
    /// # Errors
    /// When they cannot be opened.
    pub fn flow_tables(&self) -> Result<[FlowTable; 2], DatapathError> {
        Ok([
            FlowTable::connections(&self.maps)?,
            FlowTable::datagrams(&self.maps)?,
        ])
    }

    /// The accounts of the endpoints' flows.
    ///
    /// # Errors
    /// When they cannot be opened.
    pub fn flow_accounts(&self) -> Result<FlowAccounts, DatapathError> {
        FlowAccounts::open(&self.maps)
    }

    /// The packet counters, for the metrics.
    ///
    /// # Errors
    /// When they cannot be opened.
    pub fn reasons(&self) -> Result<Reasons, DatapathError> {
        Reasons::open(&self.maps)
    }

    /// What the paths to the peers carry.
    ///
    /// # Errors
    /// When the map cannot be opened.
    pub fn peers(&self) -> Result<Peers, DatapathError> {
        Peers::open(&self.maps)
    }

    /// The counters by VIP and backend, for the metrics.
    ///
    /// # Errors
    /// When they cannot be opened.
    pub fn counts(&self) -> Result<Counts, DatapathError> {
        Counts::open(&self.maps)
    }

    /// The reading end of the flow log. It has one position: whoever opens it must be the only one.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn flow_log(&self) -> Result<FlowLog, DatapathError> {
        FlowLog::open(&self.maps)
    }

    /// What became of the flow log's events.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn log_counters(&self) -> Result<LogCounters, DatapathError> {
        LogCounters::open(&self.maps)
    }

    /// The maps as they stand, for a trace.
    ///
    /// # Errors
    /// When they cannot be opened.
    pub fn live(&self) -> Result<Live, DatapathError> {
        Live::open(&self.maps)
    }

    /// Starts the counts of new owners from zero: elements of `VIP_COUNTS`, and indexes of backends.
    ///
    /// # Errors
    /// When a map cannot be written.
    pub fn reset_counts(&mut self, vips: &[u32], backends: &[u32]) -> Result<(), DatapathError> {
        self.counts.reset(vips, backends)
    }

    /// The capacity of every map, by its name.
    #[must_use]
    pub fn map_sizes(&self) -> BTreeMap<&'static str, u32> {
        MAPS.into_iter()
            // Its size is in bytes.
            .filter(|(name, _, _)| *name != "LOG")
            .filter_map(|(name, _, _)| {
                let path = if name == PROGRAMS {
                    stem::programs(&self.bpffs)
                } else {
                    self.maps.join(name)
                };
                let info = MapInfo::from_pin(path).ok()?;
                Some((name, info.max_entries()))
            })
            .collect()
    }

    /// Forgets the links of devices that are not in `present`: their pins would stay for ever.
    ///
    /// # Errors
    /// When the pins cannot be listed or removed.
    pub fn forget_links(&self, present: &BTreeSet<u32>) -> Result<(), DatapathError> {
        let folder = stem::links(&self.bpffs);
        let failed = |source| DatapathError::File {
            what: "list",
            path: folder.clone(),
            source,
        };
        for entry in fs::read_dir(&folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let ifindex = entry.file_name().to_string_lossy().parse();
            if ifindex.is_ok_and(|ifindex| !present.contains(&ifindex)) {
                bpffs::unpin(&entry.path())?;
            }
        }
        Ok(())
    }

    fn link_pin(&self, ifindex: u32) -> PathBuf {
        stem::links(&self.bpffs).join(ifindex.to_string())
    }

    fn dispatcher(&mut self, hook: Hook) -> &mut SchedClassifier {
        self.dispatchers
            .get_mut(&hook)
            .expect("`open` inserts every hook")
    }

    fn attach_tcx(&mut self, ifindex: u32, name: &str, hook: Hook) -> Result<(), DatapathError> {
        let pin = self.link_pin(ifindex);
        // What is pinned for this index but not attached is of a device that is gone.
        bpffs::unpin(&pin)?;
        let (label, _, _) = hook.names();
        let program = self.dispatcher(hook);
        let order = TcAttachOptions::TcxOrder(LinkOrder::default());
        let pinned = program
            .attach_with_options(name, TcAttachType::Ingress, order)
            .and_then(|id| program.take_link(id))
            .map_err(|source| program_error("attach", label, source))?;
        let link: FdLink = pinned.try_into().expect("a TCX attachment is a link");
        let pinned: PinnedLink = link
            .pin(&pin)
            .map_err(|source| DatapathError::Pin { path: pin, source })?;
        drop(pinned);
        Ok(())
    }

    fn attach_clsact(&mut self, ifindex: u32, name: &str, hook: Hook) -> Result<(), DatapathError> {
        match tc::qdisc_add_clsact(name) {
            Ok(()) => {}
            Err(error) if errno_of(&error) == Some(libc::EEXIST) => {}
            Err(source) => return Err(DatapathError::Tc { ifindex, source }),
        }
        let (label, _, _) = hook.names();
        let program = self.dispatcher(hook);
        let options = NlOptions {
            priority: CLSACT_PRIORITY,
            handle: CLSACT_HANDLE,
            ..NlOptions::default()
        };
        match program.attach_with_options(
            name,
            TcAttachType::Ingress,
            TcAttachOptions::Netlink(options),
        ) {
            Ok(id) => {
                let link = program
                    .take_link(id)
                    .map_err(|source| program_error("attach", label, source))?;
                // Dropped, it would be detached; it is meant to outlive this process.
                std::mem::forget(link);
                Ok(())
            }
            Err(ProgramError::TcError(error)) if errno_of(&error) == Some(libc::EEXIST) => Ok(()),
            Err(source) => Err(program_error("attach", label, source)),
        }
    }
}

impl Datapath for BpfDatapath {
    fn state(&self) -> Result<KernelState, DatapathError> {
        self.tables.state()
    }

    fn apply(&mut self, ops: &[Op]) -> Result<(), DatapathError> {
        self.tables.apply(ops)
    }

    fn attach(&mut self, ifindex: u32, hook: Hook) -> Result<(), DatapathError> {
        if self.is_attached(ifindex, hook)? {
            return Ok(());
        }
        let name = link_name(ifindex)?;
        match self.mode {
            HookMode::Tcx => self.attach_tcx(ifindex, &name, hook),
            HookMode::Clsact => {
                self.attach_clsact(ifindex, &name, hook)?;
                self.classifiers.insert(ifindex);
                Ok(())
            }
        }
    }

    fn is_attached(&self, ifindex: u32, hook: Hook) -> Result<bool, DatapathError> {
        let name = link_name(ifindex)?;
        let (label, _, _) = hook.names();
        match self.mode {
            HookMode::Tcx => {
                let ask = |source| program_error("ask for", label, source);
                let own = self.dispatchers[&hook].info().map_err(ask)?.id();
                let (_, programs) =
                    SchedClassifier::query_tcx(&name, TcAttachType::Ingress).map_err(ask)?;
                let is_there = programs.iter().any(|program| program.id() == own);
                Ok(is_there && self.link_pin(ifindex).exists())
            }
            // aya does not list classifiers, but attaching one that is there says so.
            HookMode::Clsact => Ok(self.classifiers.contains(&ifindex)),
        }
    }

    fn detach(&mut self, ifindex: u32) -> Result<(), DatapathError> {
        bpffs::unpin(&self.link_pin(ifindex))?;
        if self.classifiers.remove(&ifindex)
            && let Ok(name) = link_name(ifindex)
        {
            for hook in Hook::ALL {
                match tc::qdisc_detach_program(&name, TcAttachType::Ingress, hook.names().0) {
                    Err(error) if !is_absent(&error) => {
                        return Err(DatapathError::Tc {
                            ifindex,
                            source: error,
                        });
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

fn link_name(ifindex: u32) -> Result<String, DatapathError> {
    if_indextoname(ifindex)
        .ok()
        .and_then(|name| name.into_string().ok())
        .ok_or(DatapathError::NoLink { ifindex })
}

/// The operating system's error number behind a refusal of traffic control.
fn errno_of(error: &TcError) -> Option<i32> {
    match error {
        TcError::NetlinkError(error) => error.raw_os_error(),
        TcError::IoError(error) => error.raw_os_error(),
        _ => None,
    }
}

fn is_absent(error: &TcError) -> bool {
    matches!(error, TcError::IoError(error) if error.kind() == io::ErrorKind::NotFound)
        || matches!(errno_of(error), Some(libc::ENOENT | libc::EINVAL))
}
