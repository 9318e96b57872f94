//! The control API: what users and tools say to any lead, as JSON over HTTPS.
//!
//! ```text
//!  POST   /v1/applications[?dry_run=true]            a goal file (YAML) -> ApplyResponse
//!  DELETE /v1/applications/{namespace}/{name}        -> Changed
//!  POST   /v1/migrations                             MigrationRequest -> Changed
//!  GET    /v1/{applications|services|bindings|clusters|nodes|migrations}[?consistent=false] -> List<...>
//!  GET    /v1/explain/{namespace}/{application}/{service} -> Explained
//!  GET    /v1/status -> Status
//!  GET    /v1/backup -> a file of two lines of JSON
//!  POST   /v1/restore                                such a file -> Restored
//!  GET    /v1/leads[?consistent=false] -> List<Lead>
//!  POST   /v1/leads                                  LeadRequest -> LeadAdded
//!  DELETE /v1/leads/{name}                           -> Changed
//!  POST   /v1/leads/{name}/drain                     -> Drained; also /v1/leads/drain, whoever leads
//!  GET    /v1/tokens -> List<Token>                  POST TokenRequest, DELETE /v1/tokens/{name} -> Changed
//!  GET    /v1/quotas -> List<Quota>                  POST Amounts, DELETE /v1/quotas/{namespace} -> Changed
//!  GET    /v1/revocations -> List<Revocation>        POST RevocationRequest -> Changed
//!  GET    /v1/audit[?limit=100] -> List<AuditEntry>
//! ```
//!
//! A change may carry the header `Idempotency-Key`: asked again with the same key and body it answers the same, and is
//! carried out once; the last 100,000 keys are kept. An answer other than 2xx carries a [`Problem`]. Times are milliseconds since the Unix epoch, in log time.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use control_core::{
    placement::{Decision, Explanation},
    report::Tier,
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// Why a request was not served.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// What is wrong, lower case, without a full stop.
    pub error: String,
    /// The path of the field that is wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// What it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// The line of the goal file, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<u64>,
    /// The way out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// What else is wrong with the same request.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(no_recursion)]
    pub more: Vec<Self>,
}

/// How a read is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub struct ReadQuery {
    /// Whether the answer shows every change acknowledged before; without a majority of leads only `false` is
    /// answered, and the answer says that it is stale.
    pub consistent: bool,
}

impl Default for ReadQuery {
    fn default() -> Self {
        Self { consistent: true }
    }
}

/// How a goal file is applied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub struct ApplyQuery {
    /// Only say what would happen.
    pub dry_run: bool,
}

/// How a cluster is forgotten.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub struct ForgetQuery {
    /// Although it has not said that all it ran has stopped: its machines are gone for good.
    pub abandon: bool,
}

/// Things of one kind, and how fresh the answer is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct List<T> {
    /// The things, by name.
    pub items: Vec<T>,
    /// Index of the last log entry that the answer shows.
    pub index: u64,
    /// Whether newer changes may be missing.
    pub stale: bool,
    /// How old the answer may be, milliseconds: 0 unless it is stale, `None` where nobody knows.
    #[serde(default)]
    pub age_ms: Option<u64>,
}

/// What came of a goal file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ApplyResponse {
    /// One per application in the file, in its order.
    pub applications: Vec<AppliedApplication>,
    /// Whether nothing was changed because none was asked.
    pub dry_run: bool,
    /// Index of the last log entry that the answer shows.
    pub index: u64,
}

/// What came of one application.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AppliedApplication {
    /// `namespace/application`.
    pub name: String,
    /// What happened to it.
    pub result: ApplyResult,
    /// Its generation; `None` in a dry run that would create it.
    pub generation: Option<u64>,
    /// Where each slot runs, or why it does not yet; in a dry run, where it would.
    pub slots: Vec<PlacedSlot>,
}

/// What happened to an application.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ApplyResult {
    /// It is new.
    Created,
    /// It was there and is different now.
    Configured,
    /// It was there and is the same.
    Unchanged,
}

/// Where a slot runs, or why it does not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlacedSlot {
    /// `namespace/application/service#instance`.
    pub slot: String,
    /// The cluster that it is bound to; `None` while it is pending.
    pub cluster: Option<String>,
    /// Why there, and why each other cluster lost.
    #[schema(value_type = Object)]
    pub decision: Option<Decision>,
    /// Why it is pending: for each cluster each constraint that it does not meet, with the numbers.
    pub pending: BTreeMap<String, Vec<String>>,
}

