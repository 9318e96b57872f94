//! The Knowledge Base: the replicated state and the one function that changes it.
//!
//! ```text
//!  log entry --apply(index, batch)--> state' and one Outcome per command
//! ```
//!
//! `apply` is total (any batch gives an outcome, none panics) and deterministic (I1): it reads nothing but the
//! state and the entry. What it decides about numbers is in [`Numbers`]; where things run is decided by who
//! proposes, and only rechecked here.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, Ipv6Addr},
};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

pub use self::numbers::Numbers;
use crate::{
    command::{Applied, Batch, Command, Outcome, Refusal},
    goal::{Application, PolicyName, Port, Requests, Writers},
    index::{Index, Touch},
    migration::Migration,
    name::{AppName, Name, ServiceName, Slot},
    once::{KEY_LIMIT, Memory, Once},
    placement::Decision,
    quota::Quota,
    report::{ClusterFacts, EndpointFact, InstanceId, NodeReport, Phase},
    security::Security,
    table::Revision,
};

mod cluster;
mod numbers;
mod restore;
mod services;
mod slots;
#[cfg(test)]
mod tests;

/// How long a draining binding may keep its flows, unless they end before, milliseconds.
pub const DRAIN_MS: u64 = 10_000;
/// How long an instance may take to stop, milliseconds.
pub const STOP_GRACE_MS: u64 = 5_000;
/// The last time and the last epoch that there are: far away, and far from where sums of them end.
pub(crate) const LAST: u64 = 1 << 53;
/// How long a cluster is not tried again for a service that did not become ready there, milliseconds.
const BARRED_MS: u64 = 600_000;
/// How long IPv4 numbers and blocks rest after use (DESIGN section 3), milliseconds.
pub const REST_MS: u64 = 600_000;

/// All that the leads know.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnowledgeBase {
    /// The mesh; `None` before the first command.
    pub mesh: Option<Mesh>,
    /// Index of the last log entry that was applied.
    pub index: u64,
    /// Index of the last entry that changed what a node's table may show.
    pub tables_index: u64,
    /// Log time, milliseconds since the Unix epoch; never goes back.
    pub log_time_ms: u64,
    /// The epoch that the next binding gets; epochs are unique in the mesh, and for ever.
    pub next_epoch: u64,
    /// The clusters.
    pub clusters: BTreeMap<Name, Cluster>,
    /// The applications.
    pub applications: BTreeMap<AppName, AppState>,
    /// The services of all applications.
    pub services: BTreeMap<ServiceName, Service>,
    /// The bindings of every slot, by epoch; without empty entries.
    pub slots: BTreeMap<Slot, BTreeMap<u64, Binding>>,
    /// The last migration of each slot, running or ended.
    pub migrations: BTreeMap<Slot, Migration>,
    /// Instances that a cluster must stop when it is reached again.
    pub owed_stops: BTreeMap<Name, BTreeSet<InstanceId>>,
    /// The numbers in use and at rest.
    pub numbers: Numbers,
    /// The feature level that every lead has: commands of a higher one are not proposed.
    #[serde(default)]
    pub level: u32,
    /// Log time until which instances that nobody bound are adopted; 0 unless this state was restored.
    #[serde(default)]
    pub adopt_until_ms: u64,
    /// What came of the last requests.
    #[serde(default)]
    pub memory: Memory,
    /// Tokens, revocations, and who changed what.
    #[serde(default)]
    pub security: Security,
    /// How much the goals of a namespace may ask for.
    #[serde(default)]
    pub quotas: BTreeMap<Name, Quota>,
    /// What would have to be searched for; it follows from the rest.
    #[serde(skip)]
    pub lookup: Index,
}

/// The mesh as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mesh {
    /// Its name.
    pub name: String,
    /// The ULA /48.
    pub prefix6: Ipv6Net,
    /// The IPv4 space, /12 to /16; `None` where it is off.
    pub prefix4: Option<Ipv4Net>,
    /// Seed of the flow hash.
    pub seed: u64,
    /// Raised by restore and recovery.
    #[serde(default)]
    pub incarnation: u64,
    /// How long a cluster may be silent before it is lost, milliseconds.
    #[serde(default = "default_lease_ms")]
    pub lease_ms: u64,
}

fn default_lease_ms() -> u64 {
    10_000
}

