//! What the kernel programs and user space must agree on.
//!
//! Everything here is `no_std`, allocates nothing and has no dependency, so that the same code runs in the
//! kernel programs and in the host tests that prove it:
//!
//! - [`addr`]: the semantic address codec (an address says mesh, kind, policy and number);
//! - [`layout`]: the bytes of every map key and value, under one [`layout::LAYOUT_VERSION`];
//! - [`mod@pick`]: how a flow is hashed and a slot is chosen;
//! - [`reason`]: why a packet was dropped or answered;
//! - [`splice`]: the bytes of the maps by which connections within a node are spliced.
//!
//! It does *not* read a packet: parsing and rewriting live with the programs.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod addr;
pub mod layout;
pub mod pick;
pub mod reason;
pub mod splice;