/// One application.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Application {
    /// `namespace/application`.
    pub name: String,
    /// Raised by every change.
    pub generation: u64,
    /// Its services.
    pub services: Vec<String>,
    /// How many instances its owner wants.
    pub wanted: u32,
    /// How many of them are ready.
    pub ready: u32,
    /// When it was last changed.
    pub changed_ms: u64,
}

/// One service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Service {
    /// `namespace/application/service`.
    pub name: String,
    /// Its number in IPv6 VIPs.
    pub number: u32,
    /// How many instances its owner wants.
    pub wanted: u32,
    /// How many of them are ready.
    pub ready: u32,
    /// The clusters that its live instances are bound to.
    pub clusters: Vec<String>,
    /// The ports its VIPs answer.
    pub ports: Vec<Port>,
    /// Its semantic service IPs.
    pub vips: Vec<Vip>,
}

/// A declared port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Port {
    /// Its name.
    pub name: String,
    /// `TCP` or `UDP`.
    pub protocol: String,
    /// The VIP's port.
    pub port: u16,
    /// The instances' port.
    pub target_port: u16,
}

/// A semantic service IP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Vip {
    /// How it picks a backend.
    pub policy: String,
    /// The slot's number, for policy `instance`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<u32>,
    /// Its IPv6 address.
    #[schema(value_type = String)]
    pub addr6: Ipv6Addr,
    /// Its IPv4 address.
    #[schema(value_type = Option<String>)]
    pub addr4: Option<Ipv4Addr>,
}

/// One binding of a slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Binding {
    /// `namespace/application/service#instance`.
    pub slot: String,
    /// Which life of the slot.
    pub epoch: u64,
    /// Where it runs.
    pub cluster: String,
    /// Its node; empty until one is chosen.
    pub node: String,
    /// `active`, `probing`, `draining` or `stopping`.
    pub state: String,
    /// `starting`, `ready`, `not_ready`, `refused` or `stopped`.
    pub phase: String,
    /// Why it is not running; empty when it is.
    pub reason: String,
    /// The application's generation that it was bound for.
    pub generation: u64,
    /// Its endpoint's IPv6 address, once attached.
    #[schema(value_type = Option<String>)]
    pub addr6: Option<Ipv6Addr>,
    /// Its endpoint's IPv4 address.
    #[schema(value_type = Option<String>)]
    pub addr4: Option<Ipv4Addr>,
    /// When it was bound.
    pub since_ms: u64,
}

/// One cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Cluster {
    /// Its name.
    pub name: String,
    /// `ready` or `lost`.
    pub state: String,
    /// Since when it is lost.
    pub lost_since_ms: Option<u64>,
    /// Since when its operator wants it empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drained_since_ms: Option<u64>,
    /// Since when its operator wants it out of the mesh.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leaving_since_ms: Option<u64>,
    /// When the certificate ends that its agent was last seen to have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate_ends_ms: Option<u64>,
    /// Cloud, fog or edge.
    #[schema(value_type = String)]
    pub tier: Tier,
    /// Where it stands in law.
    pub region: String,
    /// Free labels.
    pub labels: BTreeMap<String, String>,
    /// The session of its agent.
    pub session: u64,
    /// How many nodes it reports.
    pub nodes: u32,
    /// How many of them are ready.
    pub ready: u32,
    /// How many instances are bound to it.
    pub bindings: u32,
    /// When its agent last reported; 0 before the first report.
    pub reported_ms: u64,
    /// Why it has no IPv4 of the mesh's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub without_ipv4: Option<String>,
}

/// One node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Node {
    /// Its cluster.
    pub cluster: String,
    /// Its name.
    pub name: String,
    /// Its number in endpoint addresses.
    pub number: u32,
    /// Whether its NetManager is connected and its tunnel stands.
    pub ready: bool,
    /// Allocatable processing power, thousandths of a vCPU.
    pub cpu_milli: u64,
    /// Allocatable memory, bytes.
    pub memory_bytes: u64,
    /// Allocatable GPUs.
    pub gpus: u32,
    /// Where other nodes reach its tunnel.
    #[schema(value_type = Option<String>)]
    pub tunnel: Option<SocketAddr>,
    /// Its addresses in the underlay.
    #[schema(value_type = Vec<String>)]
    pub underlay: Vec<IpAddr>,
    /// The revision that its kernel matches: incarnation and log index.
    pub applied: [u64; 2],
    /// Round-trip time to other nodes by number, microseconds.
    pub rtt_us: BTreeMap<u32, u32>,
}

