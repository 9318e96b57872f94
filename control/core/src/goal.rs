//! The goal file: what an application's owner wants, as types that cannot be wrong.
//!
//! ```text
//!  YAML --serde-saphyr--> document (as written, with lines) --check--> Application (checked, with units)
//! ```
//!
//! [`parse`] reports every error of every document at once, each with its path, its line and the way out. What
//! needs the mesh to be known (is an asked-for VIP free, does the cluster of a grant exist) is not checked
//! here but by the Knowledge Base.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use ebpf_common::addr::Policy;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::unit::{Bandwidth, Bytes, Cpu, Latency};
use self::{check::Check, document::Document};
use crate::{
    command::Refusal,
    name::{AppName, Name, ServiceName},
    report::Tier,
};

mod check;
mod document;
#[cfg(test)]
mod tests;
pub mod unit;

/// The only version there is.
pub const API_VERSION: &str = "weft.dev/v1alpha1";
/// The only kind there is.
pub const KIND: &str = "MeshApplication";
/// The most slots that one service may have.
pub const MAX_REPLICAS: u32 = 1000;

/// A checked application: a graph of services and the goals of its owner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Application {
    /// Its name.
    pub name: AppName,
    /// Its services.
    pub services: BTreeMap<Name, Service>,
    /// Who calls whom.
    pub links: Vec<Link>,
    /// What matters how much.
    pub weights: Weights,
    /// Who else may call.
    pub grants: Vec<Grant>,
}

impl Application {
    /// The rules that bind the fields to each other: [`parse`] keeps them, and a command that came another way
    /// is held to them too.
    pub fn check(&self) -> Result<(), Refusal> {
        let invalid = |path: String, problem: &str| {
            Err(Refusal::Invalid {
                path,
                problem: problem.to_owned(),
            })
        };
        for (name, service) in &self.services {
            let path = format!("spec.services.{name}.replicas");
            if service.replicas > MAX_REPLICAS {
                return invalid(path, "is out of range: use 0 to 1000");
            }
            if service.writers == Writers::One && service.replicas > 1 {
                return invalid(path, "is more than 1 with writers: one: set replicas: 1");
            }
        }
        for (i, link) in self.links.iter().enumerate() {
            let path = format!("spec.links[{i}]");
            let own = link.to.app() == self.name;
            if !self.services.contains_key(&link.from) {
                return invalid(path, "is from a service that there is not");
            }
            if own && !self.services.contains_key(&link.to.service) {
                return invalid(path, "is to a service that there is not");
            }
            if own && link.to.service == link.from {
                return invalid(path, "is from a service to itself: remove it");
            }
        }
        Ok(())
    }
}

/// One service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Container image, for drivers that have containers.
    pub image: Option<String>,
    /// Program and arguments; empty means the image's own.
    pub command: Vec<String>,
    /// The ports its VIPs answer.
    pub ports: Vec<Port>,
    /// How many slots it has.
    pub replicas: u32,
    /// What one instance needs.
    pub requests: Requests,
    /// Environment of its instances.
    pub env: BTreeMap<String, String>,
    /// How many instances of one slot may write at a time.
    pub writers: Writers,
    /// Where it may run.
    pub constraints: Constraints,
    /// The policies for which it has VIPs.
    pub policies: BTreeSet<PolicyName>,
    /// Particular addresses asked for, by policy.
    pub vips: BTreeMap<PolicyName, Vec<IpAddr>>,
    /// Where its users call from.
    pub ingress: Vec<Ingress>,
    /// Whether its connections to services on the same node that ask for it too bypass TCP.
    #[serde(default)]
    pub splice: bool,
}

/// A declared port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Its name, unique within the service.
    pub name: Name,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The VIP's port.
    pub port: u16,
    /// The instances' port.
    pub target_port: u16,
    /// Whether its UDP flows move to another instance at once when theirs drains or dies (QUIC, telemetry).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub follow: bool,
}

/// Transport protocol of a port.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    JsonSchema,
)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

/// What one instance needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Requests {
    /// Processing power.
    pub cpu: Cpu,
    /// Memory.
    pub memory: Bytes,
    /// GPUs.
    pub gpus: u32,
}

/// How many copies of one slot may write at a time.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Writers {
    /// Copies may overlap for a moment: make-before-break.
    #[default]
    Many,
    /// Never two: the old one is stopped, or fenced, before the new one starts.
    One,
}

/// Where a service may run; each list that is not empty must be met.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Constraints {
    /// Labels that the cluster must have, with these values.
    pub labels: BTreeMap<String, String>,
    /// Tiers, any of them.
    pub tiers: BTreeSet<Tier>,
    /// Regions, any of them.
    pub residency: BTreeSet<String>,
}

/// Calls of users from outside the application.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ingress {
    /// The cluster in which they enter.
    pub cluster: Name,
    /// Calls per second.
    pub rate: u32,
}

