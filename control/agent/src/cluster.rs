//! The agent's state: what leads, nodes and the driver said, and what follows from it.
//!
//! ```text
//!  lead stream --.                     .--> driver (run, stop, forget)
//!  node streams --+--> Cluster --step--+--> report to the leads
//!  statuses -----'                     '--> tables to the nodes
//! ```
//!
//! No task, no socket, no file and no clock: the engine feeds it and carries out what it says.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use control_api::stream::{Assignments, Welcome};
use control_core::{
    assignment::Want,
    goal::Requests,
    report::{InstanceId, Report},
};
use netmanager_api::{
    conditions::{BackendLoad, Concern, Conditions, NodePlace, STALE},
    table::Table,
};
use serde::{Deserialize, Serialize};

use crate::{
    driver::{Driver, State, Statuses},
    load::{Loads, Used},
    nodes::{Known, Node, Nodes, Standing},
    reconcile::{Action, Contact, Ledger, Orders, Verdict, View, may_start, reconcile},
    report::report,
};

/// What the leads said, kept over restarts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Charge {
    /// The cluster's session.
    pub session: Option<u64>,
    /// How long a lease is.
    pub lease: Option<Duration>,
    /// The newest orders; `None` before the first.
    pub orders: Option<Assignments>,
}

/// What was kept over a restart.
#[derive(Clone, Debug, Default)]
pub struct Kept {
    /// What the leads said.
    pub charge: Charge,
    /// The nodes' tables.
    pub tables: BTreeMap<String, Table>,
    /// What the nodes said.
    pub known: BTreeMap<String, Known>,
    /// What was decided for good.
    pub ledger: Ledger,
    /// When the lease ends, if it has not ended while the agent was away.
    pub lease_ends: Option<Instant>,
}

/// The agent's state.
#[derive(Debug)]
pub struct Cluster {
    /// The nodes.
    pub nodes: Nodes,
    charge: Charge,
    orders: Option<Orders>,
    tables: BTreeMap<String, Arc<Table>>,
    /// What each node's table names.
    concerns: BTreeMap<String, Concern>,
    loads: Loads,
    /// What a lead said of the whole mesh, and when.
    heard: Option<(Conditions, Instant)>,
    ledger: Ledger,
    seen: BTreeMap<InstanceId, u64>,
    lease_ends: Option<Instant>,
    contact: Contact,
    cut_off: bool,
    hurried: BTreeSet<InstanceId>,
    started: Instant,
}

impl Cluster {
    /// The state at the agent's start.
    #[must_use]
    pub fn new(capacity: BTreeMap<String, Requests>, mut kept: Kept, now: Instant) -> Self {
        let nodes = capacity
            .into_iter()
            .map(|(name, capacity)| {
                let known = kept.known.remove(&name).unwrap_or_default();
                (name, Node::new(capacity, known, now))
            })
            .collect();
        let orders = kept.charge.orders.as_ref().map(by_id);
        let concerns = kept.tables.iter();
        let concerns = concerns
            .map(|(node, table)| (node.clone(), Concern::of(table)))
            .collect();
        let tables = kept.tables.into_iter();
        Self {
            concerns,
            loads: Loads::default(),
            heard: None,
            nodes,
            orders,
            charge: kept.charge,
            tables: tables
                .map(|(node, table)| (node, Arc::new(table)))
                .collect(),
            ledger: kept.ledger,
            seen: BTreeMap::new(),
            lease_ends: kept.lease_ends,
            contact: Contact::Settled,
            cut_off: false,
            hurried: BTreeSet::new(),
            started: now,
        }
    }

    /// A lead's welcome to the hello that was sent at `sent`.
    pub fn welcomed(&mut self, welcome: Welcome, sent: Instant) {
        let before = self.charge.session.replace(welcome.session);
        self.cut_off |= before.is_some_and(|before| before != welcome.session);
        self.hurried.clear();
        self.charge.lease = Some(welcome.lease());
        self.lease_ends = self.lease_ends.max(Some(sent + welcome.lease()));
        self.contact = Contact::AwaitsOrders;
    }

    /// The leader counted the renewal that was sent at `sent`.
    pub fn renewed(&mut self, lease: Duration, sent: Instant) {
        self.lease_ends = self.lease_ends.max(Some(sent + lease));
    }

