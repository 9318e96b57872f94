//! Wire types of the NetManager's doors, and nothing that acts on them.
//!
//! - [`cni`]: what the CNI plugin asks over the unix socket (one JSON request line, one JSON reply line);
//! - [`observe`]: what `weft flows` and `weft trace` ask over another;
//! - [`table`]: what a node must know, with its revision;
//! - [`conditions`]: load and network coordinates, beside the table;
//! - [`stream`]: what a node and its agent say to each other (feature `stream` adds the gRPC client and server,
//!   [`codec`] and the certificates' roles, [`identity`]).
//!
//! A change here changes what N and N-1 must both read: the golden files under `tests/golden` show it.
#![forbid(unsafe_code)]

pub mod cni;
#[cfg(feature = "stream")]
pub mod codec;
pub mod conditions;
#[cfg(feature = "stream")]
pub mod identity;
pub mod observe;
pub mod stream;
pub mod table;
