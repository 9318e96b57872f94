//! The lab: a whole mesh on one machine.
//!
//! ```text
//!   cloud-1  cloud-2  agent-cloud  lead-a        fog-1 ... lead-b          edge-1 ... lead-c
//!      `--------`--- router-cloud ---'             router-fog                router-edge
//!                        `---------------- wan -------'-------------------------'
//! ```
//!
//! Each name is a network namespace. The lab makes the machines, the links between them and the WAN's delays;
//! everything that runs in them is the product's own binary doing its job. Labs run beside each other: each
//! has an ID, and whatever the lab makes carries it (the namespaces `weft-ID-...`, the processes `WEFT_LAB=ID`
//! in their environment, everything else below the lab's folder), so that one is taken down by its ID alone,
//! also when whoever made it was killed.
#![forbid(unsafe_code)]

mod attach;
mod command;
mod down;
mod enter;
mod error;
mod folder;
mod ip;
mod machines;
mod mesh;
mod process;
mod spec;
mod status;
mod wan;

pub use command::LabCommand;
pub use error::LabError;
pub use wan::{DEVICE as WAN, forward_between};
