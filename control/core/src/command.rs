//! Commands: every change of the Knowledge Base, as it stands in the log.
//!
//! A command says what its proposer saw (session, generation, epoch), so that one which comes late, or again,
//! changes nothing. Time and random numbers are in it as data.

use serde::{Deserialize, Serialize};

use crate::{
    base::{KnowledgeBase, Mesh},
    goal::Application,
    invitation::{Join, Renewal},
    migration::Event,
    name::{AppName, Name, ServiceName, Slot},
    once::Once,
    placement::Decision,
    quota::Quota,
    report::{ClusterFacts, Report},
    security::Signed,
};

/// One entry of the log: commands that waited together, with a result each.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// The proposer's time, milliseconds since the Unix epoch; log time never goes back.
    pub log_time_ms: u64,
    /// The commands, in order.
    pub commands: Vec<Command>,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// The first command of a mesh.
    InitMesh(Mesh),
    /// A cluster's agent said hello; the session is a random number of the proposer's.
    RegisterCluster {
        /// The cluster.
        cluster: Name,
        /// The agent's new session.
        session: u64,
        /// What its operator says of it.
        facts: Box<ClusterFacts>,
    },
    /// What an agent reports.
    Report {
        /// The cluster.
        cluster: Name,
        /// The agent's session; another session's report is refused.
        session: u64,
        /// The complete report.
        report: Box<Report>,
    },
    /// The leader missed a cluster's renewals for a whole lease.
    Lost {
        /// The cluster.
        cluster: Name,
        /// The session that was lost; nothing happens if there is a newer one.
        session: u64,
    },
    /// An operator takes a cluster out of the mesh for good.
    ForgetCluster {
        /// The cluster.
        cluster: Name,
        /// Although it has not said that all it ran has stopped.
        #[serde(default)]
        abandon: bool,
    },
    /// An operator wants a cluster empty.
    DrainCluster {
        /// The cluster.
        cluster: Name,
    },
    /// A cluster is used again.
    UndrainCluster {
        /// The cluster.
        cluster: Name,
    },
    /// A user applies a goal file.
    Apply(Box<Application>),
    /// A user deletes an application.
    Delete {
        /// The application.
        application: AppName,
    },
    /// A slot is bound.
    Bind(Box<Bind>),
    /// A slot starts to move; the target gets a new epoch.
    StartMigration(Box<StartMigration>),
    /// A migration goes on.
    AdvanceMigration {
        /// The slot that moves.
        slot: Slot,
        /// The epoch of the migration's target, so that a late event of an earlier migration is nothing.
        target: u64,
        /// What happened.
        event: Event,
    },
    /// A draining binding outside a migration (scaled down) is stopped.
    Unbind {
        /// The slot.
        slot: Slot,
        /// The binding.
        epoch: u64,
    },
    /// Log time goes on.
    Tick,
    /// Every lead knows the commands of this feature level.
    RaiseLevel {
        /// The level.
        level: u32,
    },
    /// The Knowledge Base becomes what a backup says, in another incarnation.
    Restore(Box<KnowledgeBase>),
    /// A command that came with a key: the same key is carried out once.
    Once(Box<Once>),
    /// A command that somebody asked for: it is noted who.
    Signed(Box<Signed>),
    /// A token for the control API.
    CreateToken {
        /// Its name.
        name: Name,
        /// SHA-256 of its secret, in hexadecimal digits.
        hash: String,
        /// What its holder may do, as certificates say it.
        access: String,
        /// How long it lasts, milliseconds.
        lasts_ms: u64,
    },
    /// A token counts no more.
    RevokeToken {
        /// Its name.
        name: Name,
    },
    /// Certificates count no more: all that a holder was issued until now, or the one that is named.
    RevokeCertificate {
        /// The holder, as a URI.
        holder: String,
        /// SHA-256 of the one certificate, in hexadecimal digits.
        certificate: Option<String>,
    },
    /// A cluster may join, once, by who shows the secret; another invitation of it ends.
    Invite {
        /// The cluster.
        cluster: Name,
        /// SHA-256 of the secret, in hexadecimal digits.
        hash: String,
        /// How long it lasts, milliseconds.
        lasts_ms: u64,
    },
    /// An invitation counts no more.
    Withdraw {
        /// The cluster.
        cluster: Name,
    },
    /// A cluster joins.
    Join(Box<Join>),
    /// An agent gets another certificate.
    Renew(Box<Renewal>),
    /// An agent has shown a certificate.
    NoteCertificate {
        /// The cluster.
        cluster: Name,
        /// When it ends, milliseconds since the Unix epoch.
        ends_ms: u64,
    },
    /// An operator wants a cluster out of the mesh: it is emptied first.
    LeaveCluster {
        /// The cluster.
        cluster: Name,
    },
    /// The goals of a namespace may ask for so much together; takes the place of its quota.
    SetQuota {
        /// The namespace.
        namespace: Name,
        /// How much.
        quota: Quota,
    },
    /// The goals of a namespace may ask for anything.
    RemoveQuota {
        /// The namespace.
        namespace: Name,
    },
}

