//! The engine: libFuzzer, for the target that `WEFT_FUZZ_TARGET` names. `cargo xtask fuzz` builds and runs it.
#![no_main]

use std::sync::{
    LazyLock,
    atomic::{AtomicU8, Ordering},
};

use weft_fuzz::{Target, listen, target};

/// What libFuzzer counts as coverage beside its own counters: it clears and reads the section around each run.
// SAFETY: the section holds nothing but counters of one byte, as libFuzzer expects it.
#[unsafe(link_section = "__libfuzzer_extra_counters")]
static OUTCOMES: [AtomicU8; 1 << 14] = [const { AtomicU8::new(0) }; 1 << 14];

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    listen(|outcome| {
        OUTCOMES[(outcome % (1 << 14)) as usize].store(1, Ordering::Relaxed);
    });
    target(&std::env::var("WEFT_FUZZ_TARGET").expect("WEFT_FUZZ_TARGET names a target"))
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    (TARGET.run)(data);
});