/// One cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// What its operator says of it.
    pub facts: ClusterFacts,
    /// The session of its agent.
    pub session: u64,
    /// Whether its agent renews its lease.
    pub state: ClusterState,
    /// Why the cluster has no IPv4 of the mesh's; `None` where it has.
    pub without_ipv4: Option<String>,
    /// Log time of the last report in this session; 0 before the first.
    pub reported_ms: u64,
    /// Log time since which its operator wants it empty: it gets nothing new, and what runs there moves away.
    #[serde(default)]
    pub drained_since_ms: Option<u64>,
    /// Log time since which its operator wants it out of the mesh.
    #[serde(default)]
    pub leaving_since_ms: Option<u64>,
    /// When the certificate ends that its agent was last seen to have, milliseconds since the Unix epoch.
    #[serde(default)]
    pub certificate_ends_ms: Option<u64>,
    /// Its nodes by name.
    pub nodes: BTreeMap<String, Node>,
}

/// Whether a cluster's agent renews its lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClusterState {
    /// It does.
    Ready,
    /// It does not.
    Lost {
        /// Log time at which it was found.
        since_ms: u64,
    },
}

/// One node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its number in endpoint addresses; never used again.
    pub number: u32,
    /// Its /27 blocks by number, each with the log time since which no address of it is in use.
    pub blocks4: BTreeMap<u32, Option<u64>>,
    /// Log time since which its agent no longer reports it.
    pub absent_since_ms: Option<u64>,
    /// Log time since which its NetManager is not ready; `None` while it is.
    pub not_ready_since_ms: Option<u64>,
    /// The last report.
    pub report: NodeReport,
}

/// One application.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppState {
    /// What its owner wants.
    pub spec: Application,
    /// Raised by every change of `spec`.
    pub generation: u64,
    /// Log time of the last change of `spec`.
    pub changed_ms: u64,
}

/// One service, as far as it is not in the specification.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Its number in IPv6 VIPs.
    pub number6: u32,
    /// Its number in IPv4 VIPs, for all policies but `instance`.
    pub number4: Option<u32>,
    /// Its numbers in the IPv4 VIPs of policy `instance`, by slot.
    pub instance4: BTreeMap<u32, u32>,
    /// What a new instance of it runs.
    pub template: Template,
    /// Why its slots are where they are: the last decision about each, by instance; none about one that an operator
    /// moved.
    #[serde(default)]
    pub decisions: BTreeMap<u32, Decision>,
    /// Clusters that are not tried in this generation.
    pub refused_by: BTreeMap<Name, RefusedBy>,
}

/// Why a cluster is not tried for a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedBy {
    /// In the cluster's words, or what was seen.
    pub reason: String,
    /// Log time from which it is tried again; `None`: not in this generation.
    pub until_ms: Option<u64>,
}

/// What an instance runs; a change of it makes a new instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Template {
    /// Container image.
    pub image: Option<String>,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Environment, as the user wrote it.
    pub env: BTreeMap<String, String>,
    /// Its ports.
    pub ports: Vec<Port>,
    /// What it needs.
    pub requests: Requests,
    /// Whether copies may overlap.
    pub writers: Writers,
    /// The services that it calls, whose addresses it is told.
    pub calls: BTreeSet<ServiceName>,
}

/// One life of a slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binding {
    /// Where it runs.
    pub cluster: Name,
    /// The cluster's session when it was bound.
    pub session: u64,
    /// The application's generation when it was bound.
    pub generation: u64,
    /// What it runs.
    pub template: Template,
    /// Whether it takes traffic.
    pub state: BindingState,
    /// Log time at which it was bound.
    pub since_ms: u64,
    /// How far it is, as last reported.
    pub phase: Phase,
    /// Log time of the last change of `phase`.
    pub phase_since_ms: u64,
    /// Why it is not running, for people.
    pub reason: String,
    /// Its node; empty until one is chosen.
    pub node: String,
    /// Its endpoint, once attached.
    pub endpoint: Option<EndpointFact>,
}

/// Whether a binding takes traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BindingState {
    /// It takes new flows when it is ready.
    Active,
    /// The target of a migration: nodes only try to reach it.
    Probing,
    /// It keeps its flows and gets no new ones.
    Draining {
        /// Log time at which it is stopped all the same.
        deadline_ms: u64,
    },
    /// It must stop; gone when its agent says so.
    Stopping,
}

