//! Answers of the control API as tables for people.

use std::{collections::BTreeMap, fmt::Write};

use comfy_table::{Table, presets};
use control_api::http::{
    Application, ApplyResponse, ApplyResult, AuditEntry, Binding, Cluster, Explained, Lead,
    LeadAdded, LeadDisk, LeadState, List, Migration, Node, Quota, Revocation, Service, Status,
    Token,
};
use control_core::goal::Bytes;
use control_core::placement::{Decision, Lost, Parts, Verdict};

/// A kind of thing that can be listed.
pub(crate) trait Rows {
    /// The columns' names.
    const HEADER: &'static [&'static str];
    /// One thing, column by column.
    fn row(&self) -> Vec<String>;
}

fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(header);
    table.add_rows(rows);
    table.trim_fmt()
}

/// A list, and whether it may be stale.
pub(crate) fn list<T: Rows>(list: &List<T>) -> String {
    let mut text = if list.items.is_empty() {
        "nothing there".to_owned()
    } else {
        table(T::HEADER, list.items.iter().map(Rows::row))
    };
    if list.stale {
        text += &format!("\n({}: newer changes may be missing)", age(list.age_ms));
    }
    text
}

/// How old an answer may be.
fn age(age_ms: Option<u64>) -> String {
    match age_ms {
        Some(ms) => format!("as of {}.{} s ago", ms / 1_000, ms % 1_000 / 100),
        None => "of unknown age".to_owned(),
    }
}

fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

impl Rows for Application {
    const HEADER: &'static [&'static str] = &["APPLICATION", "READY", "SERVICES", "GENERATION"];

    fn row(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            format!("{}/{}", self.ready, self.wanted),
            self.services.len().to_string(),
            self.generation.to_string(),
        ]
    }
}

impl Rows for Service {
    const HEADER: &'static [&'static str] = &["SERVICE", "READY", "CLUSTERS", "PORTS", "VIPS"];

    fn row(&self) -> Vec<String> {
        let ports = self
            .ports
            .iter()
            .map(|port| format!("{}/{}", port.port, port.protocol));
        let vips = self.vips.iter().map(|vip| {
            let instance = vip.instance.map(|n| format!("#{n}")).unwrap_or_default();
            let addr4 = vip.addr4.map(|addr| format!("{addr} ")).unwrap_or_default();
            format!("{}{instance} {addr4}{}", vip.policy, vip.addr6)
        });
        vec![
            self.name.clone(),
            format!("{}/{}", self.ready, self.wanted),
            self.clusters.join(" "),
            ports.collect::<Vec<_>>().join(" "),
            vips.collect::<Vec<_>>().join("\n"),
        ]
    }
}

impl Rows for Binding {
    const HEADER: &'static [&'static str] = &[
        "SLOT", "EPOCH", "CLUSTER", "NODE", "STATE", "PHASE", "ADDRESS", "REASON",
    ];

    fn row(&self) -> Vec<String> {
        vec![
            self.slot.clone(),
            self.epoch.to_string(),
            self.cluster.clone(),
            self.node.clone(),
            self.state.clone(),
            self.phase.clone(),
            self.addr4
                .map(|addr| addr.to_string())
                .unwrap_or_else(|| or_dash(self.addr6)),
            self.reason.clone(),
        ]
    }
}

impl Rows for Token {
    const HEADER: &'static [&'static str] = &["TOKEN", "ACCESS", "CREATED", "EXPIRES"];

    fn row(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.access.clone(),
            moment(self.created_ms),
            moment(self.expires_ms),
        ]
    }
}

