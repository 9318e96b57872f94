//! Hard constraints: why a slot cannot run in a cluster, each reason with its numbers.

use super::View;
use crate::{
    base::ClusterState,
    goal::{self, Bytes, Cpu, Latency, Link},
    name::{Name, ServiceName, Slot},
    report::Tier,
};

/// A cluster whose last report is older gets nothing new; agents report every 10 s at least, milliseconds.
pub const STALE_MS: u64 = 30_000;

/// Whether the slot's own booking is among what is booked in the cluster that is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// It is not: the cluster needs room for it, and fresh telemetry that says so.
    New,
    /// It is: it runs there already, and only the constraints are asked about.
    Already,
}

/// One reason why a slot cannot run in a cluster.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// No such cluster.
    #[error("cluster: not known")]
    Unknown,
    /// It is lost.
    #[error("cluster: lost")]
    Lost,
    /// Its operator wants it empty.
    #[error("cluster: drained by its operator")]
    Drained,
    /// It has not reported in this session.
    #[error("stale report: none yet in this session")]
    Unreported,
    /// Its last report is too old.
    #[error("stale report: {} s old, at most {} s", age_ms / 1000, STALE_MS / 1000)]
    Stale {
        /// Its age, milliseconds.
        age_ms: u64,
    },
    /// It refused to run the service, or the service did not become ready there.
    #[error("refused here: {0}")]
    Refused(String),
    /// It is of another tier.
    #[error("tier: needs {need}, is {is}")]
    Tier {
        /// Those allowed.
        need: String,
        /// The cluster's.
        is: &'static str,
    },
    /// It lacks a label, or has another value.
    #[error("label: needs {key}={need}, has {}", has.as_deref().map_or_else(|| "none".to_owned(), |v| format!("{key}={v}")))]
    Label {
        /// The key.
        key: String,
        /// The value needed.
        need: String,
        /// The value there.
        has: Option<String>,
    },
    /// It stands in another region.
    #[error("residency: needs {need}, is in {is}")]
    Residency {
        /// Those allowed.
        need: String,
        /// The cluster's.
        is: String,
    },
    /// Too little is free.
    #[error("{what}: needs {needs}, {free} free of {of}")]
    Room {
        /// Of what.
        what: &'static str,
        /// By one instance.
        needs: String,
        /// In the cluster.
        free: String,
        /// Its ready nodes together.
        of: String,
    },
    /// Enough is free, but on no single node.
    #[error("{what}: needs {needs} on one node, the freest has {freest}")]
    Node {
        /// Of what.
        what: &'static str,
        /// By one instance.
        needs: String,
        /// The most that one node has free.
        freest: String,
    },
    /// A link would be too long.
    #[error("latency: link {from} -> {to} needs {need}, RTT {between} is {rtt}")]
    Latency {
        /// The caller.
        from: Name,
        /// The called one.
        to: Name,
        /// The limit.
        need: Latency,
        /// The two clusters.
        between: String,
        /// What was measured.
        rtt: Latency,
    },
    /// A link has a limit and nobody measured it.
    #[error("latency: link {from} -> {to} needs {need}, RTT {between} is not measured yet")]
    Unmeasured {
        /// The caller.
        from: Name,
        /// The called one.
        to: Name,
        /// The limit.
        need: Latency,
        /// The two clusters.
        between: String,
    },
}

fn tier_name(tier: Tier) -> &'static str {
    match tier {
        Tier::Cloud => "cloud",
        Tier::Fog => "fog",
        Tier::Edge => "edge",
    }
}

