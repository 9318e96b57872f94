//! Puts a version's programs in charge of a node, with all that its predecessor left.
//!
//! ```text
//!  <bpffs>/v<LAYOUT>/maps/NAME    the maps of the running version
//!                   /next/NAME    those that it is about to move to
//! ```
//!
//! Where the maps are of this layout and of the wanted sizes, the programs are loaded over them, and nothing
//! moves. Else new maps are made beside, those that did not change are shared, the rest is copied, and the slots of
//! `PROGRAMS` are switched: one update for all links. Flows begin all the time, so they are copied in passes:
//!
//! ```text
//!  all ---- hold ---- exact ---- switch ---- late ---- release
//! ```
//!
//! While a node holds ([`CONFIG_HOLD_NEW`]), a packet that would begin a flow goes back to the end of its link's
//! queue: it waits for the milliseconds that the exact pass takes, and is lost to nobody. The programs of layout 1
//! cannot hold; what begins there between the exact pass and the switch is found missing by the programs of this
//! layout, which let its packets wait in the same way ([`CONFIG_HOLD_UNKNOWN`]) until the late pass has brought it. It
//! also brings what the old programs noted of a flow between the two passes: without, a connection whose handshake or
//! end fell into these milliseconds would be half open, or open for ever.
//! A hold ends by itself after [`HOLD`], should this process die.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use aya::{
    Ebpf,
    maps::{MapData, MapInfo, ProgramArray, Queue},
    programs::loaded_programs,
};
use ebpf_common::layout::{CONFIG_HOLD_NEW, CONFIG_HOLD_UNKNOWN, Config, LAYOUT_VERSION};
use nix::time::{ClockId, clock_gettime};

use super::{
    DatapathError, Hook, Sizes,
    batch::Batch,
    bpffs,
    carry::{self, Pass},
    flow_table::now_s,
    object::{
        MAPS, OBJECT, OBJECT_1, entries, load, load_program, map_error, open_map, program,
        program_error,
    },
    places::{FLOWS_DIRECT, Places},
    raw::Raw,
    splice,
    stem::{self, PROGRAMS},
};
use crate::follow::chain;

/// How long a hold may last; a pass over full maps takes a tenth of it.
const HOLD: Duration = Duration::from_secs(2);
/// `enum membarrier_cmd` in `linux/membarrier.h`.
const MEMBARRIER_CMD_GLOBAL: libc::c_long = 1;
/// The queue of connections that give way.
const AGEING: &str = "AGEING";
/// The layout before this one.
const PREVIOUS: u32 = 1;

/// The maps of one version.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Set {
    layout: u32,
    maps: PathBuf,
}

impl Set {
    fn of(bpffs: &Path, layout: u32, folder: &str) -> Self {
        Self {
            layout,
            maps: bpffs.join(format!("v{layout}")).join(folder),
        }
    }

    fn info(&self, name: &'static str) -> Result<Option<MapInfo>, DatapathError> {
        let path = self.maps.join(name);
        if !path.exists() {
            return Ok(None);
        }
        MapInfo::from_pin(path)
            .map(Some)
            .map_err(|source| map_error(name, "be asked", source))
    }

    /// The one that the running programs use; `None` where there is none.
    fn running(bpffs: &Path) -> Result<Option<Self>, DatapathError> {
        let mut found = Vec::new();
        for (layout, folder) in [
            (LAYOUT_VERSION, "maps"),
            (LAYOUT_VERSION, "next"),
            (PREVIOUS, "maps"),
            (PREVIOUS, "next"),
        ] {
            let set = Self::of(bpffs, layout, folder);
            if let Some(flows) = set.info("FLOWS")? {
                found.push((set, flows.id()));
            }
        }
        if found.len() > 1 {
            let used = running_maps(bpffs)?;
            let position = found.iter().position(|(_, id)| used.contains(id));
            return Ok(Some(found.swap_remove(position.unwrap_or(0)).0));
        }
        Ok(found.pop().map(|(set, _)| set))
    }

