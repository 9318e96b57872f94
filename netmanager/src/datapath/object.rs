//! The kernel object: loaded over the maps that are pinned, its dispatchers taken over.

use std::path::{Path, PathBuf};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Map, MapData, MapError, MapInfo},
    programs::{ProgramError, SchedClassifier},
};
use ebpf_common::layout::{
    Addr, Backend, Config, Count, Endpoint, Flow, FlowKey, RefusedKey, Vip, VipKey,
};

use super::{DatapathError, Sizes};

/// The kernel programs (`cargo xtask ebpf` builds them).
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../ebpf/prebuilt/weft.bpf.o"
));

/// Every map, with the bytes of its key and value.
pub(super) const MAPS: [(&str, usize, usize); 13] = [
    ("CONFIG", 4, size_of::<Config>()),
    ("ENDPOINTS", 4, size_of::<Endpoint>()),
    ("LOCAL", size_of::<Addr>(), size_of::<Endpoint>()),
    ("VIPS", size_of::<VipKey>(), size_of::<Vip>()),
    ("SLOTS", 4, 4),
    ("BACKENDS", 4, size_of::<Backend>()),
    ("FLOWS", size_of::<FlowKey>(), size_of::<Flow>()),
    ("FLOWS_LRU", size_of::<FlowKey>(), size_of::<Flow>()),
    ("REASONS", 4, 8),
    ("VIP_COUNTS", 4, size_of::<Count>()),
    ("BACKEND_COUNTS", 4, size_of::<Count>()),
    ("REFUSED", size_of::<RefusedKey>(), 8),
    ("PROGRAMS", 4, 4),
];

/// Loads the object with its maps at their pins.
pub(super) fn load(directory: &Path, sizes: Sizes) -> Result<Ebpf, DatapathError> {
    let mut loader = EbpfLoader::new();
    for (name, _, _) in MAPS {
        loader.map_pin_path(name, map_path(directory, name));
    }
    loader
        .map_max_entries("BACKENDS", sizes.backends)
        .map_max_entries("BACKEND_COUNTS", sizes.backends)
        .map_max_entries("SLOTS", sizes.slots)
        .map_max_entries("VIPS", sizes.vips)
        // A VIP has two entries at least: itself and a port.
        .map_max_entries("VIP_COUNTS", (sizes.vips / 2).max(2))
        .map_max_entries("FLOWS", sizes.flows)
        .map_max_entries("FLOWS_LRU", sizes.flows / 2)
        .load(OBJECT)
        .map_err(|source| DatapathError::Load(Box::new(source)))
}

/// Refuses maps that were pinned with other sizes of keys or values.
pub(super) fn check_layout(directory: &Path) -> Result<(), DatapathError> {
    for (name, key, value) in MAPS {
        let path = map_path(directory, name);
        if !path.exists() {
            continue;
        }
        let info =
            MapInfo::from_pin(&path).map_err(|source| map_error("pinned", "open", source))?;
        if (info.key_size(), info.value_size()) != (key as u32, value as u32) {
            return Err(DatapathError::Layout {
                path,
                found_key: info.key_size(),
                found_value: info.value_size(),
                key: key as u32,
                value: value as u32,
            });
        }
    }
    Ok(())
}

pub(super) fn load_program<'a>(
    object: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, DatapathError> {
    let program = object
        .program_mut(name)
        .ok_or(DatapathError::Missing(name))?;
    let program: &mut SchedClassifier = program
        .try_into()
        .map_err(|source| program_error("use", name, source))?;
    program
        .load()
        .map_err(|source| program_error("load", name, source))?;
    Ok(program)
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

pub(super) fn map_path(directory: &Path, name: &str) -> PathBuf {
    directory.join("maps").join(name)
}

pub(super) fn open_map<M: TryFrom<Map, Error = MapError>>(
    directory: &Path,
    name: &'static str,
) -> Result<M, DatapathError> {
    MapData::from_pin(map_path(directory, name))
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