    /// When the lease ends.
    #[must_use]
    pub fn lease_ends(&self) -> Option<Instant> {
        self.lease_ends
    }

    /// The stream to the lead broke: the agent goes on with what it has (I5).
    pub fn parted(&mut self) {
        if self.contact == Contact::AwaitsOrders && !self.cut_off {
            self.contact = Contact::Settled;
        }
    }

    /// Takes orders; `false` when they are older than what there is.
    pub fn ordered(&mut self, assignments: Assignments) -> bool {
        if self.contact == Contact::AwaitsOrders {
            self.contact = Contact::StopsFirst;
        }
        let have = self.charge.orders.as_ref().map(|orders| orders.revision);
        if have.is_some_and(|have| assignments.revision < have) {
            return false;
        }
        let orders = by_id(&assignments);
        self.ledger.verdicts.retain(|id, _| orders.contains_key(id));
        self.orders = Some(orders);
        self.charge.orders = Some(assignments);
        true
    }

    /// Takes tables; names the nodes whose table is newer now.
    pub fn tabled(&mut self, tables: BTreeMap<String, Table>) -> Vec<String> {
        let mut changed = Vec::new();
        for (node, table) in tables {
            let have = self.tables.get(&node);
            if have.is_none_or(|have| have.revision <= table.revision && **have != table) {
                self.concerns.insert(node.clone(), Concern::of(&table));
                self.tables.insert(node.clone(), Arc::new(table));
                changed.push(node);
            }
        }
        changed
    }

    /// A node's newest table.
    #[must_use]
    pub fn table(&self, node: &str) -> Option<Arc<Table>> {
        self.tables.get(node).cloned()
    }

    /// Takes what a lead said of load and coordinates in the whole mesh.
    pub fn heard(&mut self, conditions: Conditions, now: Instant) {
        self.heard = Some((conditions, now));
    }

    /// Takes a look at the processor time that the instances used.
    pub fn measure(&mut self, driver: &impl Driver, now: Instant) {
        let orders = self.orders.as_ref();
        let asked = |id: &InstanceId| match &orders?.get(id)?.want {
            Want::Run(run) => Some(run.requests.cpu.as_milli()),
            Want::Stop => None,
        };
        let used: BTreeMap<InstanceId, Used> = driver
            .used()
            .into_iter()
            .filter_map(|(id, time)| {
                let cpu_milli = asked(&id)?;
                Some((id, Used { time, cpu_milli }))
            })
            .collect();
        self.loads.measure(&used, now);
    }

    /// Where this cluster's nodes are, and how loaded its instances.
    #[must_use]
    pub fn own_conditions(&self, now: Instant) -> Conditions {
        let ready = self
            .nodes
            .iter()
            .filter(|(_, node)| node.standing(now) == Standing::Ready);
        let nodes = ready
            .filter_map(|(name, node)| {
                Some(NodePlace {
                    node: self.tables.get(name)?.node.number,
                    coordinate: node.measured.coordinate?,
                })
            })
            .collect();
        let loads = self
            .loads
            .told()
            .filter_map(|(id, percent)| {
                let endpoint = self.nodes.values().find_map(|node| node.endpoint(id))?;
                let addr6 = endpoint.addr6;
                Some(BackendLoad { addr6, percent })
            })
            .collect();
        Conditions { nodes, loads }
    }

    /// What `node` should know: of this cluster what `own` says, of the others what a lead said, unless that is too
    /// old. Without a lead the node goes on with its own cluster's.
    #[must_use]
    pub fn conditions(&self, node: &str, own: &Conditions, now: Instant) -> Conditions {
        let Some(concern) = self.concerns.get(node) else {
            return Conditions::default();
        };
        let heard = self.heard.as_ref();
        let fresh = heard.filter(|(_, at)| now.saturating_duration_since(*at) < STALE);
        let others = fresh.map(|(conditions, _)| conditions.clone().of(concern));
        others.unwrap_or_default().joined(own.clone().of(concern))
    }

    /// What the leads said.
    #[must_use]
    pub fn charge(&self) -> &Charge {
        &self.charge
    }

