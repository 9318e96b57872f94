//! The agent's one loop: feeds the [`Cluster`] and carries out what follows.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use control_core::report::Report;
use netmanager_api::{
    conditions::{Conditions, REPEAT},
    identity::RevokedList,
};
use tokio::{
    sync::{mpsc, watch},
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use crate::{
    cluster::Cluster,
    driver::Driver,
    event::{Event, TableSender},
    lead::Outbox,
    now,
    reconcile::Ledger,
    store::Store,
};

/// How often the load is looked at, and conditions that changed are told.
const CONDITIONS: Duration = Duration::from_secs(2);

/// One node's stream.
#[derive(Debug)]
struct ToNode {
    tables: TableSender,
    conditions: Teller,
}

/// Tells conditions when they changed, and again after [`REPEAT`].
#[derive(Debug)]
struct Teller {
    sender: watch::Sender<Conditions>,
    told: Option<Instant>,
}

impl Teller {
    fn new(sender: watch::Sender<Conditions>) -> Self {
        Self { sender, told: None }
    }

    fn tell(&mut self, conditions: Conditions, now: Instant) {
        let again = self
            .told
            .is_none_or(|told| now.saturating_duration_since(told) >= REPEAT);
        if again || *self.sender.borrow() != conditions {
            self.sender.send_replace(conditions);
            self.told = Some(now);
        }
    }
}

/// The loop and all that it drives.
#[derive(Debug)]
pub struct Engine<D> {
    /// The state.
    pub cluster: Cluster,
    /// What runs the instances.
    pub driver: D,
    /// What outlives a restart.
    pub store: Store,
    /// What the streams say.
    pub events: mpsc::Receiver<Event>,
    /// What the lead client says on.
    pub outbox: watch::Sender<Outbox>,
    /// What it says of load and coordinates.
    pub conditions: watch::Sender<Conditions>,
    /// The certificates that count no more, as the leads say.
    pub revoked: RevokedList,
}

impl<D: Driver> Engine<D> {
    /// Runs until `shutdown`, or until nobody can say anything any more. What the driver runs goes on.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut statuses = self.driver.statuses();
        let mut streams: BTreeMap<String, ToNode> = BTreeMap::new();
        let mut leads = Teller::new(self.conditions.clone());
        let mut looks = interval(CONDITIONS);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ledger = self.cluster.ledger().clone();
        let mut reported = Arc::new(Report::default());
        loop {
            let now = now();
            statuses.mark_unchanged();
            let report = self.cluster.step(&self.driver, now);
            self.keep_ledger(&mut ledger);
            self.publish(report, &mut reported);
            let wakes = {
                let current = statuses.borrow();
                self.cluster.view(&current, now).wakes()
            };
            let wake = async {
                match wakes {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = wake => {}
                _ = looks.tick() => self.tell(&mut leads, &mut streams),
                changed = statuses.changed() => if changed.is_err() { return },
                event = self.events.recv() => {
                    let Some(event) = event else { return };
                    self.take(event, &mut streams);
                    // What waits already is taken in one go: one report for many messages.
                    while let Ok(event) = self.events.try_recv() {
                        self.take(event, &mut streams);
                    }
                }
            }
        }
    }

    /// Looks at the load, and tells leads and nodes how things stand.
    fn tell(&mut self, leads: &mut Teller, streams: &mut BTreeMap<String, ToNode>) {
        let now = now();
        self.cluster.measure(&self.driver, now);
        let own = self.cluster.own_conditions(now);
        for (node, stream) in streams {
            let conditions = self.cluster.conditions(node, &own, now);
            stream.conditions.tell(conditions, now);
        }
        leads.tell(own, now);
    }

    fn take(&mut self, event: Event, streams: &mut BTreeMap<String, ToNode>) {
        let now = now();
        match event {
            Event::Welcomed { welcome, sent } => {
                self.cluster.welcomed(welcome, sent);
                self.keep_lease(now);
                self.store.keep_charge(self.cluster.charge());
            }
            Event::Renewed { lease, sent } => {
                self.cluster.renewed(lease, sent);
                self.keep_lease(now);
            }
            Event::Ordered(assignments) => {
                let revision = assignments.revision;
                let revoked = assignments.revoked.clone();
                if self.cluster.ordered(assignments) {
                    self.revoked.set(revoked);
                    self.store.keep_charge(self.cluster.charge());
                } else {
                    tracing::info!(
                        ?revision,
                        "ignoring orders that are older than those at hand"
                    );
                }
            }
            Event::Tabled(newer) => {
                for node in self.cluster.tabled(newer) {
                    let table = self.cluster.table(&node);
                    if let Some(table) = &table {
                        self.store.keep_table(&node, table);
                    }
                    if let Some(stream) = streams.get(&node) {
                        stream.tables.send_replace(table);
                    }
                }
            }
            Event::Conditions(conditions) => self.cluster.heard(conditions, now),
            Event::Parted => self.cluster.parted(),
            Event::Connected {
                node,
                stream,
                hello,
                tables,
                conditions,
            } => {
                tracing::info!(node, applied = ?hello.applied, version = hello.version, "a node is here");
                tables.send_replace(self.cluster.table(&node));
                let conditions = Teller::new(conditions);
                streams.insert(node.clone(), ToNode { tables, conditions });
                if let Some(state) = self.cluster.nodes.get_mut(&node) {
                    state.connected(stream, hello, now);
                    self.store.keep_known(&node, &state.known);
                }
            }
            Event::Said {
                node,
                stream,
                message,
            } => {
                if let Some(state) = self.cluster.nodes.get_mut(&node) {
                    let before = state.known.clone();
                    state.said(stream, message, now);
                    if state.known != before {
                        self.store.keep_known(&node, &state.known);
                    }
                }
            }
            Event::Broke { node, stream } => {
                let state = self.cluster.nodes.get_mut(&node);
                if state.is_some_and(|state| state.broke(stream, now)) {
                    tracing::warn!(node, "a node is away");
                    streams.remove(&node);
                }
            }
        }
    }

    fn keep_lease(&self, now: Instant) {
        let end = self.cluster.lease_ends();
        let left = end.and_then(|end| end.checked_duration_since(now));
        self.store.keep_lease(left.unwrap_or_default());
    }

    fn keep_ledger(&self, kept: &mut Ledger) {
        if self.cluster.ledger() != kept {
            kept.clone_from(self.cluster.ledger());
            self.store.keep_ledger(kept);
        }
    }

    fn publish(&self, report: Report, reported: &mut Arc<Report>) {
        if **reported != report {
            *reported = Arc::new(report);
        }
        self.outbox.send_if_modified(|outbox| {
            let changed = outbox.report.as_ref() != Some(&*reported);
            outbox.report = Some(reported.clone());
            outbox.revision = self.cluster.revision();
            outbox.session = self.cluster.charge().session;
            changed
        });
    }
}
