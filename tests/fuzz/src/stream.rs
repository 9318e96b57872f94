//! The messages of the node stream, in both directions.

use netmanager_api::stream::{FromNode, ToNode};

pub(crate) fn run(data: &[u8]) {
    crate::survives::<FromNode>(data);
    crate::survives::<ToNode>(data);
}