/// The last move of a slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Migration {
    /// `namespace/application/service#instance`.
    pub slot: String,
    /// The cluster that it leaves.
    pub from: String,
    /// The cluster that it goes to.
    pub to: String,
    /// The epoch that it leaves.
    pub source: u64,
    /// The epoch that it goes to.
    pub target: u64,
    /// `starting`, `repointing`, `draining`, `stopping`, `done` or `rolled_back`.
    pub state: String,
    /// `goal`, `update`, `constraint` or `user`.
    pub reason: String,
    /// When it began.
    pub since_ms: u64,
    /// When it came to this state.
    pub state_since_ms: u64,
}

/// A wish to move a slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrationRequest {
    /// `namespace/application/service#instance`.
    pub slot: String,
    /// The cluster that it shall go to.
    pub to: String,
}

/// A change was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Changed {
    /// Whether anything is different now.
    pub changed: bool,
    /// Index of the log entry.
    pub index: u64,
}

/// Why a service is where it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Explained {
    /// `namespace/application/service`.
    pub service: String,
    /// One per slot.
    #[schema(value_type = Vec<Object>)]
    pub slots: Vec<Explanation>,
    /// Index of the last log entry that the answer shows.
    pub index: u64,
    /// Whether newer changes may be missing.
    pub stale: bool,
    /// How old the answer may be, milliseconds: 0 unless it is stale, `None` where nobody knows.
    #[serde(default)]
    pub age_ms: Option<u64>,
}

/// How a lead and its group are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// The lead that answers.
    pub lead: String,
    /// The leader, as far as this lead knows.
    pub leader: Option<String>,
    /// The Raft term.
    pub term: u64,
    /// Every lead of the group.
    pub members: Vec<Member>,
    /// Index of the last entry in this lead's log.
    pub log_index: u64,
    /// Index of the last entry that it has applied.
    pub applied_index: u64,
    /// The mesh; `None` before its first command.
    pub mesh: Option<Mesh>,
    /// Log time.
    pub log_time_ms: u64,
    /// Whether lost clusters' instances are bound elsewhere: `run`, or `paused` when too many were lost at once.
    pub failover: String,
    /// Whether newer changes may be missing: no majority of the leads was reached.
    pub stale: bool,
    /// How old the answer may be, milliseconds: 0 unless it is stale, `None` where nobody knows.
    #[serde(default)]
    pub age_ms: Option<u64>,
    /// Version of the lead.
    pub version: String,
    /// The feature level that every lead has: what needs a higher one waits.
    #[serde(default)]
    pub level: u32,
}

/// One lead.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// Where it is reached.
    #[schema(value_type = String)]
    pub address: SocketAddr,
}

/// One lead, as a member of the group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Lead {
    /// Its name.
    pub name: String,
    /// Its number in the group; a lead that lost its disk comes back under another.
    pub id: u64,
    /// Where it is reached.
    #[schema(value_type = String)]
    pub address: SocketAddr,
    /// `leader`, `voter`, or `learner`: it catches up, and becomes a voter then.
    pub role: String,
    /// Whether it answers the lead that was asked.
    pub answers: bool,
    /// The end of its log, as far as the leader knows.
    pub log_index: Option<u64>,
    /// The last log entry that it has applied.
    pub applied_index: Option<u64>,
    /// Its version.
    pub version: Option<String>,
    /// Its disk; nothing from a lead that does not answer, or is older.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<LeadDisk>,
    /// Its state at the last entry at which the leads compare theirs; nothing before the first, or from an older lead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<LeadState>,
    /// Its timers; nothing from a lead that does not answer, or is older.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timers: Option<LeadTimers>,
    /// The authorities whose certificates it accepts, the one that signs first: SHA-256, hexadecimal digits.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub authorities: Vec<String>,
    /// When what it signs certificates of agents with ends; `None` where it signs none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issuer_ends_ms: Option<u64>,
    /// The number of the lead that leaves once this one is a voter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaces: Option<u64>,
}

/// The state of a lead at one entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LeadState {
    /// The entry, the last that is in it.
    pub index: u64,
    /// Its SHA-256, hexadecimal digits: the same on every lead.
    pub hash: String,
    /// Whether another lead's is not the same.
    pub differs: bool,
}

/// The file system of a lead's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LeadDisk {
    /// Bytes that can still be written.
    pub free_bytes: u64,
    /// Bytes that are not for changes.
    pub reserve_bytes: u64,
    /// Whether there is too little: with too few leads that have room, changes are refused.
    pub is_short: bool,
}

/// How long a lead waits for the others, which follows how far they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LeadTimers {
    /// The longest of its round-trip times to the other leads, microseconds; nothing while none is measured.
    pub rtt_us: Option<u64>,
    /// Between two heartbeats, and the limit of one, milliseconds.
    pub heartbeat_ms: u64,
    /// How long it believes in a silent leader, milliseconds.
    pub election_ms: u64,
}

