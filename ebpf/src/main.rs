//! Weft's kernel programs.
//!
//! ```text
//!  pod's veth, node endpoint --ingress--> weft_dispatch_pod ----tail call--> weft_pod
//!  tunnel device (no Ethernet) -ingress-> weft_dispatch_tunnel -tail call--> weft_tunnel
//! ```
//!
//! A dispatcher stays with its link for life; what it calls is one slot of `PROGRAMS`, so that one map update
//! switches a whole node. Every packet ends in a verdict: on its way, answered, or dropped with a counted
//! reason. Nothing is passed to the host's stack, and an empty slot drops.
//!
//! The maps are described in `ebpf_common::layout`.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![expect(
    internal_features,
    reason = "stable Rust has no atomic addition for BPF: its targets have no compare-and-swap"
)]

mod address;
mod atomic;
mod count;
mod csum;
mod deliver;
mod error;
mod flow;
mod fragment;
mod header;
mod hold;
mod log;
mod maps;
mod mss;
mod parse;
mod pod;
mod refuse;
mod skb;
mod splice;
mod translate;
mod tunnel;
mod vip;

use aya_ebpf::{bindings::TC_ACT_SHOT, macros::classifier, programs::TcContext};
use ebpf_common::{
    layout::{PROGRAM_POD, PROGRAM_TUNNEL},
    reason::Reason,
};

use crate::skb::Skb;

/// The stable program of every link of an endpoint.
#[classifier]
pub(crate) fn weft_dispatch_pod(context: TcContext) -> i32 {
    maps::call(&context, PROGRAM_POD).unwrap_or(TC_ACT_SHOT)
}

/// The stable program of the tunnel device.
#[classifier]
pub(crate) fn weft_dispatch_tunnel(context: TcContext) -> i32 {
    maps::call(&context, PROGRAM_TUNNEL).unwrap_or(TC_ACT_SHOT)
}

/// What an endpoint sends. Where the connections are too many, it starts over after one has given way; the
/// kernel bounds how often (33 tail calls).
#[classifier]
#[inline(always)]
pub(crate) fn weft_pod(context: TcContext) -> i32 {
    let mut skb = Skb::new(context);
    // All of it is inlined, and no closure: a tail call is not allowed in a function of its own without BTF.
    match pod::from_endpoint(&mut skb) {
        Ok(action) => action,
        Err(reason) => {
            if reason == Reason::FlowTableFull && flow::make_room() {
                skb.start_over(PROGRAM_POD);
            }
            refused(&mut skb, reason)
        }
    }
}

/// What comes out of the tunnel.
#[classifier]
pub(crate) fn weft_tunnel(context: TcContext) -> i32 {
    let mut skb = Skb::new(context);
    tunnel::from_tunnel(&mut skb).unwrap_or_else(|reason| refused_peer(&mut skb, reason))
}

/// Counts a packet of an endpoint, and answers it where its sender is owed an answer.
#[inline(never)]
fn refused(skb: &mut Skb, reason: Reason) -> i32 {
    if reason == Reason::Held {
        return lost(skb, reason);
    }
    refuse::answer(skb, reason).map_or_else(|| dropped(reason), |action| counted(reason, action))
}

/// The same for a packet of the tunnel.
#[inline(never)]
fn refused_peer(skb: &mut Skb, reason: Reason) -> i32 {
    if reason == Reason::Held {
        return lost(skb, reason);
    }
    refuse::answer_peer(skb, reason)
        .map_or_else(|| dropped(reason), |action| counted(reason, action))
}

#[inline(always)]
fn counted(reason: Reason, action: i32) -> i32 {
    maps::count(reason);
    count::refused(reason);
    log::refused(reason);
    action
}

/// Counts a packet and drops it, unless it is to come again.
#[inline(always)]
fn lost(skb: &Skb, reason: Reason) -> i32 {
    match reason {
        Reason::Held => counted(reason, skb.requeue()),
        _ => dropped(reason),
    }
}

#[inline(always)]
fn dropped(reason: Reason) -> i32 {
    counted(reason, TC_ACT_SHOT)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
