//! Who may have a place of its own, and who gives it up.

use ebpf_common::layout::{ACCOUNT_TCP, Connection, FLOW_ESTABLISHED, FlowKey};

use super::{is_over, tell_closed};
use crate::maps::{Place, is_shared};

/// A connection that is over keeps its place for so long, that its last segments are translated.
const OVER_NS: u64 = 2_000_000_000;
/// One whose client has not answered the backend's SYN keeps it for so long.
const OPENING_NS: u64 = 5_000_000_000;

/// The place of a new connection with these keys of its entries, with the word by which it is taken; `None` where it must go to
/// `FLOWS`.
#[inline(always)]
pub(crate) fn place(key: &FlowKey, reverse: &FlowKey, now_ns: u64) -> Option<(Place, u64)> {
    let place = Place::of(key)?;
    let (state, owner) = place.owner()?;
    // The backend's answers may be another's already, which lies there.
    if place.is_spilled() && is_shared(reverse) {
        return None;
    }
    if let Some(owner) = owner {
        if !gives_way(owner, key, now_ns) {
            return None;
        }
        if !is_over(owner.forward.flags) {
            tell_closed(owner.key.endpoint, ACCOUNT_TCP);
        }
    }
    Some((place, state))
}

/// Whether a connection gives up its place now.
#[inline(always)]
fn gives_way(owner: &Connection, key: &FlowKey, now_ns: u64) -> bool {
    let idle = now_ns.wrapping_sub(owner.forward.last_seen_ns);
    if is_over(owner.forward.flags) {
        // Who uses the port again waits for nothing more.
        let is_its_client = owner.key.src == key.src
            && owner.key.sport_be == key.sport_be
            && owner.key.endpoint == key.endpoint;
        is_its_client || idle > OVER_NS
    } else {
        owner.forward.flags & FLOW_ESTABLISHED == 0 && idle > OPENING_NS
    }
}