impl Rows for Quota {
    const HEADER: &'static [&'static str] = &[
        "NAMESPACE",
        "APPLICATIONS",
        "INSTANCES",
        "CPU",
        "MEMORY",
        "GPUS",
    ];

    fn row(&self) -> Vec<String> {
        let Self {
            namespace,
            most,
            used,
        } = self;
        let count = |used, most: Option<u64>| of(used, most.map(|most| most.to_string()));
        let counted = |used: Option<u64>| used.map(|used| used.to_string());
        vec![
            namespace.clone(),
            count(counted(used.applications), most.applications),
            count(counted(used.instances), most.instances),
            of(used.cpu.clone(), most.cpu.clone()),
            of(used.memory.clone(), most.memory.clone()),
            count(counted(used.gpus), most.gpus),
        ]
    }
}

/// So much of so much; a dash where there is no bound.
fn of(used: Option<String>, most: Option<String>) -> String {
    format!("{} of {}", or_dash(used), or_dash(most))
}

impl Rows for Revocation {
    const HEADER: &'static [&'static str] = &["HOLDER", "ISSUED UNTIL", "CERTIFICATE"];

    fn row(&self) -> Vec<String> {
        vec![
            self.holder.clone(),
            or_dash(self.issued_until_ms.map(moment)),
            or_dash(self.certificate.as_ref()),
        ]
    }
}

impl Rows for AuditEntry {
    const HEADER: &'static [&'static str] = &["REVISION", "WHEN", "WHO", "WHAT"];

    fn row(&self) -> Vec<String> {
        let [incarnation, index] = self.revision;
        vec![
            format!("{incarnation}.{index}"),
            moment(self.at_ms),
            self.by.clone(),
            self.what.clone(),
        ]
    }
}

/// A moment, in UTC.
fn moment(ms: u64) -> String {
    let seconds = i64::try_from(ms / 1_000).unwrap_or(i64::MAX);
    match time::OffsetDateTime::from_unix_timestamp(seconds) {
        Ok(at) => format!(
            "{} {:02}:{:02}:{:02}",
            at.date(),
            at.hour(),
            at.minute(),
            at.second()
        ),
        Err(_) => ms.to_string(),
    }
}

impl Rows for Cluster {
    const HEADER: &'static [&'static str] = &[
        "CLUSTER",
        "STATE",
        "TIER",
        "REGION",
        "NODES",
        "INSTANCES",
        "IPV4",
        "CERTIFICATE ENDS",
    ];

    fn row(&self) -> Vec<String> {
        let state = match (self.leaving_since_ms, self.drained_since_ms) {
            (Some(_), _) => format!("{}, leaving", self.state),
            (None, Some(_)) => format!("{}, drained", self.state),
            (None, None) => self.state.clone(),
        };
        vec![
            self.name.clone(),
            state,
            format!("{:?}", self.tier).to_lowercase(),
            self.region.clone(),
            format!("{}/{}", self.ready, self.nodes),
            self.bindings.to_string(),
            self.without_ipv4
                .clone()
                .unwrap_or_else(|| "yes".to_owned()),
            or_dash(self.certificate_ends_ms.map(moment)),
        ]
    }
}

impl Rows for Node {
    const HEADER: &'static [&'static str] = &[
        "NODE", "NUMBER", "READY", "CPU", "MEMORY", "GPUS", "TUNNEL", "TABLE",
    ];

    fn row(&self) -> Vec<String> {
        vec![
            format!("{}/{}", self.cluster, self.name),
            self.number.to_string(),
            if self.ready { "yes" } else { "no" }.to_owned(),
            format!("{}m", self.cpu_milli),
            format!("{}Mi", self.memory_bytes >> 20),
            self.gpus.to_string(),
            or_dash(self.tunnel),
            format!("{}.{}", self.applied[0], self.applied[1]),
        ]
    }
}

impl Rows for Migration {
    const HEADER: &'static [&'static str] = &["SLOT", "FROM", "TO", "STATE", "REASON"];

    fn row(&self) -> Vec<String> {
        vec![
            self.slot.clone(),
            format!("{} ({})", self.from, self.source),
            format!("{} ({})", self.to, self.target),
            self.state.clone(),
            self.reason.clone(),
        ]
    }
}

