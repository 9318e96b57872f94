//! What a person or a scraper sees of the data path.
//!
//! ```text
//!  weft flows, trace --unix socket--> [door] --Order--> [follow]: the ring's reader --> events with names
//!                                       |                  |
//!                                       +-------Ask--------+--> daemon: names, traces     [probe]: a marked packet
//! ```
//!
//! The kernel counts and reports by numbers; [`Names`] says what they stand for. Only the daemon knows all of
//! it, so it is asked ([`Ask`]), and makes an answer only when somebody asks. [`mod@trace`] walks the maps as the
//! programs do, by the same picking code.

use std::sync::Arc;

use netmanager_api::observe::TraceRequest;
use tokio::sync::oneshot;

mod door;
mod follow;
mod names;
mod probe;
mod told;
pub mod trace;

pub use door::serve;
pub(crate) use names::pod_name;
pub use names::{BackendName, NODE, Names, VipName};
pub use probe::{Plan, Traced};
pub use told::told;

/// What is asked of the daemon.
#[derive(Debug)]
pub enum Ask {
    /// What the numbers stand for, by the last table.
    Names(oneshot::Sender<Arc<Names>>),
    /// What would become of a packet.
    Trace(TraceRequest, oneshot::Sender<Result<Traced, String>>),
}