/// A wish for one lead more, or for another in the place of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LeadRequest {
    /// The name in its certificate.
    pub name: String,
    /// Where the other leads will reach it.
    #[schema(value_type = String)]
    pub address: SocketAddr,
    /// The lead that leaves once the new one is a voter.
    #[serde(default)]
    pub replaces: Option<String>,
}

/// The group waits for a lead.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LeadAdded {
    /// Its name.
    pub name: String,
    /// Its number in the group.
    pub id: u64,
    /// Where it is looked for.
    #[schema(value_type = String)]
    pub address: SocketAddr,
    /// Where it finds the group: `NAME=IP:PORT`.
    pub join: Vec<String>,
}

/// A backup was restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Restored {
    /// The mesh's incarnation from now on.
    pub incarnation: u64,
    /// The log entry up to which the backup knew.
    pub backup_index: u64,
    /// Index of the log entry.
    pub index: u64,
}

/// A token for the API.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Token {
    /// Its name.
    pub name: String,
    /// What its holder may do: `viewer`, `deployer/NAMESPACE...` or `admin`.
    pub access: String,
    /// When it was made.
    pub created_ms: u64,
    /// When it ends.
    pub expires_ms: u64,
}

/// A wish for a token, which is then `NAME.SECRET` in a header `Authorization: Bearer`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    /// Its name.
    pub name: String,
    /// SHA-256 of its secret, in hexadecimal digits: the secret itself is not sent. Take at least 32 random bytes.
    pub hash: String,
    /// What its holder may do: `viewer`, `deployer/NAMESPACE...` or `admin`.
    pub access: String,
    /// How long it lasts, days.
    pub days: u64,
}

/// What the goals of a namespace may ask for together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Quota {
    /// The namespace.
    pub namespace: String,
    /// The most that they may ask for.
    pub most: Amounts,
    /// What they ask for now.
    pub used: Amounts,
}

/// What goals ask for together; of a quota, what is not named is not bounded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Amounts {
    /// Applications.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub applications: Option<u64>,
    /// Replicas of all services.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instances: Option<u64>,
    /// Processing power that all replicas request: `2`, `500m`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    /// Memory that all replicas request: `512Mi`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
    /// GPUs that all replicas request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpus: Option<u64>,
}

/// Certificates that count no more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Revocation {
    /// Whose, as a URI.
    pub holder: String,
    /// All that were issued until then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issued_until_ms: Option<u64>,
    /// The one with this SHA-256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<String>,
}

/// A wish that certificates count no more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RevocationRequest {
    /// Whose: the URI in the certificate.
    pub holder: String,
    /// Only the one with this SHA-256, in hexadecimal digits; else all that were issued until now.
    #[serde(default)]
    pub certificate: Option<String>,
}

/// How much of the audit log is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub struct AuditQuery {
    /// How many changes at most.
    pub limit: usize,
    /// Whether the answer shows every change acknowledged before.
    pub consistent: bool,
}

impl Default for AuditQuery {
    fn default() -> Self {
        Self {
            limit: 100,
            consistent: true,
        }
    }
}

/// A change that was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditEntry {
    /// The revision that it made: incarnation and log index.
    pub revision: [u64; 2],
    /// When.
    pub at_ms: u64,
    /// Who: a certificate's name, `token:NAME`, or `cluster:NAME` of one that joins.
    pub by: String,
    /// What.
    pub what: String,
}

/// A cluster that is to join by a token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InvitationRequest {
    /// SHA-256 of the token's secret, in hexadecimal digits.
    pub hash: String,
    /// How long the token lasts, minutes.
    pub minutes: u64,
}

/// A lead does not lead any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Drained {
    /// Who leads.
    pub leader: String,
}

/// The mesh.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Mesh {
    /// Its name.
    pub name: String,
    /// Its ULA /48.
    pub prefix6: String,
    /// Its IPv4 space.
    pub prefix4: Option<String>,
    /// Raised by restore and recovery.
    pub incarnation: u64,
    /// How long a cluster may be silent, milliseconds.
    pub lease_ms: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_says_only_what_it_knows() {
        let short = Problem {
            error: "no application a/b".to_owned(),
            ..Problem::default()
        };
        insta::assert_json_snapshot!(short, @r#"
        {
          "error": "no application a/b"
        }
        "#);
        let text =
            r#"{"error":"e","field":"f","value":"v","line":3,"hint":"h","more":[{"error":"x"}]}"#;
        let long: Problem = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&long).unwrap(), text);
    }
}
