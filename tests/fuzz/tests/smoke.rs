//! What was found before stays fixed, and some thousand random inputs find nothing: the same ones on every run.

use std::{fs, path::Path, thread};

use weft_fuzz::{TARGETS, Target, target};

/// Inputs per decoder; together a second.
const DECODED: u64 = 10_000;
/// Sequences of packets; together some seconds.
const SEQUENCES: u64 = 2_000;

/// Bytes that look random and are the same everywhere (splitmix64, S. Vigna).
fn bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    };
    (0..length.div_ceil(8))
        .flat_map(|_| next().to_le_bytes())
        .take(length)
        .collect()
}

fn corpus(target: Target) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target.name);
    let mut paths: Vec<_> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.expect("a readable folder").path())
        .collect();
    paths.sort();
    let read = |path| fs::read(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
    paths.into_iter().map(read).collect()
}

/// One input, shown where it finds something.
fn run(target: Target, input: &[u8]) {
    struct Shown<'a>(&'a [u8]);
    impl Drop for Shown<'_> {
        fn drop(&mut self) {
            if thread::panicking() {
                eprintln!("the input: b\"{}\"", self.0.escape_ascii());
            }
        }
    }
    let _shown = Shown(input);
    (target.run)(input);
}

/// Each input of the corpus, and `count` of it changed in up to four octets.
fn smoke(target: Target, count: u64) {
    let corpus = corpus(target);
    for input in &corpus {
        run(target, input);
    }
    for seed in 0..count {
        let random = bytes(seed, 16);
        let number = |at: usize| usize::from(u16::from_le_bytes([random[at], random[at + 1]]));
        let mut input = match corpus.get(number(0) % (corpus.len() + 1)) {
            Some(known) => known.clone(),
            None => bytes(!seed, number(2) % 700),
        };
        for at in (4..4 + 2 * (number(2) % 5)).step_by(2) {
            let length = input.len().max(1);
            if let Some(octet) = input.get_mut(number(at) % length) {
                *octet = random[at + 1] ^ random[at + 2];
            }
        }
        run(target, &input);
    }
}

#[test]
fn no_bytes_break_a_decoder() {
    for target in TARGETS
        .into_iter()
        .filter(|target| target.name != "programs")
    {
        smoke(target, DECODED);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn no_packets_break_the_programs_rules() {
    smoke(target("programs"), SEQUENCES);
}
