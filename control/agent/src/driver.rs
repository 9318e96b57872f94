//! What the agent needs of whatever runs instances: one trait, told by orders, seen by statuses.
//!
//! Orders return at once and may come again; what became of them shows in [`Driver::statuses`]. The driver
//! restarts a process that ends, on the node it was given; choosing nodes, and when an instance is given up, is
//! the agent's. What a driver runs outlives the agent: a new driver over the same run directory adopts it.
//!
//! ```text
//!  run --> Starting --> Serving <--> Silent
//!             |  ^         |           |
//!             |  '----- Restarting <---'       stop --> Stopping --> Gone --> (forget)
//!             '--> Refused
//! ```

pub mod life;
pub mod local;

use std::{collections::BTreeMap, time::Duration};

use control_core::{assignment::Run, report::InstanceId};
use tokio::sync::watch;

/// Every instance that the driver knows, until it is told to forget it.
pub type Statuses = BTreeMap<InstanceId, Status>;

/// Runs instances on the nodes of one cluster.
pub trait Driver: Send + Sync + 'static {
    /// The instance runs on `node` from now on. Nothing happens if it is on that node already and not
    /// [`State::Gone`]; one that is `Gone` or `Refused` starts afresh, on any node.
    fn run(&self, id: &InstanceId, node: &str, run: &Run);

    /// The instance stops: the polite signal, after `grace` the last one, then it is detached. Ends in
    /// [`State::Gone`], also when the driver never knew it; a shorter grace replaces a longer one.
    fn stop(&self, id: &InstanceId, grace: Duration);

    /// Drops what is remembered of an instance that is `Gone` or `Refused`.
    fn forget(&self, id: &InstanceId);

    /// Processor time that each serving instance has used so far; none where the host does not count it.
    fn used(&self) -> BTreeMap<InstanceId, Duration>;

    /// The statuses, now and whenever one changes.
    fn statuses(&self) -> watch::Receiver<Statuses>;
}

/// How it stands with an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The node it was given; empty for one that was stopped before it ran.
    pub node: String,
    /// How far it is.
    pub state: State,
    /// Counts up with every start of its process: an instance that answers again is another life.
    pub life: u64,
    /// Why it does not serve, for people; empty when it does.
    pub reason: String,
}

/// How far an instance is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// It is being attached or started, and has not answered yet.
    Starting,
    /// Its process runs and takes connections on all its ready ports.
    Serving,
    /// Its process runs, but it does not answer any more.
    Silent,
    /// Its process has ended; another one starts after a back-off.
    Restarting,
    /// It cannot be run here (no such command, no such node), and nothing of it runs.
    Refused,
    /// It is being stopped.
    Stopping,
    /// No process of it is left, no attachment, and none will come back by itself.
    Gone,
}
