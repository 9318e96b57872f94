//! Lets packets wait while a take-over moves the flows to other maps.
//!
//! A packet that waits goes back to the end of its link's queue and comes again, unchanged: for the milliseconds
//! of a move that is cheaper than anything that remembers it, and nobody loses one. It is asked for only where a
//! packet belongs to no flow that is known; the way of all other packets does not know of it.

use ebpf_common::{layout::Config, reason::Reason};

use crate::maps;

/// [`Reason::Held`] while the node holds packets of this kind (`CONFIG_HOLD_...`), else `reason`.
#[inline(always)]
pub(crate) fn or(config: &Config, kind: u32, reason: Reason) -> Reason {
    if is_on(config, kind) {
        Reason::Held
    } else {
        reason
    }
}

/// Whether the node holds packets of this kind.
#[inline(always)]
pub(crate) fn is_on(config: &Config, kind: u32) -> bool {
    config.flags & kind != 0 && maps::seconds(maps::now_ns()) < config.hold_until_s
}
