//! Copies what maps hold into maps of another size or layout, while packets flow.
//!
//! What user space writes is copied once. Flows are the kernel's: they are copied in passes ([`flows`]). From
//! layout 1 to 2 a value grows at its end, where zero means "not known"; from 2 to 1 its end is cut off.

use std::path::Path;

use ebpf_common::layout::{self, Config, Flow, FlowKey};

use super::{
    DatapathError, Sizes,
    batch::Batch,
    object::entries,
    places::{FLOWS_DIRECT, Places},
};

mod flows;

pub(super) use flows::{Flows, Key, Pass, flows};

/// Bytes of `Config` in layout 1.
pub(super) const CONFIG_1: usize = 88;
/// Bytes of `Vip` in layout 1.
const VIP_1: usize = 16;
const VIP: usize = size_of::<layout::Vip>();
/// Bytes of `Flow` in layout 1.
pub(super) const FLOW_1: usize = 48;
const CONFIG: usize = size_of::<Config>();
const FLOW: usize = size_of::<Flow>();
const KEY: usize = size_of::<FlowKey>();
/// The flow maps.
pub(super) const FLOWS: [&str; 2] = ["FLOWS", "FLOWS_LRU"];

/// From one form of a value to another.
fn resized<const S: usize, const T: usize>(value: [u8; S]) -> [u8; T] {
    let mut resized = [0; T];
    let length = S.min(T);
    resized[..length].copy_from_slice(&value[..length]);
    resized
}

/// Maps that are not shared between the layouts: they have other forms, or what they hold is only true of one's flows
/// (a queue of keys that are no more would use up every turn of who looks for room).
pub(super) fn differs(name: &str) -> bool {
    matches!(name, "CONFIG" | "VIPS" | "AGEING" | FLOWS_DIRECT) || FLOWS.contains(&name)
}

/// Copies the entries that are kept from one map to another, each value in the other's form.
fn copy<K: aya::Pod, const S: usize, const T: usize>(
    name: &'static str,
    from: &Path,
    to: &Path,
    is_kept: impl Fn(&K) -> bool,
) -> Result<(), DatapathError> {
    let from: Batch<K, [u8; S]> = Batch::open(name, &from.join(name))?;
    let to: Batch<K, [u8; T]> = Batch::open(name, &to.join(name))?;
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    from.each(|key, value| {
        if is_kept(&key) {
            keys.push(key);
            values.push(resized(value));
        }
    })?;
    if keys.is_empty() {
        return Ok(());
    }
    to.put(&keys, &values)
}

/// Refuses sizes into which what is in use does not fit.
pub(super) fn check_room((layout, maps): (u32, &Path), sizes: &Sizes) -> Result<(), DatapathError> {
    let mut needs = [
        ("--vips", sizes.vips, 0),
        ("--slots", sizes.slots, 0),
        ("--backends", sizes.backends, 0),
        ("--endpoints", sizes.endpoints, 0),
        ("--flows", sizes.flows, 0),
    ];
    let [vips, slots, backends, endpoints, flows] = &mut needs;
    // Both layouts begin with the run.
    let mut count_vip = |vip: &[u8]| {
        let word = |at: usize| {
            vip.get(at..at + 4)
                .and_then(|word| word.try_into().ok())
                .map_or(0, u32::from_ne_bytes)
        };
        vips.2 += 1;
        slots.2 = slots.2.max(word(0).saturating_add(word(4)));
    };
    if layout == 1 {
        Batch::<[u8; 20], [u8; VIP_1]>::open("VIPS", &maps.join("VIPS"))?
            .each(|_, vip| count_vip(&vip))?;
    } else {
        Batch::<[u8; 20], [u8; VIP]>::open("VIPS", &maps.join("VIPS"))?
            .each(|_, vip| count_vip(&vip))?;
    }
    Batch::<u32, super::raw::Raw<layout::Backend>>::open("BACKENDS", &maps.join("BACKENDS"))?
        .each(|index, backend| {
            if backend.0.flags != 0 {
                backends.2 = backends.2.max(index + 1);
            }
        })?;
    Batch::<u32, [u8; size_of::<layout::Endpoint>()]>::open("ENDPOINTS", &maps.join("ENDPOINTS"))?
        .each(|_, _| endpoints.2 += 1)?;
    flows.2 = if layout == 1 {
        count(&Batch::<[u8; KEY], [u8; FLOW_1]>::open(
            "FLOWS",
            &maps.join("FLOWS"),
        )?)?
    } else {
        count(&Batch::<[u8; KEY], [u8; FLOW]>::open(
            "FLOWS",
            &maps.join("FLOWS"),
        )?)?
    };
    if layout != 1 && maps.join(FLOWS_DIRECT).exists() {
        let places = Places::open(&maps.join(FLOWS_DIRECT))?;
        if entries(FLOWS_DIRECT, sizes) != Some(places.len()) {
            flows.2 += places.all().count() as u32;
        }
    }
    match needs.into_iter().find(|(_, given, used)| used > given) {
        Some((option, given, used)) => Err(DatapathError::NoRoom {
            option,
            given,
            used,
        }),
        None => Ok(()),
    }
}

