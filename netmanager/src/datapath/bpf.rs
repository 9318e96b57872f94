//! [`Datapath`] over pinned eBPF maps and programs.
//!
//! ```text
//!  <bpffs>/v<LAYOUT_VERSION>/maps/NAME          every map; kept by name, whoever runs
//!                           /programs/NAME      the dispatchers, loaded once and then kept
//!                           /links/IFINDEX      a TCX link per device
//!
//!  device --TCX ingress--> dispatcher --tail call--> PROGRAMS[slot] --> the program of the running version
//! ```
//!
//! A restarted or upgraded daemon loads its own programs, which use the maps that are there, and puts them
//! into the slots of `PROGRAMS`: one write moves the whole node, and links are never touched. Where the kernel
//! has no TCX, the dispatcher is a classifier of the device's clsact qdisc, which needs no pin. The pin of
//! `PROGRAMS` is never removed while a device carries a dispatcher: its slots would be emptied at once.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::PathBuf,
};

use aya::{
    maps::{Array, HashMap, MapData, MapError, MapInfo, ProgramArray},
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType,
        links::{FdLink, PinnedLink},
        tc::{self, NlOptions, TcAttachOptions, TcError, TcHandle},
    },
};
use ebpf_common::layout::{
    Addr, Backend, Config, Endpoint, LAYOUT_VERSION, PROGRAM_POD, PROGRAM_TUNNEL, Vip, VipKey,
};
use nix::net::if_::if_indextoname;

use super::{
    Counts, Datapath, DatapathError, FlowTable, Hook, Reasons, bpffs,
    object::{
        MAPS, check_layout, load, load_program, map_error, map_path, open_map, program_error,
        take_over_dispatcher,
    },
    raw::Raw,
};
use crate::plan::{Capacity, KernelState, Op};

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

/// How much the maps hold; a map that is pinned already keeps its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
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
    /// Sizes of maps that are made now.
    pub sizes: Sizes,
}

/// See the module.
pub struct BpfDatapath {
    directory: PathBuf,
    mode: HookMode,
    dispatchers: BTreeMap<Hook, SchedClassifier>,
    /// Devices that carry a classifier, in [`HookMode::Clsact`].
    classifiers: BTreeSet<u32>,
    config: Array<MapData, Raw<Config>>,
    endpoints: HashMap<MapData, u32, Raw<Endpoint>>,
    local: HashMap<MapData, Raw<Addr>, Raw<Endpoint>>,
    vips: HashMap<MapData, Raw<VipKey>, Raw<Vip>>,
    slots: Array<MapData, u32>,
    backends: Array<MapData, Raw<Backend>>,
    counts: Counts,
    /// Held, because an array of programs is emptied when its last holder in user space goes.
    _programs: ProgramArray<MapData>,
}

impl Hook {
    const ALL: [Self; 2] = [Self::Pod, Self::Tunnel];

