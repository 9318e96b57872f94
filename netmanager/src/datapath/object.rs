//! The kernel object: loaded over the maps that are pinned, its dispatchers taken over.

use std::path::Path;

use aya::{
    Ebpf, EbpfLoader,
    maps::{Map, MapData, MapError},
    programs::{ProgramError, SchedClassifier},
};
use ebpf_common::{
    layout::{
        Account, Addr, Backend, Config, Connection, Count, DIRECT_FLOWS, Endpoint, Flow, FlowKey,
        Fragment, FragmentKey, LogConfig, LogState, Peer, RefusedKey, Settled, Vip, VipKey,
    },
    splice::{Half, Offsets, Splice},
};

use super::{
    DatapathError, Sizes,
    places::FLOWS_DIRECT,
    stem::{self, PROGRAMS},
};

/// The kernel programs (`cargo xtask ebpf` builds them).
pub(super) static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../ebpf/prebuilt/weft.bpf.o"
));

/// The programs of layout 1, to which the node can be handed back for one release.
pub(super) static OBJECT_1: &[u8] = aya::include_bytes_aligned!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../ebpf/prebuilt/weft.v1.bpf.o"
));

/// Every map, with the bytes of its key and value.
pub(super) const MAPS: [(&str, usize, usize); 29] = [
    ("CONFIG", 4, size_of::<Config>()),
    ("ENDPOINTS", 4, size_of::<Endpoint>()),
    ("LOCAL", size_of::<Addr>(), size_of::<Endpoint>()),
    ("ENDPOINTS_DIRECT", 4, size_of::<Endpoint>()),
    ("LOCAL_DIRECT", 4, size_of::<Endpoint>()),
    ("VIPS", size_of::<VipKey>(), size_of::<Vip>()),
    ("SLOTS", 4, 4),
    ("BACKENDS", 4, size_of::<Backend>()),
    (FLOWS_DIRECT, 4, size_of::<Connection>()),
    ("FLOWS", size_of::<FlowKey>(), size_of::<Flow>()),
    ("FLOWS_LRU", size_of::<FlowKey>(), size_of::<Flow>()),
    ("FRAGMENTS", size_of::<FragmentKey>(), size_of::<Fragment>()),
    ("PEERS", size_of::<Addr>(), size_of::<Peer>()),
    ("ANSWERS", 4, 8),
    ("AGEING", 0, size_of::<FlowKey>()),
    ("ACCOUNTS", 4, size_of::<Account>()),
    ("SETTLED", 4, size_of::<Settled>()),
    ("REASONS", 4, 8),
    ("VIP_COUNTS", 4, size_of::<Count>()),
    ("BACKEND_COUNTS", 4, size_of::<Count>()),
    ("REFUSED", size_of::<RefusedKey>(), 8),
    ("LOG", 0, 0),
    ("LOG_CONFIG", 4, size_of::<LogConfig>()),
    ("LOG_STATE", 4, size_of::<LogState>()),
    ("PROGRAMS", 4, 4),
    ("SPLICES", 8, size_of::<Splice>()),
    ("SPLICE_HALVES", size_of::<FlowKey>(), size_of::<Half>()),
    ("SPLICE_SOCKETS", 8, 4),
    ("SPLICE_OFFSETS", 4, size_of::<Offsets>()),
];

/// How many entries a map should have, where that is configured.
pub(super) fn entries(name: &str, sizes: &Sizes) -> Option<u32> {
    match name {
        "ENDPOINTS" => Some(sizes.endpoints),
        // Each of an endpoint's two addresses.
        "LOCAL" => Some(sizes.endpoints * 2),
        "VIPS" => Some(sizes.vips),
        "SLOTS" => Some(sizes.slots),
        "BACKENDS" | "BACKEND_COUNTS" => Some(sizes.backends),
        // A VIP has two entries at least: itself and a port.
        "VIP_COUNTS" => Some((sizes.vips / 2).max(2)),
        FLOWS_DIRECT => Some((sizes.flows / 8).clamp(1, DIRECT_FLOWS)),
        "FLOWS" => Some(sizes.flows),
        "FLOWS_LRU" => Some(sizes.flows / 2),
        _ => None,
    }
}