/// A semantic service IP of a service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Vip {
    /// How it picks a backend.
    pub policy: PolicyName,
    /// The slot's number, for policy `instance`.
    pub instance: Option<u32>,
    /// Its IPv6 address.
    pub addr6: Ipv6Addr,
    /// Its IPv4 address, where the mesh has IPv4.
    pub addr4: Option<Ipv4Addr>,
}

impl KnowledgeBase {
    /// Carries out one entry of the log; one outcome per command, in order.
    pub fn apply(&mut self, index: u64, entry: &Batch) -> Vec<Outcome> {
        self.index = self.index.max(index);
        self.log_time_ms = self.log_time_ms.max(entry.log_time_ms.min(LAST));
        let outcomes = entry
            .commands
            .iter()
            .map(|command| self.apply_one(command))
            .collect();
        self.rest();
        self.settle();
        outcomes
    }

    pub(crate) fn apply_one(&mut self, command: &Command) -> Outcome {
        if let Command::InitMesh(mesh) = command {
            return self.init_mesh(mesh);
        }
        if self.mesh.is_none() {
            return Err(Refusal::NoMesh);
        }
        if command.changes_facts() {
            self.lookup.touch_facts(self.index);
        }
        match command {
            Command::InitMesh(_) | Command::Tick => Ok(Applied::Unchanged),
            Command::RegisterCluster {
                cluster,
                session,
                facts,
            } => self.register_cluster(cluster, *session, facts),
            Command::Report {
                cluster,
                session,
                report,
            } => self.report(cluster, *session, report),
            Command::Lost { cluster, session } => self.lost(cluster, *session),
            Command::ForgetCluster { cluster, abandon } => self.forget_cluster(cluster, *abandon),
            Command::DrainCluster { cluster } => self.drain_cluster(cluster, true),
            Command::UndrainCluster { cluster } => self.drain_cluster(cluster, false),
            Command::Apply(application) => self.apply_application(application),
            Command::Delete { application } => self.delete_application(application),
            Command::Bind(bind) => self.bind(bind),
            Command::StartMigration(start) => self.start_migration(start),
            Command::AdvanceMigration {
                slot,
                target,
                event,
            } => self.advance_migration(slot, *target, *event),
            Command::Unbind { slot, epoch } => self.unbind(slot, *epoch),
            Command::RaiseLevel { level } if *level > self.level => {
                self.level = *level;
                Ok(Applied::Changed)
            }
            Command::RaiseLevel { .. } => Ok(Applied::Unchanged),
            Command::Once(once) => self.once(once),
            Command::Restore(backup) => self.restore(backup),
            Command::Signed(signed) => self.signed(signed),
            Command::CreateToken {
                name,
                hash,
                access,
                lasts_ms,
            } => self.create_token(name, hash, access, *lasts_ms),
            Command::RevokeToken { name } => self.revoke_token(name),
            Command::RevokeCertificate {
                holder,
                certificate,
            } => self.revoke_certificate(holder, certificate.as_ref()),
            Command::Invite {
                cluster,
                hash,
                lasts_ms,
            } => self.invite(cluster, hash, *lasts_ms),
            Command::Withdraw { cluster } => self.withdraw(cluster),
            Command::Join(join) => self.join(join),
            Command::Renew(renewal) => self.renewed(renewal),
            Command::NoteCertificate { cluster, ends_ms } => {
                self.note_certificate(cluster, *ends_ms)
            }
            Command::LeaveCluster { cluster } => self.leave_cluster(cluster),
            Command::SetQuota { namespace, quota } => self.set_quota(namespace, quota),
            Command::RemoveQuota { namespace } => self.remove_quota(namespace),
        }
    }

    fn once(&mut self, once: &Once) -> Outcome {
        let nested = matches!(once.command, Command::Once(_));
        if nested || once.key.is_empty() || once.key.len() > KEY_LIMIT {
            return Err(Refusal::Invalid {
                path: "key".to_owned(),
                problem: format!("is not 1 to {KEY_LIMIT} bytes around one command"),
            });
        }
        if let Some(outcome) = self.memory.recall(&once.key, once.part, once.body)? {
            return outcome.clone();
        }
        let outcome = self.apply_one(&once.command);
        self.memory.keep(once, &outcome);
        outcome
    }