impl Rows for Lead {
    const HEADER: &'static [&'static str] = &[
        "LEAD",
        "MEMBER",
        "ADDRESS",
        "ROLE",
        "ANSWERS",
        "LOG",
        "APPLIED",
        "VERSION",
        "DISK",
        "STATE",
        "RTT",
        "ELECTION",
        "AUTHORITIES",
        "SIGNS UNTIL",
    ];

    fn row(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.id.to_string(),
            self.address.to_string(),
            self.role.clone(),
            if self.answers { "yes" } else { "no" }.to_owned(),
            or_dash(self.log_index),
            or_dash(self.applied_index),
            or_dash(self.version.as_ref()),
            or_dash(self.disk.map(disk)),
            or_dash(self.state.as_ref().map(state)),
            or_dash(self.timers.and_then(|it| it.rtt_us).map(rtt)),
            or_dash(self.timers.map(|it| format!("{} ms", it.election_ms))),
            or_dash(authorities(&self.authorities)),
            or_dash(self.issuer_ends_ms.map(moment)),
        ]
    }
}

/// The beginning of the hash, and of which entry.
fn state(state: &LeadState) -> String {
    let hash = state.hash.get(..8).unwrap_or(&state.hash);
    let differs = if state.differs { ", differs" } else { "" };
    format!("{hash} at {}{differs}", state.index)
}

fn disk(disk: LeadDisk) -> String {
    let free = Bytes::new(disk.free_bytes).rounded();
    match disk.is_short {
        true => format!("{free}, short"),
        false => free.to_string(),
    }
}

fn rtt(us: u64) -> String {
    format!("{}.{} ms", us / 1_000, us % 1_000 / 100)
}

/// The beginning of each fingerprint, which is enough to tell them apart.
fn authorities(fingerprints: &[String]) -> Option<String> {
    let short = fingerprints.iter().map(|it| it.get(..8).unwrap_or(it));
    let short: Vec<_> = short.collect();
    (!short.is_empty()).then(|| short.join(","))
}

/// That the group waits for a lead, and how it is started.
pub(crate) fn lead_added(added: &LeadAdded) -> String {
    format!(
        "the group waits for lead {name} at {address}; start it there:\n  \
         weft lead --name {name} --data DIR --credentials DIR --listen {address} --join {join}",
        name = added.name,
        address = added.address,
        join = added.join.join(","),
    )
}

/// What came of a goal file: each slot with its cluster, the objective's parts and why the others lost.
pub(crate) fn applied(answer: &ApplyResponse) -> String {
    let mut text = String::new();
    for application in &answer.applications {
        let result = match application.result {
            ApplyResult::Created => "created",
            ApplyResult::Configured => "configured",
            ApplyResult::Unchanged => "unchanged",
        };
        let dry = if answer.dry_run { " (dry run)" } else { "" };
        text += &format!("{} {result}{dry}\n", application.name);
        let rows = application.slots.iter().map(|slot| {
            let (parts, why) = match (&slot.cluster, &slot.decision) {
                (Some(_), Some(decision)) => (parts(&decision.parts), others(decision)),
                (Some(_), None) => ("-".to_owned(), String::new()),
                (None, _) => ("-".to_owned(), pending(&slot.pending)),
            };
            let cluster = slot.cluster.clone().unwrap_or_else(|| "pending".to_owned());
            vec![slot.slot.clone(), cluster, parts, why]
        });
        text += &table(
            &[
                "SLOT",
                "CLUSTER",
                "EUR/h: ENERGY COST LATENCY PERFORMANCE",
                "OTHERS",
            ],
            rows,
        );
        text.push('\n');
    }
    text.trim_end().to_owned()
}

/// Micro-EUR as EUR.
fn eur(micro: u64) -> String {
    format!("{}.{:06}", micro / 1_000_000, micro % 1_000_000)
}

