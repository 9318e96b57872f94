//! What passes and what is refused, by VIP, by backend and by reason.
//!
//! Every count is this CPU's own, an element of an array by its index: a packet that passes costs two look-ups
//! without a hash and four additions. Who has which index is user space's to know. Element 0 collects what
//! belongs to nobody.

use aya_ebpf::{
    macros::map,
    maps::{PerCpuArray, PerCpuHashMap},
};
use ebpf_common::{
    layout::{Count, FLOW_REVERSE, RefusedKey},
    reason::Reason,
    splice::Splice,
};

use crate::{maps, parse::Packet, skb::Skb};

// The loader sets the sizes: half as many VIPs as `VIPS` has entries, because a VIP has two at least.
#[map]
static VIP_COUNTS: PerCpuArray<Count> = PerCpuArray::with_max_entries(8_192, 0);
#[map]
static BACKEND_COUNTS: PerCpuArray<Count> = PerCpuArray::with_max_entries(16_384, 0);
#[map]
static REFUSED: PerCpuHashMap<RefusedKey, u64> = PerCpuHashMap::with_max_entries(4_096, 0);

/// Counts a translated packet whose IP header is at `l2`.
#[inline(always)]
pub(crate) fn passed(skb: &Skb, l2: usize, packet: &Packet) {
    let packets = u64::from(skb.segments()).max(1);
    let bytes = u64::from(skb.len()) - l2 as u64;
    let is_reverse = packet.key.direction == FLOW_REVERSE;
    for count in [
        VIP_COUNTS.get_ptr_mut(packet.counter),
        BACKEND_COUNTS.get_ptr_mut(packet.backend),
    ] {
        let Some(count) = count else { continue };
        // SAFETY: the pointer is to this CPU's own element, and nothing interrupts a program with itself.
        let count = unsafe { &mut *count };
        let direction = usize::from(is_reverse);
        count.packets[direction] += packets;
        count.bytes[direction] += bytes;
    }
}

/// Counts a message that went from one pod into the other's receive queue, as one packet.
#[inline(always)]
pub(crate) fn handed_over(splice: &Splice, bytes: u64) {
    let is_reverse = splice.direction == u32::from(FLOW_REVERSE);
    for count in [
        VIP_COUNTS.get_ptr_mut(splice.counter),
        BACKEND_COUNTS.get_ptr_mut(splice.backend),
    ] {
        let Some(count) = count else { continue };
        let direction = usize::from(is_reverse);
        // SAFETY: the pointer is to this CPU's own element. This runs within a system call: a packet's program that comes
        // between the reading and the writing of a word, a few nanoseconds, is not counted.
        let count = unsafe { &mut *count };
        count.packets[direction] += 1;
        count.bytes[direction] += bytes;
    }
}

/// Counts a flow that was opened.
#[inline(always)]
pub(crate) fn opened(packet: &Packet) {
    for count in [
        VIP_COUNTS.get_ptr_mut(packet.counter),
        BACKEND_COUNTS.get_ptr_mut(packet.backend),
    ] {
        if let Some(count) = count {
            // SAFETY: as in `passed`.
            unsafe { (*count).flows += 1 }
        }
    }
}

/// Counts the packet at hand for the VIP that refuses it, where it is known.
#[inline(always)]
pub(crate) fn refused(reason: Reason) {
    let Ok(packet) = maps::scratch() else { return };
    if packet.counter == 0 {
        return;
    }
    let key = RefusedKey {
        counter: packet.counter,
        reason: reason as u32,
    };
    match REFUSED.get_ptr_mut(&key) {
        // SAFETY: as in `passed`. User space removes the entry once its VIP is gone; whose it is next is then counted
        // for, once.
        Some(count) => unsafe { *count += 1 },
        // A full map is no reason to stop: `REASONS` has counted it.
        None => {
            let _ = REFUSED.insert(&key, &1, 0);
        }
    }
}