impl Command {
    /// Whether carrying it out may change what applications are placed by beside their goals (what runs of them aside):
    /// who is there, and what it can take.
    pub(crate) fn changes_facts(&self) -> bool {
        match self {
            Self::Apply(_)
            | Self::Delete { .. }
            | Self::Tick
            | Self::RaiseLevel { .. }
            // What is in these is looked at by itself.
            | Self::Once(_)
            | Self::Signed(_)
            | Self::CreateToken { .. }
            | Self::RevokeToken { .. }
            | Self::RevokeCertificate { .. }
            | Self::Invite { .. }
            | Self::Withdraw { .. }
            | Self::Join(_)
            | Self::Renew(_)
            | Self::NoteCertificate { .. }
            | Self::SetQuota { .. }
            | Self::RemoveQuota { .. } => false,
            Self::InitMesh(_)
            | Self::RegisterCluster { .. }
            | Self::Report { .. }
            | Self::Lost { .. }
            | Self::ForgetCluster { .. }
            | Self::DrainCluster { .. }
            | Self::UndrainCluster { .. }
            | Self::LeaveCluster { .. }
            | Self::Bind(_)
            | Self::StartMigration(_)
            | Self::AdvanceMigration { .. }
            | Self::Unbind { .. }
            | Self::Restore(_) => true,
        }
    }

    /// What it does, in a few words: for the audit log.
    #[must_use]
    pub fn what(&self) -> String {
        match self {
            Self::ForgetCluster { cluster, .. } => format!("forget cluster {cluster}"),
            Self::DrainCluster { cluster } => format!("drain cluster {cluster}"),
            Self::UndrainCluster { cluster } => format!("use cluster {cluster} again"),
            Self::Apply(application) => format!("apply {}", application.name),
            Self::Delete { application } => format!("delete {application}"),
            Self::StartMigration(start) => format!("move {} to {}", start.slot, start.to),
            Self::Restore(_) => "restore a backup".to_owned(),
            Self::CreateToken { name, access, .. } => format!("create token {name} ({access})"),
            Self::RevokeToken { name } => format!("revoke token {name}"),
            Self::RevokeCertificate {
                holder,
                certificate: Some(certificate),
            } => format!("revoke certificate {certificate} of {holder}"),
            Self::RevokeCertificate { holder, .. } => {
                format!("revoke the certificates of {holder}")
            }
            Self::Invite { cluster, .. } => format!("invite cluster {cluster} to join"),
            Self::Withdraw { cluster } => format!("withdraw the invitation of cluster {cluster}"),
            Self::Join(join) => format!("issue a certificate to cluster {}", join.cluster),
            Self::Renew(renewal) => format!("renew the certificate of cluster {}", renewal.cluster),
            Self::LeaveCluster { cluster } => format!("let cluster {cluster} leave"),
            Self::SetQuota { namespace, quota } => {
                format!("set the quota of namespace {namespace} to {quota}")
            }
            Self::RemoveQuota { namespace } => format!("remove the quota of namespace {namespace}"),
            Self::Once(once) => once.command.what(),
            Self::Signed(signed) => signed.what.clone(),
            other => {
                let form = format!("{other:?}");
                let name = form.split(|c: char| !c.is_alphanumeric()).next();
                name.unwrap_or_default().to_owned()
            }
        }
    }
}

