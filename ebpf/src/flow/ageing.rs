//! Who gives way: connections that open or are over, oldest first, in `AGEING`.

use ebpf_common::layout::{Config, FLOW_QUEUED, FlowKey, age_tag};

use super::{find, forget_connection, gives_way};
use crate::maps::{self, Table};

/// Puts a connection that opens, or is over, behind the others that give way; its client's first number is `isn_be`.
#[inline(always)]
pub(crate) fn age(config: &Config, key: &mut FlowKey, isn_be: u32) {
    // In place, because stack is scarce.
    key.pad = age_tag(isn_be);
    let mut is_queued = maps::age(key);
    if !is_queued {
        give_way(config);
        is_queued = maps::age(key);
    }
    key.pad = 0;
    if !is_queued && let Some(entry) = Table::Connections.get(key) {
        // Another CPU has taken the room: it is put there when it ends, or user space collects it.
        entry.clear(FLOW_QUEUED);
    }
}

/// How many keys are taken out of `AGEING` at once for one connection that gives way: most may be of connections that
/// are forgotten already.
const LOOKS: u32 = 8;

/// Lets a connection give way; false when none is left.
#[inline(always)]
pub(crate) fn make_room() -> bool {
    let Ok(config) = maps::config() else {
        return false;
    };
    for _ in 0..LOOKS {
        match give_way(config) {
            Turn::Gave => return true,
            Turn::Stayed => {}
            Turn::Nobody => return false,
        }
    }
    true
}

/// What became of the oldest key in `AGEING`.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum Turn {
    /// Its connection was forgotten.
    Gave,
    /// Its connection is established, or was forgotten before.
    Stayed,
    /// There is no key.
    Nobody,
}

/// Takes the oldest connection that gives way out of `AGEING`, and out of `FLOWS` where it has not become
/// established.
#[inline(never)]
fn give_way(config: &Config) -> Turn {
    let Some(mut key) = maps::oldest() else {
        return Turn::Nobody;
    };
    let tag = key.pad;
    key.pad = 0;
    let Some(entry) = find(&key) else {
        return Turn::Stayed;
    };
    // Another connection has the tuple by now: it has a place of its own.
    if tag != 0 && tag != age_tag(entry.flow().isn_be) {
        return Turn::Stayed;
    }
    let mut flags = entry.flags();
    if !gives_way(flags) {
        // Who ends it now puts the key back, or has ended it before this and leaves it to us.
        flags = entry.clear(FLOW_QUEUED);
    }
    if !gives_way(flags) {
        return Turn::Stayed;
    }
    forget_connection(config, &key, entry);
    Turn::Gave
}