fn parts(parts: &Parts) -> String {
    let terms = [parts.energy, parts.cost, parts.latency, parts.performance];
    let total = eur(parts.total());
    format!("{total}: {}", terms.map(eur).join(" "))
}

fn others(decision: &Decision) -> String {
    let lost = decision.others.iter().map(|(cluster, lost)| match lost {
        Lost::Refused(reasons) => format!("{cluster}: {}", reasons.join(", ")),
        Lost::Dearer { by, .. } => format!("{cluster}: +{} EUR/h", eur(*by)),
    });
    lost.collect::<Vec<_>>().join("\n")
}

fn pending(clusters: &BTreeMap<String, Vec<String>>) -> String {
    if clusters.is_empty() {
        return "there is no cluster: weft get clusters".to_owned();
    }
    let reasons = clusters
        .iter()
        .map(|(cluster, reasons)| format!("{cluster}: {}", reasons.join(", ")));
    reasons.collect::<Vec<_>>().join("\n")
}

/// Why a service is where it is.
pub(crate) fn explained(answer: &Explained) -> String {
    let mut text = String::new();
    for slot in &answer.slots {
        text += &match &slot.bound {
            Some(cluster) => format!("{} is bound to {cluster}\n", slot.slot),
            None => format!("{} is pending\n", slot.slot),
        };
        if let Some(decision) = &slot.decision {
            text += &format!(
                "  decided for {} at {} EUR/h; the application {} EUR/h, at least {} EUR/h\n",
                decision.cluster,
                parts(&decision.parts),
                eur(decision.objective),
                eur(decision.lower_bound),
            );
            for line in others(decision).lines() {
                text += &format!("    {line}\n");
            }
        }
        text += if slot.now.is_empty() {
            "  there is no cluster: weft get clusters\n"
        } else {
            "  now\n"
        };
        for (cluster, verdict) in &slot.now {
            let verdict = match verdict {
                Verdict::Eligible(terms) => format!("{} EUR/h", parts(terms)),
                Verdict::Refused(reasons) => format!("refused: {}", reasons.join(", ")),
            };
            text += &format!("    {cluster}: {verdict}\n");
        }
    }
    text.trim_end().to_owned()
}

/// How the leads are.
pub(crate) fn status(status: &Status) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        // A string takes whatever it is given.
        let _ = writeln!(text, "{name:<10}{value}");
    };
    if let Some(mesh) = &status.mesh {
        let prefix4 = mesh.prefix4.as_deref().unwrap_or("no IPv4");
        line("mesh", format!("{} {} {prefix4}", mesh.name, mesh.prefix6));
        line("lease", format!("{} ms", mesh.lease_ms));
    }
    line("leader", or_dash(status.leader.as_ref()));
    line("term", status.term.to_string());
    line(
        "log",
        format!("{} ({} applied)", status.log_index, status.applied_index),
    );
    line("failover", status.failover.clone());
    for member in &status.members {
        let here = if member.name == status.lead {
            " (answered)"
        } else {
            ""
        };
        line("lead", format!("{} {}{here}", member.name, member.address));
    }
    if status.stale {
        text += &format!(
            "no majority of the leads is reached: changes wait, stale reads are {}\n",
            age(status.age_ms)
        );
    }
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn money_is_shown_in_whole_euros_and_micro_euros() {
        assert_eq!(eur(0), "0.000000");
        assert_eq!(eur(1_234_567), "1.234567");
    }

    #[test]
    fn a_pending_slot_says_why_for_each_cluster() {
        let reasons = BTreeMap::from([
            ("edge".to_owned(), vec!["cpu 500m > 200m free".to_owned()]),
            (
                "fog".to_owned(),
                vec!["tier fog".to_owned(), "region de".to_owned()],
            ),
        ]);
        assert_eq!(
            pending(&reasons),
            "edge: cpu 500m > 200m free\nfog: tier fog, region de"
        );
        assert!(pending(&BTreeMap::new()).contains("no cluster"));
    }
}