/// The feature level of this version: what its leads understand beyond the first one's commands.
///
/// | level | adds |
/// |---|---|
/// | 0 | `InitMesh` to `Tick` |
/// | 1 | `RaiseLevel`, `Once`, `Restore` |
/// | 2 | `Signed`, `CreateToken`, `RevokeToken`, `RevokeCertificate` |
/// | 3 | `DrainCluster`, `UndrainCluster`, `ForgetCluster` that abandons |
/// | 4 | `Invite`, `Withdraw`, `Join`, `Renew`, `NoteCertificate`, `LeaveCluster` |
/// | 5 | `SetQuota`, `RemoveQuota` |
pub const LEVEL: u32 = 5;

/// The decision that a slot runs in a cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// The slot.
    pub slot: Slot,
    /// Where it will run.
    pub cluster: Name,
    /// The session of that cluster that was seen.
    pub session: u64,
    /// The generation of the application that was seen.
    pub generation: u64,
    /// The live binding that this one takes the place of (lost, refused, stopped); `None` for a pending slot.
    pub replaces: Option<u64>,
    /// Why there, for `weft explain`.
    pub decision: Decision,
}

/// The decision that a slot moves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartMigration {
    /// The slot.
    pub slot: Slot,
    /// The binding that it leaves.
    pub source: u64,
    /// Where it goes; the same cluster for an update in place.
    pub to: Name,
    /// The session of that cluster that was seen.
    pub session: u64,
    /// The generation of the application that was seen.
    pub generation: u64,
    /// Why.
    pub reason: Reason,
    /// Why there; `None` when a user asked for it.
    pub decision: Option<Decision>,
}

/// Why a slot moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Another cluster serves the application's goals better.
    Goal,
    /// What it runs has changed.
    Update,
    /// Where it runs no longer meets its constraints.
    Constraint,
    /// It did not become ready, or did not stay so, where it runs.
    NotReady,
    /// A user asked for it.
    User,
}

/// What came of a command.
pub type Outcome = Result<Applied, Refusal>;

/// A command that was carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Applied {
    /// The Knowledge Base is as it was.
    Unchanged,
    /// It has changed.
    Changed,
    /// An application has a new generation.
    Generation(u64),
    /// A slot has a new binding.
    Bound {
        /// Its epoch.
        epoch: u64,
    },
}

