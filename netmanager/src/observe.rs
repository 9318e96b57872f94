//! What a person or a scraper sees of the data path.
//!
//! The kernel counts and reports by numbers; [`Names`] says what they stand for. Only the daemon knows all of
//! it, so it is asked ([`Ask`]), and makes an answer only when somebody asks.

use std::sync::Arc;

use tokio::sync::oneshot;

mod names;

pub use names::{BackendName, Names, VipName};

/// What is asked of the daemon.
#[derive(Debug)]
pub enum Ask {
    /// What the numbers stand for now.
    Names(oneshot::Sender<Arc<Names>>),
}