    /// What was decided for good.
    #[must_use]
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// The newest state of the Knowledge Base that the agent saw, (incarnation, log index).
    #[must_use]
    pub fn revision(&self) -> Option<(u64, u64)> {
        let orders = self.charge.orders.as_ref().map(|orders| orders.revision);
        let tables = self.tables.values().map(|table| table.revision);
        let newest = tables
            .map(|revision| (revision.incarnation, revision.index))
            .max();
        orders.max(newest)
    }

    /// Everything as one view.
    #[must_use]
    pub fn view<'a>(&'a self, statuses: &'a Statuses, now: Instant) -> View<'a> {
        View {
            orders: self.orders.as_ref(),
            statuses,
            nodes: &self.nodes,
            ledger: &self.ledger,
            seen: &self.seen,
            started: self.started,
            lease_ends: self.lease_ends,
            lease: self.charge.lease,
            contact: self.contact,
            cut_off: self.cut_off,
            hurried: &self.hurried,
            now,
        }
    }

    /// Does what is to be done now, through `driver`; says what to report.
    pub fn step(&mut self, driver: &impl Driver, now: Instant) -> Report {
        let receiver = driver.statuses();
        loop {
            let statuses = receiver.borrow().clone();
            self.observe(&statuses, now);
            let actions = reconcile(&self.view(&statuses, now));
            let verdict = actions
                .iter()
                .any(|action| matches!(action, Action::GiveUp { .. }));
            for action in &actions {
                self.act(driver, action);
            }
            // Every action shows in the statuses or the ledger; when none did, the next change wakes the engine.
            if !verdict && *receiver.borrow() == statuses {
                return report(&self.view(&statuses, now));
            }
        }
    }

    /// Remembers in which life each instance was seen well, and whether the stops that come first are done.
    fn observe(&mut self, statuses: &Statuses, now: Instant) {
        for (id, status) in statuses {
            let node = self.nodes.get(&status.node);
            let ready = node.is_some_and(|node| node.standing(now) == Standing::Ready);
            if ready && status.state == State::Serving {
                self.seen.insert(id.clone(), status.life);
            }
        }
        let orders = self.orders.as_ref();
        let wanted = |id: &InstanceId| orders.is_some_and(|orders| orders.contains_key(id));
        self.seen.retain(|id, _| statuses.contains_key(id));
        self.ledger
            .booked
            .retain(|id, _| statuses.contains_key(id) || wanted(id));
        let settled = match orders {
            Some(orders) => may_start(&self.view(statuses, now), orders),
            None => false,
        };
        if settled {
            self.contact = Contact::Settled;
            self.cut_off = false;
            self.hurried.clear();
        }
    }

    fn act(&mut self, driver: &impl Driver, action: &Action) {
        match action {
            Action::Stop { id, grace } => {
                tracing::info!(instance = %show(id), ?grace, "stopping an instance");
                driver.stop(id, *grace);
                if self.cut_off {
                    self.hurried.insert(id.clone());
                }
            }
            Action::Forget { id } => {
                tracing::info!(instance = %show(id), "forgetting an instance");
                driver.forget(id);
            }
            Action::GiveUp { id, verdict } => {
                match verdict {
                    Verdict::Refused(reason) => {
                        tracing::warn!(instance = %show(id), reason, "refusing an instance");
                    }
                    Verdict::Fenced => {
                        tracing::warn!(instance = %show(id), "fencing an instance: the lease ended");
                    }
                }
                self.ledger.verdicts.insert(id.clone(), verdict.clone());
            }
            Action::Run { id, node } => {
                let order = self.orders.as_ref().and_then(|orders| orders.get(id));
                let Some(Want::Run(run)) = order.map(|order| &order.want) else {
                    return; // Only what the orders ask for is ever run.
                };
                tracing::info!(instance = %show(id), node, "running an instance");
                driver.run(id, node, run);
                self.ledger.booked.insert(id.clone(), run.requests);
            }
        }
    }
}

fn by_id(assignments: &Assignments) -> Orders {
    let list = assignments.list.iter();
    list.map(|order| (order.id.clone(), order.clone()))
        .collect()
}

/// An instance as people write it.
fn show(id: &InstanceId) -> String {
    format!("{}#{}@{}", id.service, id.instance, id.epoch)
}