    /// The sizes that its maps have.
    fn sizes(&self) -> Result<Sizes, DatapathError> {
        let size = |name| {
            let info = self.info(name)?;
            info.map(|info| info.max_entries())
                .ok_or(DatapathError::Missing(name))
        };
        Ok(Sizes {
            endpoints: size("ENDPOINTS")?,
            backends: size("BACKENDS")?,
            slots: size("SLOTS")?,
            vips: size("VIPS")?,
            flows: size("FLOWS")?,
        })
    }

    /// Whether a map of this set is as one of `sizes` and of this key and value would be.
    fn fits(
        &self,
        (name, key, value): (&'static str, usize, usize),
        sizes: &Sizes,
    ) -> Result<bool, DatapathError> {
        let Some(info) = self.info(name)? else {
            return Ok(false);
        };
        Ok(
            (info.key_size() as usize, info.value_size() as usize) == (key, value)
                && entries(name, sizes).is_none_or(|wanted| info.max_entries() == wanted),
        )
    }

    /// Writes the hold into `CONFIG`, until `until`.
    fn hold(&self, flags: u32, until: Duration) -> Result<(), DatapathError> {
        if self.layout != LAYOUT_VERSION {
            return Ok(()); // Its programs know no hold.
        }
        let map: Batch<u32, Raw<Config>> = Batch::open("CONFIG", &self.maps.join("CONFIG"))?;
        let mut configs = Vec::new();
        map.each(|_, config| {
            configs.push(Raw(Config {
                flags,
                hold_until_s: until.as_secs() as u32,
                ..config.0
            }));
        })?;
        map.put(&[0], &configs)
    }
}

/// The maps that the program of endpoints uses, by their ids.
fn running_maps(bpffs: &Path) -> Result<Vec<u32>, DatapathError> {
    let programs: Batch<u32, u32> = Batch::open(PROGRAMS, &stem::programs(bpffs))?;
    let (_, name, slot) = Hook::Pod.names();
    let Some(id) = programs.get(&slot)? else {
        return Ok(Vec::new());
    };
    let running = loaded_programs()
        .filter_map(Result::ok)
        .find(|program| program.id() == id);
    match running.map(|program| program.map_ids()) {
        Some(Ok(Some(maps))) => Ok(maps),
        Some(Err(source)) => Err(program_error("ask for", name, source)),
        _ => Ok(Vec::new()),
    }
}

/// Puts this version's programs in charge, over maps of `sizes`; gives the folder of the maps, and the object, whose
/// dispatchers may be needed.
pub(super) fn take_over(bpffs: &Path, sizes: &Sizes) -> Result<(Ebpf, PathBuf), DatapathError> {
    let own = Set::of(bpffs, LAYOUT_VERSION, "maps");
    bpffs::directory(&own.maps)?;
    let next = Set::of(bpffs, LAYOUT_VERSION, "next");
    let source = match Set::running(bpffs)? {
        // A predecessor switched and was killed before it could rename.
        Some(running) if running == next => {
            replace(&next, &own)?;
            Some(own.clone())
        }
        running => running,
    };
    bpffs::remove(&next.maps)?;
    let object = match source {
        Some(source) if !is_as_wanted(&source, sizes)? => {
            carry::check_room((source.layout, &source.maps), sizes)?;
            move_to(bpffs, OBJECT, (&source, &own), sizes)?
        }
        source => {
            if source.is_none() {
                // What stands there is of a start that did not come to an end.
                bpffs::remove(&own.maps)?;
                bpffs::directory(&own.maps)?;
            }
            let mut object = load(OBJECT, &own.maps, bpffs, sizes)?;
            if source.is_some() {
                let places = MapInfo::from_pin(own.maps.join(FLOWS_DIRECT))
                    .map_err(|source| map_error(FLOWS_DIRECT, "be asked", source))?;
                let used = running_maps(bpffs)?;
                if !used.contains(&places.id()) {
                    let places = Places::open(&own.maps.join(FLOWS_DIRECT))?;
                    // A version that knows no places runs: what stands in them is old. Of nothing that runs nothing is known.
                    if !used.is_empty() {
                        places.clear();
                    }
                    // Its connections are in `FLOWS`.
                    places.ask_flows(now_s());
                }
            }
            for hook in Hook::ALL {
                load_program(&mut object, hook.names().1)?;
            }
            switch(bpffs, &mut object)?;
            object
        }
    };
    bpffs::remove(&Set::of(bpffs, PREVIOUS, "maps").maps)?;
    bpffs::remove(&Set::of(bpffs, PREVIOUS, "next").maps)?;
    stem::ensure(bpffs)?;
    Ok((object, own.maps))
}

/// Hands a node back to the programs and maps of the previous layout, flows included, so that a NetManager of that
/// layout finds what it knows. None may run meanwhile.
///
/// # Errors
/// When nothing of this version forwards here, or the kernel refuses; then this version goes on.
pub fn hand_back(bpffs: &Path) -> Result<(), DatapathError> {
    let _lock = bpffs::lock(bpffs)?;
    let nothing = || DatapathError::NothingRuns(bpffs.to_owned());
    let source = Set::running(bpffs)?.ok_or_else(nothing)?;
    if source.layout == PREVIOUS {
        return Ok(());
    }
    let target = Set::of(bpffs, PREVIOUS, "maps");
    let sizes = source.sizes()?;
    splice::stop(bpffs, &source.maps)?;
    move_to(bpffs, OBJECT_1, (&source, &target), &sizes)?;
    bpffs::remove(&bpffs.join(format!("v{LAYOUT_VERSION}")))?;
    stem::ensure(bpffs)
}

fn is_as_wanted(set: &Set, sizes: &Sizes) -> Result<bool, DatapathError> {
    if set.layout != LAYOUT_VERSION {
        return Ok(false);
    }
    for map in MAPS {
        // One that is not there yet is made by the load.
        if map.0 != PROGRAMS && set.info(map.0)?.is_some() && !set.fits(map, sizes)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Moves a node from one set of maps to another; nothing has changed where it fails before the switch.
fn move_to(
    bpffs: &Path,
    object: &[u8],
    (source, target): (&Set, &Set),
    sizes: &Sizes,
) -> Result<Ebpf, DatapathError> {
    let next = Set::of(bpffs, target.layout, "next");
    bpffs::remove(&next.maps)?;
    bpffs::directory(&next.maps)?;
    let started = Instant::now();
    let moved = prepare(bpffs, object, (source, &next), sizes).and_then(|(mut object, flows)| {
        let moved = exchange(bpffs, &mut object, (source, &next), flows);
        // Whatever happened, nobody waits longer.
        for set in [source, &next] {
            if let Err(error) = set.hold(0, Duration::ZERO) {
                tracing::warn!(error = chain(&error), "a hold ends by itself, not at once");
            }
        }
        moved.map(|(count, held)| (object, count, held))
    });
    let (object, flows, held) = match moved {
        Ok(moved) => moved,
        Err(error) => {
            bpffs::remove(&next.maps)?;
            return Err(error);
        }
    };
    replace(&next, target)?;
    tracing::info!(
        from = source.layout,
        to = target.layout,
        flows,
        ms = started.elapsed().as_millis() as u64,
        held_ms = held.as_millis() as u64,
        "moved the node to other maps"
    );
    Ok(object)
}

/// Makes the maps of `next`, loads the programs over them, and copies all but the flows that begin from now on.
/// The flows that are still to be moved are given back; `None` where their maps are shared.
fn prepare(
    bpffs: &Path,
    object: &[u8],
    (source, next): (&Set, &Set),
    sizes: &Sizes,
) -> Result<(Ebpf, Option<Box<dyn carry::Flows>>), DatapathError> {
    let mut copied = Vec::new();
    for map in MAPS {
        let (name, _, _) = map;
        if name == PROGRAMS || source.info(name)?.is_none() {
            continue;
        }
        let is_foreign = source.layout != next.layout && carry::differs(name);
        // What is in the places goes to `FLOWS`, so that there must be something to be brought to.
        let is_awaited = name == carry::FLOWS[0] && copied.contains(&FLOWS_DIRECT);
        if is_foreign || is_awaited || !source.fits(map, sizes)? {
            copied.push(name);
            continue;
        }
        MapData::from_pin(source.maps.join(name))
            .map_err(|error| map_error(name, "open", error))?
            .pin(next.maps.join(name))
            .map_err(|error| DatapathError::Pin {
                path: next.maps.join(name),
                source: error,
            })?;
    }
    let places = next.maps.join(FLOWS_DIRECT);
    let is_asked = next.layout == PREVIOUS || places.exists();
    let mut object = load(object, &next.maps, bpffs, sizes)?;
    if !is_asked {
        // All connections are brought to `FLOWS`.
        Places::open(&places)?.ask_flows(now_s());
    }
    for hook in Hook::ALL {
        load_program(&mut object, hook.names().1)?;
    }
    let (from, to) = ((source.layout, &*source.maps), (next.layout, &*next.maps));
    let (flows, tables): (Vec<_>, Vec<_>) = copied
        .into_iter()
        .partition(|name| carry::FLOWS.contains(name));
    for name in tables {
        carry::table(name, from, to, sizes)?;
    }
    if flows.is_empty() {
        return Ok((object, None));
    }
    let mut flows = carry::flows(&flows, from, to)?;
    flows.pass(Pass::All)?;
    Ok((object, Some(flows)))
}

/// Holds, brings the last flows over and switches. Gives how many flows there were, and how long new ones waited.
fn exchange(
    bpffs: &Path,
    object: &mut Ebpf,
    (source, next): (&Set, &Set),
    flows: Option<Box<dyn carry::Flows>>,
) -> Result<(usize, Duration), DatapathError> {
    let Some(mut flows) = flows else {
        return switch(bpffs, object).map(|()| (0, Duration::ZERO));
    };
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map(Duration::from)
        .expect("every Linux has a monotonic clock");
    let started = Instant::now();
    let can_hold = source.layout == LAYOUT_VERSION;
    if can_hold {
        source.hold(CONFIG_HOLD_NEW, now + HOLD)?;
    } else {
        next.hold(CONFIG_HOLD_NEW | CONFIG_HOLD_UNKNOWN, now + HOLD)?;
    }
    if can_hold {
        wait_for_programs();
    }
    let count = flows.pass(Pass::Exact)?;
    switch(bpffs, object)?;
    wait_for_programs();
    let late = flows.pass(Pass::Late);
    if let Err(error) = late.and_then(|_| queue(next, &flows.giving_way())) {
        // There is no way back: the flows of the last milliseconds are lost.
        tracing::error!(error = chain(&error), "failed to bring the last flows over");
    }
    Ok((count, started.elapsed()))
}

/// Lets connections give way that a layout without the queue had: else they would keep their room for a minute each,
/// and a full table could begin none.
fn queue(next: &Set, keys: &[carry::Key]) -> Result<(), DatapathError> {
    if keys.is_empty() || next.layout == PREVIOUS {
        return Ok(());
    }
    let mut ageing: Queue<MapData, carry::Key> = open_map(&next.maps.join(AGEING), AGEING)?;
    for key in keys {
        if ageing.push(key, 0).is_err() {
            break; // It is full: what is not in it is collected by its age.
        }
    }
    Ok(())
}

/// Waits until every program that runs now has ended: one that began before a hold or a switch may still write.
fn wait_for_programs() {
    // It waits for an RCU grace period, and programs run inside RCU's read side. Where it is refused, 20 ms are
    // longer than any program runs.
    // SAFETY: a system call with three integers and no memory.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result < 0 {
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Puts the programs of `object` into their slots.
fn switch(bpffs: &Path, object: &mut Ebpf) -> Result<(), DatapathError> {
    let mut programs: ProgramArray<MapData> = open_map(&stem::programs(bpffs), PROGRAMS)?;
    for hook in Hook::ALL {
        let (_, name, slot) = hook.names();
        let fd = program(object, name)?
            .fd()
            .map_err(|source| program_error("load", name, source))?;
        programs
            .set(slot, fd, 0)
            .map_err(|source| map_error(PROGRAMS, "switch", source))?;
    }
    Ok(())
}

/// Gives the maps of `next` the place of those of `target`.
fn replace(next: &Set, target: &Set) -> Result<(), DatapathError> {
    bpffs::remove(&target.maps)?;
    bpffs::rename(&next.maps, &target.maps)
}
