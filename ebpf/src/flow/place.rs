//! Who may have a place of its own, and who gives it up.
//!
//! The owner of a place is judged twice: before the place is taken, so that nobody who keeps it is disturbed, and after, when
//! nobody else can take or leave it and what is read is certainly of one connection.

use ebpf_common::layout::{ACCOUNT_TCP, Connection, FLOW_ESTABLISHED, FlowKey};

use super::{is_over, tell_closed};
use crate::maps::{Place, Taken, is_shared};

/// A connection that is over keeps its place for so long, so that what is said again is translated (a second, as coarse as its time).
const OVER_NS: u64 = 10_000_000_000;
/// One whose client has not answered the backend's SYN keeps it for so long: beyond the fourth SYN of Linux, 15 s after
/// the first.
const OPENING_NS: u64 = 20_000_000_000;

/// The place of a new connection with these keys of its entries, which nobody else has now; `None` where it must go to `FLOWS`.
#[inline(always)]
pub(crate) fn place(key: &FlowKey, reverse: &FlowKey, now_ns: u64) -> Option<Taken> {
    let place = Place::of(key)?;
    let (state, owner) = place.owner()?;
    if owner.is_some_and(|owner| !gives_way(owner, reverse, now_ns)) {
        return None;
    }
    let taken = place.take(state)?;
    let is_kept = owner.is_some_and(|owner| !gives_way(owner, reverse, now_ns));
    // The backend's answers may be another's already, which lies there.
    if is_kept || (place.is_spilled() && is_shared(reverse)) {
        taken.give_back();
        return None;
    }
    if let Some(owner) = owner
        && !is_over(owner.flags())
    {
        tell_closed(owner.connection().key.endpoint, ACCOUNT_TCP);
    }
    Some(taken)
}

/// Whether a connection gives up its place now: to one that is answered under the same key at once, when it is over.
#[inline(always)]
fn gives_way(owner: Place, reverse: &FlowKey, now_ns: u64) -> bool {
    let flags = owner.flags();
    // Another CPU's clock may be a tick ahead.
    let idle = now_ns.saturating_sub(owner.last_seen_ns());
    if is_over(flags) {
        let connection: &Connection = owner.connection();
        idle > OVER_NS || connection.is_answered_by(reverse)
    } else {
        flags & FLOW_ESTABLISHED == 0 && idle > OPENING_NS
    }
}
