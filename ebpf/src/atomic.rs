//! The atomic operations that the programs need, each one instruction (`BPF_ATOMIC` with `BPF_FETCH`, since
//! Linux 5.12).

use core::intrinsics::{AtomicOrdering, atomic_and, atomic_cxchg, atomic_or, atomic_xadd};

/// Adds to a word of map memory.
///
/// # Safety
///
/// `word` is aligned and lies in map memory.
#[inline(always)]
pub(crate) unsafe fn add(word: *mut u64, value: u64) {
    // SAFETY: the caller's promise.
    let _ = unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(word, value) };
}

/// Sets bits of a word of map memory; what it was before.
///
/// # Safety
///
/// As for [`add`].
#[inline(always)]
pub(crate) unsafe fn or(word: *mut u64, bits: u64) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { atomic_or::<u64, u64, { AtomicOrdering::Relaxed }>(word, bits) }
}

/// Keeps only the bits `bits` of a word of map memory; what it was before.
///
/// # Safety
///
/// As for [`add`].
#[inline(always)]
pub(crate) unsafe fn and(word: *mut u64, bits: u64) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { atomic_and::<u64, u64, { AtomicOrdering::Relaxed }>(word, bits) }
}

/// Makes a word of map memory `new` where it is `old`; whether it was. Orders what is written before and after it.
///
/// # Safety
///
/// As for [`add`].
#[inline(always)]
pub(crate) unsafe fn exchange(word: *mut u64, old: u64, new: u64) -> bool {
    // SAFETY: the caller's promise.
    let (_, was) = unsafe {
        atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(word, old, new)
    };
    was
}