    /// A copy to try things on: without the memory of requests, which is large and not tried, and without tokens and
    /// the audit log, which nobody may read there.
    #[must_use]
    pub fn sketch(&self) -> Self {
        Self {
            mesh: self.mesh.clone(),
            index: self.index,
            tables_index: self.tables_index,
            log_time_ms: self.log_time_ms,
            next_epoch: self.next_epoch,
            clusters: self.clusters.clone(),
            applications: self.applications.clone(),
            services: self.services.clone(),
            slots: self.slots.clone(),
            migrations: self.migrations.clone(),
            owed_stops: self.owed_stops.clone(),
            numbers: self.numbers.clone(),
            level: self.level,
            adopt_until_ms: self.adopt_until_ms,
            memory: Memory::default(),
            security: self.security.sketch(),
            quotas: self.quotas.clone(),
            lookup: Index::default(),
        }
    }

    /// A copy to place `applications` on, and no others: the clusters, what they link to, and what runs of them.
    pub(crate) fn excerpt<'a>(&self, applications: impl Iterator<Item = &'a AppName>) -> Self {
        let mut excerpt = Self {
            mesh: self.mesh.clone(),
            index: self.index,
            log_time_ms: self.log_time_ms,
            clusters: self.clusters.clone(),
            level: self.level,
            ..Self::default()
        };
        for app in applications {
            let Some(state) = self.applications.get(app) else {
                continue;
            };
            let linked = state.spec.links.iter().map(|link| link.to.app());
            for name in linked.chain([app.clone()]) {
                if let Some(state) = self.applications.get(&name) {
                    excerpt.applications.insert(name, state.clone());
                }
            }
            let first = app.service(&Name::least());
            let services = self.services.range(first.clone()..);
            let services = services.take_while(|(name, _)| name.is_of(app));
            let services = services.map(|(name, service)| (name.clone(), service.clone()));
            excerpt.services.extend(services);
            let slots = self.slots.range(first.slot(0)..);
            let slots = slots.take_while(|(slot, _)| slot.service.is_of(app));
            let slots = slots.map(|(slot, bindings)| (slot.clone(), bindings.clone()));
            excerpt.slots.extend(slots);
            let migrations = self.migrations.range(first.slot(0)..);
            let migrations = migrations.take_while(|(slot, _)| slot.service.is_of(app));
            let migrations = migrations.map(|(slot, it)| (slot.clone(), it.clone()));
            excerpt.migrations.extend(migrations);
        }
        excerpt
    }

    /// The state's revision, as tables show it: the last change that a table may show.
    #[must_use]
    pub fn revision(&self) -> Revision {
        Revision {
            incarnation: self.mesh.as_ref().map_or(0, |mesh| mesh.incarnation),
            index: self.tables_index,
        }
    }

    /// The last entry that may have changed what applications are placed by, but for goals: who is there, what it can
    /// take and what runs on it.
    #[must_use]
    pub fn facts_index(&self) -> u64 {
        self.lookup.facts()
    }

    /// Marks that anything may differ from now on.
    fn touch_everything(&mut self) {
        self.tables_index = self.index;
        self.lookup.touch_everything();
    }

    /// Marks that the tables of all nodes may differ from now on.
    fn touch_tables(&mut self) {
        self.tables_index = self.index;
        self.lookup.touch_all_tables();
    }

    /// Marks that what is said of a service may differ from now on.
    fn touch_service(&mut self, service: &ServiceName, touch: Touch) {
        self.tables_index = self.index;
        // What runs of one takes room from the others.
        self.lookup.touch_facts(self.index);
        self.lookup.touch_service(service, touch);
    }

    /// Marks that what is said of an application and to it may differ from now on.
    fn touch_application(&mut self, application: &AppName) {
        self.tables_index = self.index;
        self.lookup.touch_application(application);
    }

    /// What the specification says of a service.
    #[must_use]
    pub fn goal(&self, service: &ServiceName) -> Option<&crate::goal::Service> {
        self.applications
            .get(&service.app())?
            .spec
            .services
            .get(&service.service)
    }

    /// The slot's live binding: the one that takes new flows (I7: there is at most one).
    #[must_use]
    pub fn live(&self, slot: &Slot) -> Option<(u64, &Binding)> {
        self.slots
            .get(slot)?
            .iter()
            .find(|(_, binding)| binding.state == BindingState::Active)
            .map(|(epoch, binding)| (*epoch, binding))
    }
}
