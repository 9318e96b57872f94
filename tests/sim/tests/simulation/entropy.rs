//! Where the process gets its random numbers: from the seed.
//!
//! tokio picks the branch of a `select!` and std orders a `HashMap` by numbers from `getrandom(3)`. std calls it by
//! a weak symbol so that it can be replaced; here it is. Each thread has numbers of its own, so that a seed that
//! runs in a thread of its own always sees the same ones.

use std::{cell::RefCell, slice};

use crate::random::Random;

thread_local! {
    static NUMBERS: RefCell<Random> = const { RefCell::new(Random::new(0)) };
}

/// Gives the calling thread the random numbers of `seed`.
pub(crate) fn seed(seed: u64) {
    NUMBERS.set(Random::new(seed));
}

/// Fills `buffer` as `getrandom(3)` does, with numbers of the calling thread.
///
/// # Safety
/// `buffer` must be valid for writes of `length` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut u8, length: usize, _flags: u32) -> isize {
    // SAFETY: the caller says so, as it must by getrandom(3).
    let buffer = unsafe { slice::from_raw_parts_mut(buffer, length) };
    NUMBERS.with_borrow_mut(|numbers| {
        for byte in buffer {
            *byte = numbers.next().to_le_bytes()[0];
        }
    });
    length.cast_signed()
}