fn count<K: aya::Pod, V: aya::Pod>(map: &Batch<K, V>) -> Result<u32, DatapathError> {
    let mut count = 0;
    map.each(|_, _| count += 1)?;
    Ok(count)
}

/// Copies a map that user space writes, from one layout and folder to another. What does not fit was checked to be
/// unused.
pub(super) fn table(
    name: &'static str,
    (from_layout, from): (u32, &Path),
    (to_layout, to): (u32, &Path),
    sizes: &Sizes,
) -> Result<(), DatapathError> {
    const ENDPOINT: usize = size_of::<layout::Endpoint>();
    const BACKEND: usize = size_of::<layout::Backend>();
    let size = entries(name, sizes).unwrap_or(u32::MAX);
    let is_inside = |index: &u32| *index < size;
    match (name, from_layout, to_layout) {
        ("CONFIG", 1, 1) => copy::<u32, CONFIG_1, CONFIG_1>(name, from, to, |_| true),
        ("CONFIG", 1, _) => copy::<u32, CONFIG_1, CONFIG>(name, from, to, |_| true),
        ("CONFIG", _, 1) => copy::<u32, CONFIG, CONFIG_1>(name, from, to, |_| true),
        ("CONFIG", ..) => copy::<u32, CONFIG, CONFIG>(name, from, to, |_| true),
        ("VIPS", 1, 1) => copy::<[u8; 20], VIP_1, VIP_1>(name, from, to, |_| true),
        ("VIPS", 1, _) => copy::<[u8; 20], VIP_1, VIP>(name, from, to, |_| true),
        ("VIPS", _, 1) => copy::<[u8; 20], VIP, VIP_1>(name, from, to, |_| true),
        ("VIPS", ..) => copy::<[u8; 20], VIP, VIP>(name, from, to, |_| true),
        ("ENDPOINTS", ..) => copy::<u32, ENDPOINT, ENDPOINT>(name, from, to, |_| true),
        ("LOCAL", ..) => copy::<[u8; 16], ENDPOINT, ENDPOINT>(name, from, to, |_| true),
        ("SLOTS", ..) => copy::<u32, 4, 4>(name, from, to, is_inside),
        ("BACKENDS", ..) => copy::<u32, BACKEND, BACKEND>(name, from, to, is_inside),
        // Counters begin anew, as after a reboot.
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_grows_by_zeros_and_shrinks_by_its_end() {
        assert_eq!(resized::<2, 4>([1, 2]), [1, 2, 0, 0]);
        assert_eq!(resized::<4, 2>([1, 2, 3, 4]), [1, 2]);
    }
}