    /// The dispatcher, the program it tail-calls, and the slot between them.
    const fn names(self) -> (&'static str, &'static str, u32) {
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
    /// When there is no BPF file system, a pinned map has another layout, or the kernel refuses a program.
    pub fn open(options: &Options) -> Result<Self, DatapathError> {
        bpffs::ensure(&options.bpffs)?;
        let directory = options.bpffs.join(format!("v{LAYOUT_VERSION}"));
        for folder in ["maps", "programs", "links"] {
            bpffs::directory(&directory.join(folder))?;
        }
        check_layout(&directory)?;
        let mut object = load(&directory, options.sizes)?;
        let mut programs: ProgramArray<MapData> = open_map(&directory, "PROGRAMS")?;
        let mut dispatchers = BTreeMap::new();
        for hook in Hook::ALL {
            let (dispatcher, program, slot) = hook.names();
            let program_fd = load_program(&mut object, program)?;
            let fd = program_fd
                .fd()
                .map_err(|source| program_error("load", program, source))?;
            programs
                .set(slot, fd, 0)
                .map_err(|source| map_error("PROGRAMS", "switch", source))?;
            let pin = directory.join("programs").join(dispatcher);
            dispatchers.insert(hook, take_over_dispatcher(&mut object, dispatcher, &pin)?);
        }
        Ok(Self {
            mode: options.mode,
            dispatchers,
            classifiers: BTreeSet::new(),
            config: open_map(&directory, "CONFIG")?,
            endpoints: open_map(&directory, "ENDPOINTS")?,
            local: open_map(&directory, "LOCAL")?,
            vips: open_map(&directory, "VIPS")?,
            slots: open_map(&directory, "SLOTS")?,
            backends: open_map(&directory, "BACKENDS")?,
            counts: Counts::open(&directory)?,
            _programs: programs,
            directory,
        })
    }

    /// How much the planner may give out.
    #[must_use]
    pub fn capacity(&self) -> Capacity {
        Capacity {
            backends: self.backends.len(),
            slots: self.slots.len(),
            counters: self.counts.len(),
        }
    }

    /// The flow maps, for the janitor: established TCP, and the rest.
    ///
    /// # Errors
    /// When they cannot be opened.
    pub fn flow_tables(&self) -> Result<[FlowTable; 2], DatapathError> {
        let open = |name| FlowTable::open(name, &map_path(&self.directory, name));
        Ok([open("FLOWS")?, open("FLOWS_LRU")?])
    }

    /// The packet counters, for the metrics.
    ///
    /// # Errors
    /// When they cannot be opened.
    pub fn reasons(&self) -> Result<Reasons, DatapathError> {
        Reasons::open(&self.directory)
    }

    /// The counters by VIP and backend, for the metrics.
    ///
    /// # Errors
    /// When they cannot be opened.
    pub fn counts(&self) -> Result<Counts, DatapathError> {
        Counts::open(&self.directory)
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
            .filter_map(|(name, _, _)| {
                let info = MapInfo::from_pin(map_path(&self.directory, name)).ok()?;
                Some((name, info.max_entries()))
            })
            .collect()
    }

    /// Forgets the links of devices that are not in `present`: their pins would stay for ever.
    ///
    /// # Errors
    /// When the pins cannot be listed or removed.
    pub fn forget_links(&self, present: &BTreeSet<u32>) -> Result<(), DatapathError> {
        let folder = self.directory.join("links");
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
        self.directory.join("links").join(ifindex.to_string())
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
        let mut state = KernelState::default();
        let config = self
            .config
            .get(&0, 0)
            .map_err(|e| map_error("CONFIG", "be read", e))?
            .0;
        state.config = (config != Config::default()).then_some(config);
        state.endpoints = entries(
            "ENDPOINTS",
            self.endpoints.iter(),
            |key| key,
            |value| value.0,
        )?;
        state.local = entries("LOCAL", self.local.iter(), |key| key.0, |value| value.0)?;
        state.vips = entries("VIPS", self.vips.iter(), |key| key.0, |value| value.0)?;
        for (index, backend) in self.backends.iter().enumerate() {
            let backend = backend.map_err(|e| map_error("BACKENDS", "be read", e))?.0;
            if backend != Backend::default() {
                state.backends.insert(index as u32, backend);
            }
        }
        for vip in state.vips.values().filter(|vip| vip.slot_count > 0) {
            if state.runs.contains_key(&vip.slot_base) {
                continue;
            }
            let slots = (vip.slot_base..vip.slot_base.saturating_add(vip.slot_count))
                .map(|slot| self.slots.get(&slot, 0))
                .collect::<Result<Vec<u32>, MapError>>()
                .map_err(|e| map_error("SLOTS", "be read", e))?;
            state.runs.insert(vip.slot_base, slots);
        }
        Ok(state)
    }

    fn apply(&mut self, op: &Op) -> Result<(), DatapathError> {
        match op {
            Op::Config(config) => self
                .config
                .set(0, Raw(config.unwrap_or_default()), 0)
                .map_err(|e| map_error("CONFIG", "be written", e)),
            Op::Endpoint(key, value) => put("ENDPOINTS", &mut self.endpoints, *key, value.map(Raw)),
            Op::Local(key, value) => put("LOCAL", &mut self.local, Raw(*key), value.map(Raw)),
            Op::Vip(key, value) => put("VIPS", &mut self.vips, Raw(*key), value.map(Raw)),
            Op::Backend(index, value) => self
                .backends
                .set(*index, Raw(value.unwrap_or_default()), 0)
                .map_err(|e| map_error("BACKENDS", "be written", e)),
            Op::Run(base, slots) => write_run(&mut self.slots, *base, slots.iter().copied()),
            Op::DropRun(base, length) => write_run(
                &mut self.slots,
                *base,
                std::iter::repeat_n(0, *length as usize),
            ),
        }
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

fn entries<K, V, A: Ord, B>(
    name: &'static str,
    all: impl Iterator<Item = Result<(K, V), MapError>>,
    key: impl Fn(K) -> A,
    value: impl Fn(V) -> B,
) -> Result<BTreeMap<A, B>, DatapathError> {
    all.map(|entry| entry.map(|(k, v)| (key(k), value(v))))
        .collect::<Result<_, MapError>>()
        .map_err(|source| map_error(name, "be read", source))
}

fn put<K: aya::Pod, V: aya::Pod>(
    name: &'static str,
    map: &mut HashMap<MapData, K, V>,
    key: K,
    value: Option<V>,
) -> Result<(), DatapathError> {
    let Some(value) = value else {
        return match map.remove(&key) {
            Err(MapError::KeyNotFound) => Ok(()),
            Err(MapError::SyscallError(error)) if is_enoent(&error.io_error) => Ok(()),
            result => result.map_err(|source| map_error(name, "remove an entry", source)),
        };
    };
    map.insert(key, value, 0)
        .map_err(|source| map_error(name, "take an entry", source))
}

fn write_run(
    slots: &mut Array<MapData, u32>,
    base: u32,
    content: impl Iterator<Item = u32>,
) -> Result<(), DatapathError> {
    for (offset, backend) in content.enumerate() {
        slots
            .set(base + offset as u32, backend, 0)
            .map_err(|source| map_error("SLOTS", "be written", source))?;
    }
    Ok(())
}

fn link_name(ifindex: u32) -> Result<String, DatapathError> {
    if_indextoname(ifindex)
        .ok()
        .and_then(|name| name.into_string().ok())
        .ok_or(DatapathError::NoLink { ifindex })
}

fn is_enoent(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOENT)
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