/// Loads an object: its maps are those that are pinned in `maps`, or are made and pinned there.
pub(super) fn load(
    object: &[u8],
    maps: &Path,
    bpffs: &Path,
    sizes: &Sizes,
) -> Result<Ebpf, DatapathError> {
    let mut loader = EbpfLoader::new();
    for (name, _, _) in MAPS {
        let path = if name == PROGRAMS {
            stem::programs(bpffs)
        } else {
            maps.join(name)
        };
        loader.map_pin_path(name, path);
        if let Some(entries) = entries(name, sizes) {
            loader.map_max_entries(name, entries);
        }
    }
    loader
        .load(object)
        .map_err(|source| DatapathError::Load(Box::new(source)))
}

pub(super) fn program<'a>(
    object: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, DatapathError> {
    object
        .program_mut(name)
        .ok_or(DatapathError::Missing(name))?
        .try_into()
        .map_err(|source| program_error("use", name, source))
}

pub(super) fn load_program<'a>(
    object: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, DatapathError> {
    let program = program(object, name)?;
    patiently(|| program.load()).map_err(|source| program_error("load", name, source))?;
    Ok(program)
}

/// How often a load is tried that the kernel breaks off.
const LOADS: u32 = 5;

/// Loads a program, again where the kernel broke off: the verifier looks for signals while it works, and says `EAGAIN` to a
/// process that has one waiting (bpf_check in the kernel's verifier.c).
pub(super) fn patiently(
    load: impl FnMut() -> Result<(), ProgramError>,
) -> Result<(), ProgramError> {
    again(load, |error| {
        matches!(error, ProgramError::LoadError { io_error, .. }
            if io_error.raw_os_error() == Some(libc::EAGAIN))
    })
}

fn again<E>(
    mut load: impl FnMut() -> Result<(), E>,
    is_broken_off: impl Fn(&E) -> bool,
) -> Result<(), E> {
    for _ in 1..LOADS {
        match load() {
            Err(error) if is_broken_off(&error) => {}
            loaded => return loaded,
        }
    }
    load()
}

/// The pinned dispatcher if there is one, else the object's, loaded and pinned.
pub(super) fn take_over_dispatcher(
    object: &mut Ebpf,
    name: &'static str,
    pin: &Path,
) -> Result<SchedClassifier, DatapathError> {
    if !pin.exists() {
        load_program(object, name)?
            .pin(pin)
            .map_err(|source| DatapathError::Pin {
                path: pin.to_owned(),
                source,
            })?;
    }
    SchedClassifier::from_pin(pin).map_err(|source| program_error("take over", name, source))
}

pub(super) fn open_map<M: TryFrom<Map, Error = MapError>>(
    path: &Path,
    name: &'static str,
) -> Result<M, DatapathError> {
    MapData::from_pin(path)
        .and_then(Map::from_map_data)
        .and_then(M::try_from)
        .map_err(|source| map_error(name, "open", source))
}

pub(super) fn map_error(map: &'static str, what: &'static str, source: MapError) -> DatapathError {
    DatapathError::Map { map, what, source }
}

pub(super) fn program_error(
    what: &'static str,
    name: &'static str,
    source: ProgramError,
) -> DatapathError {
    DatapathError::Program {
        what,
        name,
        source: Box::new(source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_that_is_broken_off_is_tried_again_and_no_other() {
        for (broken_off, then, tries) in [
            (0, None, 1),
            (2, None, 3),
            (1, Some(libc::EACCES), 2),
            (LOADS + 7, None, LOADS),
        ] {
            let mut count = 0;
            let load = || {
                count += 1;
                match then {
                    _ if count <= broken_off => Err(libc::EAGAIN),
                    Some(errno) => Err(errno),
                    None => Ok(()),
                }
            };
            let loaded = again(load, |errno| *errno == libc::EAGAIN);
            assert_eq!(count, tries);
            assert_eq!(loaded.is_ok(), then.is_none() && broken_off < LOADS);
        }
    }
}
