//! The plugin as a runtime sees it: the binary, started with an environment and stdin, against a fake
//! NetManager. One file per group of lines of the CNI 1.1 checklist.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test stops where it cannot go on")]

mod attach;
mod check;
mod door;
mod errors;
mod forget;
mod kill;
mod netns;
mod plugin;
mod version;
