//! The pure part of the control plane: no I/O, no clock, no randomness.
//!
//! ```text
//!  goal file --goal--> Application --Command--> log --base--> KnowledgeBase --table----> NodeTable (per node)
//!                                     ^                           |        `--assignment-> Assignment (per cluster)
//!                                     `---------- plan <----------'  (placement, migration)
//! ```
//!
//! The invariants kept here: a replica's Knowledge Base is a function of its log (I1), a VIP names one service
//! until it is released and drained (I2), an instance has one live binding outside its migration (I7).
#![forbid(unsafe_code)]

pub mod assignment;
pub mod backup;
pub mod base;
pub mod command;
pub mod goal;
pub mod index;
pub mod invitation;
pub mod migration;
pub mod name;
pub mod once;
pub mod placement;
pub mod plan;
pub mod quota;
pub mod report;
pub mod security;
pub mod table;
#[cfg(test)]
mod world;