/// One service calls another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// The caller, of this application.
    pub from: Name,
    /// The called one, perhaps of another application.
    pub to: ServiceName,
    /// Round-trip time that must not be exceeded.
    pub max_latency: Option<Latency>,
    /// Traffic in both directions together.
    pub bandwidth: Option<Bandwidth>,
    /// Calls per second.
    pub rate: u32,
}

/// What matters how much, in thousandths; not all are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Weights {
    /// Carbon of the power drawn.
    pub energy: u32,
    /// Money for processing power, memory and egress.
    pub cost: u32,
    /// Time that calls spend on the way.
    pub latency: u32,
    /// Room to breathe.
    pub performance: u32,
}

impl Default for Weights {
    fn default() -> Self {
        Self {
            energy: 1000,
            cost: 1000,
            latency: 1000,
            performance: 1000,
        }
    }
}

/// Permission to call without a link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// The services that may be called; empty means all of the application.
    pub services: BTreeSet<Name>,
    /// Who may.
    pub to: Grantee,
}

/// Who may call by a grant.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Grantee {
    /// All instances of a namespace.
    Namespace(Name),
    /// Processes on the hosts of a cluster, and unattached pods there.
    HostsOf(Name),
}

/// A policy by the name that users write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "&'static str")]
pub struct PolicyName(pub Policy);

impl TryFrom<String> for PolicyName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        Policy::from_name(&name)
            .map(Self)
            .ok_or_else(|| format!("unknown policy {name:?}"))
    }
}

impl From<PolicyName> for &'static str {
    fn from(policy: PolicyName) -> Self {
        policy.0.name()
    }
}

impl fmt::Display for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.name())
    }
}

/// Everything that is wrong with a goal file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
pub struct GoalErrors(pub Vec<GoalError>);

/// One thing that is wrong with a goal file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GoalError {
    /// The field, as in `spec.services[1].requests.cpu`; empty where the file could not be read so far.
    pub path: String,
    /// The line in the file, from 1; 0 where it is not known.
    pub line: u64,
    /// What is wrong, the value, and the way out.
    pub message: String,
}

impl fmt::Display for GoalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line > 0 {
            write!(f, "line {}: ", self.line)?;
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)
    }
}

/// The applications of a goal file, one per document; every semantic error of every document at once.
pub fn parse(yaml: &str) -> Result<Vec<Application>, GoalErrors> {
    let documents: Vec<Document> = serde_saphyr::from_multiple(yaml).map_err(|error| {
        let line = error.location().map_or(0, |location| location.line());
        GoalErrors(vec![GoalError {
            path: String::new(),
            line,
            message: form(&error.without_snippet().to_string(), written(yaml, line)),
        }])
    })?;
    let mut check = Check::default();
    let mut applications: Vec<Application> = Vec::new();
    for document in &documents {
        let Some(application) = check.document(document) else {
            continue;
        };
        if applications
            .iter()
            .any(|other| other.name == application.name)
        {
            check.errors.push(GoalError {
                path: "metadata.name".to_owned(),
                line: document.metadata.name.referenced.line(),
                message: format!(
                    "{} is in this file twice: keep one document of it",
                    application.name
                ),
            });
        }
        applications.push(application);
    }
    if documents.is_empty() {
        check.errors.push(GoalError {
            path: String::new(),
            line: 0,
            message: "the file holds no document: write one of kind MeshApplication".to_owned(),
        });
    }
    if check.errors.is_empty() {
        Ok(applications)
    } else {
        Err(GoalErrors(check.errors))
    }
}

/// The text of a line, from 1; `None` where there is none or it is empty.
fn written(yaml: &str, line: u64) -> Option<&str> {
    let index = usize::try_from(line).ok()?.checked_sub(1)?;
    let text = yaml.lines().nth(index)?.trim();
    (!text.is_empty()).then_some(text)
}

/// The parser's message with what is written there and the way out; without the location, which the error has
/// as a field, and without advice about the parser's options.
fn form(message: &str, written: Option<&str>) -> String {
    let line = message.lines().next().unwrap_or_default();
    let line = line.strip_prefix("error: ").unwrap_or(line);
    let end = [" at line ", ", set DuplicateKeyPolicy"]
        .iter()
        .filter_map(|tail| line.rfind(tail))
        .min()
        .unwrap_or(line.len());
    let line = &line[..end];
    let told = match line {
        "invalid i64" => "this is no whole number: write one, as in 2".to_owned(),
        "expected mapping start" => "fields are expected here: write them as key: value".to_owned(),
        "expected sequence start" => {
            "a list is expected here: write it as [a, b], or each item after a dash".to_owned()
        }
        _ if line.starts_with("missing field") => format!("{line}: add it"),
        _ if line.starts_with("duplicate") => format!("{line}: keep one of them"),
        _ => line.to_owned(),
    };
    match written.filter(|_| !line.starts_with("missing")) {
        Some(written) => format!("{told}; it reads `{written}`"),
        None => told,
    }
}

/// The JSON Schema of a goal file's document.
#[must_use]
pub fn schema() -> serde_json::Value {
    schemars::schema_for!(Document).to_value()
}
