//! Wire types of the leads' doors, and nothing that acts on them.
//!
//! - [`http`]: what users and tools say to any lead;
//! - [`stream`]: what an agent and the leads say to each other;
//! - [`join`]: how a cluster joins, and how its agent's certificate is renewed.
//!
//! A change here changes what N and N-1 must both read: the golden files under `tests/snapshots` show it.
#![forbid(unsafe_code)]

pub mod http;
pub mod join;
pub mod stream;
