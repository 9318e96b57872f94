//! What comes to the engine from the agent's two streams.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use control_api::stream::{Assignments, Welcome};
use netmanager_api::{
    conditions::Conditions,
    stream::{FromNode, Hello},
    table::Table,
};
use tokio::sync::watch;

/// Where a node's stream takes its table from.
pub type TableSender = watch::Sender<Option<Arc<Table>>>;

/// One thing that happened outside.
#[derive(Debug)]
pub enum Event {
    /// A lead took the hello that was sent at `sent`.
    Welcomed {
        /// Session and lease.
        welcome: Welcome,
        /// When the hello was sent.
        sent: Instant,
    },
    /// The leader counted the renewal that was sent at `sent`.
    Renewed {
        /// How long it is good for.
        lease: Duration,
        /// When it was sent.
        sent: Instant,
    },
    /// A lead sent orders.
    Ordered(Assignments),
    /// A lead sent tables.
    Tabled(BTreeMap<String, Table>),
    /// A lead said how things stand.
    Conditions(Conditions),
    /// The stream to the lead is no more.
    Parted,
    /// A node's stream is up.
    Connected {
        /// The node.
        node: String,
        /// Its stream, greater than every earlier one.
        stream: u64,
        /// Who it says it is.
        hello: Hello,
        /// Takes its tables.
        tables: TableSender,
        /// Takes its conditions.
        conditions: watch::Sender<Conditions>,
    },
    /// A node said something.
    Said {
        /// The node.
        node: String,
        /// Its stream.
        stream: u64,
        /// What it said.
        message: FromNode,
    },
    /// A node's stream is no more.
    Broke {
        /// The node.
        node: String,
        /// Its stream.
        stream: u64,
    },
}
