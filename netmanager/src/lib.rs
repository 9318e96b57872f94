//! The NetManager: the daemon on every node that makes the kernel match the node's table.
//!
//! ```text
//!  agent --table--> [daemon] --plan--> [datapath] --> eBPF maps and programs
//!  weft-cni --unix socket--> [door] --> [attachments] --^      [links]: node endpoint, routes, guards
//!  peers <--> [wireguard], [probe] --round-trip times--^       [janitor]: flows, [metrics], [observe]: counters
//! ```
//!
//! What is decided ([`policy`], [`plan`], [`attachments`], [`routes`]) is pure and apart from what acts. The
//! daemon may die at any time: everything that forwards lives in the kernel and is taken over.

pub mod attachments;
pub mod cli;
pub mod daemon;
pub mod datapath;
pub mod door;
pub mod follow;
pub mod guard;
pub mod janitor;
pub mod links;
pub mod metrics;
pub mod observe;
pub mod plan;
pub mod policy;
pub mod probe;
pub mod quota;
pub mod routes;
pub mod store;
pub mod table_file;
pub mod tickle;
pub mod tunnel;
pub mod wireguard;
