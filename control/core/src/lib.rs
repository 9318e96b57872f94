//! The pure part of the control plane: no I/O, no clock, no randomness.
#![forbid(unsafe_code)]

pub mod assignment;
pub mod report;