/// A command that was not carried out, and why; nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// There is no mesh yet.
    #[error("the mesh is not set up: run weft init and start the leads with its mesh file")]
    NoMesh,
    /// There is another mesh.
    #[error("this Knowledge Base already holds mesh {0:?}")]
    OtherMesh(String),
    /// The mesh's own prefixes or name are wrong.
    #[error("mesh {field}: {problem}")]
    BadMesh {
        /// The field.
        field: String,
        /// The problem.
        problem: String,
    },
    /// The IPv6 prefix of the mesh overlaps a cluster's own.
    #[error("cluster {cluster}: its prefix {prefix} overlaps the mesh's {mesh}")]
    PrefixCollision {
        /// The cluster.
        cluster: Name,
        /// The cluster's.
        prefix: String,
        /// The mesh's.
        mesh: String,
    },
    /// No such cluster.
    #[error("no cluster {0}: see weft get clusters")]
    UnknownCluster(Name),
    /// The cluster has another session than the proposer saw.
    #[error("cluster {cluster} has session {current:x}, not {named:x}")]
    StaleSession {
        /// The cluster.
        cluster: Name,
        /// Its session.
        current: u64,
        /// The one that was named.
        named: u64,
    },
    /// The cluster is lost.
    #[error("cluster {0} is lost")]
    ClusterLost(Name),
    /// The cluster still runs something or is alive.
    #[error("cluster {cluster} cannot be forgotten: {problem}")]
    ClusterInUse {
        /// The cluster.
        cluster: Name,
        /// What is in the way.
        problem: String,
    },
    /// Somebody is that cluster already.
    #[error(
        "cluster {0} cannot be joined: its agent is connected; stop that agent and wait until weft cluster list says lost, or take another name"
    )]
    ClusterConnected(Name),
    /// A token does not let a cluster in.
    #[error(
        "cluster {cluster} cannot be joined: {why}; an admin makes a new token with weft cluster join-string {cluster}"
    )]
    NotInvited {
        /// The cluster.
        cluster: Name,
        /// Why not.
        why: String,
    },
    /// What a holder was issued is revoked.
    #[error("what {holder} was issued is revoked")]
    Revoked {
        /// The holder.
        holder: String,
    },
    /// No such application.
    #[error("no application {0}: see weft get applications")]
    UnknownApplication(AppName),
    /// No such service.
    #[error("no service {0}: see weft get services")]
    UnknownService(ServiceName),
    /// The service has fewer slots.
    #[error("no slot {slot}: the service has {replicas}")]
    UnknownSlot {
        /// The slot.
        slot: Slot,
        /// How many there are.
        replicas: u32,
    },
    /// The application has another generation than the proposer saw.
    #[error("{application} is at generation {current}, not {named}")]
    StaleGeneration {
        /// The application.
        application: AppName,
        /// Its generation.
        current: u64,
        /// The one that was named.
        named: u64,
    },
    /// The slot's live binding is another than the proposer saw.
    #[error("{slot} is bound in epoch {current:?}, not {named:?}")]
    StaleEpoch {
        /// The slot.
        slot: Slot,
        /// The epoch of its live binding.
        current: Option<u64>,
        /// The one that was named.
        named: Option<u64>,
    },
    /// The live binding works; only a migration may take its place.
    #[error("{0} runs where it is: move it with a migration")]
    StillServing(Slot),
    /// The slot is on its way already.
    #[error("{0} is already moving")]
    Migrating(Slot),
    /// The slot is not moving, or not to that epoch.
    #[error("{0} is not moving to that epoch")]
    NotMigrating(Slot),
    /// The migration is not where the event belongs, or the event has not happened.
    #[error("{slot}: {problem}")]
    WrongEvent {
        /// The slot.
        slot: Slot,
        /// Why not.
        problem: String,
    },
    /// The cluster does not meet the service's needs.
    #[error("{slot} cannot run in {cluster}: {}", reasons.join("; "))]
    Ineligible {
        /// The slot.
        slot: Slot,
        /// The cluster.
        cluster: Name,
        /// Each with its numbers.
        reasons: Box<[String]>,
    },
    /// A service with one writer waits until the old copy is certainly fenced.
    #[error("{slot} has one writer: its old copy is fenced only in {wait_ms} ms")]
    NotFenced {
        /// The slot.
        slot: Slot,
        /// How long still, milliseconds.
        wait_ms: u64,
    },
    /// A backup does not fit.
    #[error("the backup is not this mesh's: {0}")]
    OtherBackup(String),
    /// A key stands for another request.
    #[error("the idempotency key {key} was used for another request: take a new one")]
    KeyReused {
        /// Who used it, and the key.
        key: String,
    },
    /// An asked-for address cannot be given.
    #[error("{path}: address {address} {problem}")]
    Vip {
        /// The field of the goal file.
        path: String,
        /// The address.
        address: String,
        /// Why not.
        problem: String,
    },
    /// A number space is exhausted.
    #[error("no {what} left: all {size} are in use or resting")]
    Exhausted {
        /// Of what.
        what: String,
        /// How many there are.
        size: u64,
    },
    /// An application asks for more than its namespace may.
    #[error(
        "namespace {namespace} has a quota: {}; ask for less, delete what is not needed, or have an admin raise it: weft quota set {namespace}",
        problems.join("; ")
    )]
    OverQuota {
        /// The namespace.
        namespace: Name,
        /// Each amount that is too much, with its numbers.
        problems: Box<[String]>,
    },
    /// The specification breaks a rule that the goal file's parser checks.
    #[error("{path}: {problem}")]
    Invalid {
        /// The field.
        path: String,
        /// The problem.
        problem: String,
    },
}
