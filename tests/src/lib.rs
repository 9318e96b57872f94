//! The harness of the integration tests: network namespaces, links between them, waiting, traffic, programs,
//! whole nodes.
//!
//! Every test makes its own machines and leaves none behind, also when it panics. The harness does *not*
//! skip: a capability that is missing fails the test that needs it.
#![forbid(unsafe_code)]

pub mod binary;
pub mod capture;
pub mod cgroup;
pub mod faults;
pub mod leads;
pub mod mesh;
pub mod netns;
pub mod pinned;
pub mod program;
pub mod raw;
pub mod steal;
pub mod still;
pub mod topology;
pub mod traffic;
pub mod wait;

pub use binary::binary;
pub use cgroup::Cgroup;
pub use netns::{Netns, Process};
pub use wait::{Stopwatch, wait_for};
