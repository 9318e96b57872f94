//! The corners of the data path, with real packets between real nodes. What each mesh's watch sees on the
//! underlay is part of every test.

#![expect(
    clippy::unwrap_used,
    reason = "a step of a test that fails, fails the test, here as in its body"
)]

#[path = "corners/clear_text.rs"]
mod clear_text;
#[path = "corners/clients.rs"]
mod clients;
#[path = "corners/flows.rs"]
mod flows;
#[path = "corners/foreign.rs"]
mod foreign;
#[path = "corners/host.rs"]
mod host;
#[path = "corners/refusals.rs"]
mod refusals;
#[path = "corners/spoof.rs"]
mod spoof;