impl View<'_> {
    /// Every hard constraint that `cluster` breaks for `slot`; empty means it may run there.
    #[must_use]
    pub fn refusals(&self, slot: &Slot, name: &Name, held: Held) -> Vec<Unfit> {
        let Some(goal) = self.goal(slot) else {
            return vec![Unfit::Unknown];
        };
        let mut reasons = self.standing(slot, name, held);
        if matches!(reasons[..], [Unfit::Unknown | Unfit::Lost]) {
            return reasons;
        }
        self.constraints(goal, name, &mut reasons);
        if held == Held::New {
            self.capacity(goal, name, &mut reasons);
        }
        self.latency(slot, name, &mut reasons);
        reasons
    }

    /// Whether the cluster is there and has been heard of.
    fn standing(&self, slot: &Slot, name: &Name, held: Held) -> Vec<Unfit> {
        let Some(cluster) = self.kb.clusters.get(name) else {
            return vec![Unfit::Unknown];
        };
        if cluster.state != ClusterState::Ready {
            return vec![Unfit::Lost];
        }
        let mut reasons = Vec::new();
        if cluster.drained_since_ms.is_some() {
            reasons.push(Unfit::Drained);
        }
        if held == Held::New {
            let age_ms = self.now_ms.saturating_sub(cluster.reported_ms);
            if cluster.reported_ms == 0 {
                reasons.push(Unfit::Unreported);
            } else if age_ms > STALE_MS {
                reasons.push(Unfit::Stale { age_ms });
            }
            let service = self.kb.services.get(&slot.service);
            if let Some(refused) = service.and_then(|service| service.refused_by.get(name))
                && refused.until_ms.is_none_or(|until| self.now_ms < until)
            {
                reasons.push(Unfit::Refused(refused.reason.clone()));
            }
        }
        reasons
    }

    /// Whether the cluster is of the right kind; what this refuses it refuses whatever else runs there.
    pub(super) fn constraints(&self, goal: &goal::Service, name: &Name, reasons: &mut Vec<Unfit>) {
        let Some(facts) = self.kb.clusters.get(name).map(|cluster| &cluster.facts) else {
            return;
        };
        let want = &goal.constraints;
        if !want.tiers.is_empty() && !want.tiers.contains(&facts.tier) {
            let need: Vec<&str> = want.tiers.iter().map(|tier| tier_name(*tier)).collect();
            reasons.push(Unfit::Tier {
                need: need.join(" or "),
                is: tier_name(facts.tier),
            });
        }
        for (key, need) in &want.labels {
            let has = facts.labels.get(key);
            if has != Some(need) {
                reasons.push(Unfit::Label {
                    key: key.clone(),
                    need: need.clone(),
                    has: has.cloned(),
                });
            }
        }
        if !want.residency.is_empty() && !want.residency.contains(&facts.region) {
            let need: Vec<&str> = want.residency.iter().map(String::as_str).collect();
            reasons.push(Unfit::Residency {
                need: need.join(" or "),
                is: facts.region.clone(),
            });
        }
    }

    fn capacity(&self, goal: &goal::Service, name: &Name, reasons: &mut Vec<Unfit>) {
        let room = self.room(name);
        let needs = &goal.requests;
        let cpu = |milli: u64| Cpu::milli(milli).to_string();
        let memory = |bytes: u64| Bytes::new(bytes).to_string();
        let gpu = |gpus: u64| gpus.to_string();
        type Show<'a> = &'a dyn Fn(u64) -> String;
        let dimensions: [(&'static str, u64, [u64; 3], Show<'_>); 3] = [
            (
                "cpu",
                needs.cpu.as_milli(),
                [room.free, room.capacity, room.freest].map(|load| load.cpu_milli),
                &cpu,
            ),
            (
                "memory",
                needs.memory.get(),
                [room.free, room.capacity, room.freest].map(|load| load.memory),
                &memory,
            ),
            (
                "gpu",
                u64::from(needs.gpus),
                [room.free, room.capacity, room.freest].map(|load| load.gpus),
                &gpu,
            ),
        ];
        for (what, needs, [free, of, freest], show) in dimensions {
            if needs > free {
                reasons.push(Unfit::Room {
                    what,
                    needs: show(needs),
                    free: show(free),
                    of: show(of),
                });
            } else if needs > freest {
                reasons.push(Unfit::Node {
                    what,
                    needs: show(needs),
                    freest: show(freest),
                });
            }
        }
    }

    /// The links with a limit: a caller needs one instance of the called service near enough, as far as any
    /// is placed.
    fn latency(&self, slot: &Slot, name: &Name, reasons: &mut Vec<Unfit>) {
        let app = slot.service.app();
        let Some(state) = self.kb.applications.get(&app) else {
            return;
        };
        for link in &state.spec.links {
            let Some(need) = link.max_latency else {
                continue;
            };
            if link.from == slot.service.service {
                let callees: Vec<&Name> = self.clusters_of(&link.to).collect();
                self.near(link, need, name, &callees, reasons);
            } else if link.to == slot.service {
                let mut callees: Vec<&Name> = self.others(slot).collect();
                callees.push(name);
                let caller = app.service(&link.from);
                for from in self.clusters_of(&caller) {
                    self.near(link, need, from, &callees, reasons);
                }
            }
        }
        reasons.dedup();
    }

    /// Where the other slots of this slot's service are.
    pub(super) fn others(&self, slot: &Slot) -> impl Iterator<Item = &Name> {
        let service: &ServiceName = &slot.service;
        let own = usize::from(self.at(slot).is_some());
        let here = self.at(slot);
        let mut skipped = 0;
        self.clusters_of(service).filter(move |cluster| {
            let skip = skipped < own && Some(*cluster) == here;
            skipped += usize::from(skip);
            !skip
        })
    }

    fn near(
        &self,
        link: &Link,
        need: Latency,
        from: &Name,
        callees: &[&Name],
        reasons: &mut Vec<Unfit>,
    ) {
        let nearest = callees
            .iter()
            .map(|to| (self.rtt_us(from, to).unwrap_or(u32::MAX), *to))
            .min();
        let Some((rtt, to)) = nearest else {
            return;
        };
        let between = format!("{from} - {to}");
        if rtt == u32::MAX {
            reasons.push(Unfit::Unmeasured {
                from: link.from.clone(),
                to: link.to.service.clone(),
                need,
                between,
            });
        } else if rtt > need.as_us() {
            reasons.push(Unfit::Latency {
                from: link.from.clone(),
                to: link.to.service.clone(),
                need,
                between,
                rtt: Latency::us(rtt),
            });
        }
    }
}
