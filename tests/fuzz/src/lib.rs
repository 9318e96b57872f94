//! Fuzz targets: what foreign bytes may do to each decoder, and packets to the kernel programs.
//!
//! A target is a function of bytes that panics where something that must hold does not. Two things drive it:
//! `cargo xtask fuzz TARGET`, which looks for new inputs by coverage (libFuzzer, in `main.rs`), and
//! `tests/smoke.rs`, which runs what was found before (`corpus/TARGET/`) and some thousand random inputs from a
//! fixed seed on every test run.
#![forbid(unsafe_code)]

mod address;
mod cni;
mod programs;
mod stream;
mod table;

/// One target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, and that of its folder in `corpus/`.
    pub name: &'static str,
    /// Runs one input; panics where it finds something.
    pub run: fn(&[u8]),
}

/// Every target; the last needs root.
pub const TARGETS: [Target; 6] = [
    Target {
        name: "address",
        run: address::run,
    },
    Target {
        name: "cni_config",
        run: cni::config,
    },
    Target {
        name: "cni_door",
        run: cni::door,
    },
    Target {
        name: "stream",
        run: stream::run,
    },
    Target {
        name: "table",
        run: table::run,
    },
    Target {
        name: "programs",
        run: programs::run,
    },
];

/// The target of a name; panics with all names where there is none.
#[must_use]
pub fn target(name: &str) -> Target {
    TARGETS
        .into_iter()
        .find(|target| target.name == name)
        .unwrap_or_else(|| {
            let names = TARGETS.map(|target| target.name).join(", ");
            panic!("no target {name:?}: one of {names}")
        })
}

/// Has `listener` told the sort of each packet's outcome, as a number.
pub fn listen(listener: fn(u64)) {
    // A second listener hears nothing.
    let _ = programs::LISTENER.set(listener);
}

/// Decodes JSON; what decodes must survive its own encoding.
///
/// # Panics
///
/// When it does not.
fn survives<T>(bytes: &[u8]) -> Option<T>
where
    T: serde::de::DeserializeOwned + serde::Serialize + PartialEq + std::fmt::Debug,
{
    let value: T = serde_json::from_slice(bytes).ok()?;
    let encoded = serde_json::to_vec(&value).expect("only string keys");
    let again: T = serde_json::from_slice(&encoded).expect("what we wrote we can read");
    assert_eq!(again, value);
    Some(value)
}
