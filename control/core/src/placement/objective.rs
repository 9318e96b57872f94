//! The objective: one number in one unit, micro-EUR per hour, of four parts.
//!
//! ```text
//!  energy       vCPU x W/vCPU x gCO2/kWh            x 10 EUR/kg
//!  cost         vCPU x price + GiB x price + egress GiB x price
//!  latency      calls/s x RTT = callers that wait   x 0.02 EUR/h each
//!  performance  vCPU x (utilisation after + other slots of the service there) x 0.04 EUR/h
//! ```
//!
//! Weights exchange one part for another: each part is multiplied by its share of the weights (times four, so
//! that equal weights leave it as it is). They are the specification's, so they change only with a generation.

use ebpf_common::addr::Policy;

use super::{Held, Parts, View};
use crate::{
    goal::{Link, PolicyName, Weights},
    name::{AppName, Name, Slot},
};

/// What a gram of CO2 counts, micro-EUR. Far above a market's price, so that at equal weights a typical vCPU
/// (10 W at 400 g/kWh) counts as much as its rent (0.04 EUR/h).
const GRAM_UEUR: u128 = 10_000;
/// What a caller that waits for an hour counts, micro-EUR: half a vCPU.
const WAITING_UEUR_H: u128 = 20_000;
/// What a vCPU in a fully booked cluster counts, micro-EUR per hour: its rent once more. The same for each other
/// slot of the service in that cluster: they would be lost together.
const CROWDED_UEUR_H: u128 = 40_000;
/// What is assumed of a distance that nobody measured, microseconds: farther than most.
const UNMEASURED_US: u32 = 200_000;

/// What the owner's weights make of each part, in thousandths.
#[derive(Clone, Copy)]
struct Rates {
    energy: u128,
    cost: u128,
    latency: u128,
    performance: u128,
}

impl Rates {
    fn of(weights: &Weights) -> Self {
        let all = [
            weights.energy,
            weights.cost,
            weights.latency,
            weights.performance,
        ];
        let sum: u128 = all.iter().map(|w| u128::from(*w)).sum::<u128>().max(1);
        let rate = |weight: u32| u128::from(weight) * 4000 / sum;
        Self {
            energy: rate(weights.energy),
            cost: rate(weights.cost),
            latency: rate(weights.latency),
            performance: rate(weights.performance),
        }
    }
}

fn weigh(value: u128, rate: u128) -> u64 {
    u64::try_from(value.saturating_mul(rate) / 1000).unwrap_or(u64::MAX)
}

impl View<'_> {
    fn rates(&self, app: &AppName) -> Option<Rates> {
        let state = self.kb.applications.get(app)?;
        Some(Rates::of(&state.spec.weights))
    }

    /// What a slot counts in a cluster by itself, without its links.
    pub(super) fn own(&self, slot: &Slot, name: &Name, held: Held) -> Parts {
        let (Some(goal), Some(cluster), Some(rates)) = (
            self.goal(slot),
            self.kb.clusters.get(name),
            self.rates(&slot.service.app()),
        ) else {
            return Parts::default();
        };
        let facts = &cluster.facts;
        let cpu_milli = u128::from(goal.requests.cpu.as_milli());
        let room = self.room(name);
        let booked = u128::from(room.capacity.cpu_milli - room.free.cpu_milli)
            + if held == Held::New { cpu_milli } else { 0 };
        let permille = (booked * 1000)
            .checked_div(u128::from(room.capacity.cpu_milli))
            .unwrap_or(1000)
            .min(1000);
        let others = self.others(slot).filter(|other| *other == name);
        let together = others.count() as u128;
        let micro_grams_h = cpu_milli
            .saturating_mul(u128::from(facts.cpu_power_mw))
            .saturating_mul(u128::from(facts.carbon_g_kwh))
            / 1000;
        let cpu = cpu_milli * u128::from(facts.cpu_price_ueur_h) / 1000;
        let memory =
            (u128::from(goal.requests.memory.get()) * u128::from(facts.memory_price_ueur_h)) >> 30;
        let waiting_us: u128 = goal
            .ingress
            .iter()
            .map(|users| {
                let rtt = self.rtt_us(&users.cluster, name).unwrap_or(UNMEASURED_US);
                u128::from(users.rate) * u128::from(rtt)
            })
            .sum::<u128>()
            / u128::from(goal.replicas.max(1));
        Parts {
            energy: weigh(
                micro_grams_h.saturating_mul(GRAM_UEUR) / 1_000_000,
                rates.energy,
            ),
            cost: weigh(cpu + memory, rates.cost),
            latency: weigh(waiting_us * WAITING_UEUR_H / 1_000_000, rates.latency),
            performance: weigh(
                cpu_milli * CROWDED_UEUR_H * (permille + 1000 * together) / 1_000_000,
                rates.performance,
            ),
        }
    }

    /// What a link counts as its two services are placed; nothing while one of them is not.
    fn link(&self, app: &AppName, link: &Link) -> Parts {
        let Some(rates) = self.rates(app) else {
            return Parts::default();
        };
        let callers: Vec<&Name> = self.clusters_of(&app.service(&link.from)).collect();
        let callees: Vec<&Name> = self.clusters_of(&link.to).collect();
        if callers.is_empty() || callees.is_empty() {
            return Parts::default();
        }
        let nearest_only = self
            .kb
            .goal(&link.to)
            .is_some_and(|goal| goal.policies.contains(&PolicyName(Policy::Closest)));
        let (mut rtt_sum, mut egress_sum, mut pairs) = (0u128, 0u128, 0u128);
        for from in &callers {
            let rtt = |to: &Name| self.rtt_us(from, to).unwrap_or(UNMEASURED_US);
            let nearest = callees.iter().copied().min_by_key(|to| (rtt(to), *to));
            for to in callees
                .iter()
                .copied()
                .filter(|to| !nearest_only || Some(*to) == nearest)
            {
                pairs += 1;
                rtt_sum += u128::from(rtt(to));
                if *from != to {
                    let price = |name: &Name| {
                        let cluster = self.kb.clusters.get(name);
                        cluster.map_or(0, |c| u128::from(c.facts.egress_price_ueur_gib))
                    };
                    egress_sum += (price(from) + price(to)) / 2;
                }
            }
        }
        let bytes_h = link.bandwidth.map_or(0, |b| u128::from(b.as_bps()) * 450);
        Parts {
            energy: 0,
            cost: weigh(
                (bytes_h.saturating_mul(egress_sum) / pairs) >> 30,
                rates.cost,
            ),
            latency: weigh(
                u128::from(link.rate) * rtt_sum * WAITING_UEUR_H / pairs / 1_000_000,
                rates.latency,
            ),
            performance: 0,
        }
    }

    /// What the links of a slot's service count as everything is placed.
    pub(super) fn links_of(&self, slot: &Slot) -> Parts {
        let app = slot.service.app();
        let links = self
            .kb
            .applications
            .get(&app)
            .map(|s| s.spec.links.as_slice());
        links
            .unwrap_or_default()
            .iter()
            .filter(|link| link.from == slot.service.service || link.to == slot.service)
            .fold(Parts::default(), |sum, link| {
                sum.plus(self.link(&app, link))
            })
    }

    /// The objective of an application as it is placed: each slot once, each link once.
    pub(super) fn objective(&self, app: &AppName) -> u64 {
        let Some(state) = self.kb.applications.get(app) else {
            return 0;
        };
        let mut sum = Parts::default();
        for (service, goal) in &state.spec.services {
            let service = app.service(service);
            for slot in (0..goal.replicas).map(|instance| service.slot(instance)) {
                if let Some(cluster) = self.at(&slot) {
                    sum = sum.plus(self.own(&slot, cluster, Held::Already));
                }
            }
        }
        for link in &state.spec.links {
            sum = sum.plus(self.link(app, link));
        }
        sum.total()
    }

    /// Below this no placement of the slots that are placed can be: each for itself in the cheapest cluster of
    /// the right kind, alone but for other applications, with links that count nothing.
    pub(super) fn lower_bound(&self, app: &AppName) -> u64 {
        let Some(state) = self.kb.applications.get(app) else {
            return 0;
        };
        let mut alone = self.clone();
        let mut placed = Vec::new();
        for (service, goal) in &state.spec.services {
            let service = app.service(service);
            for slot in (0..goal.replicas).map(|instance| service.slot(instance)) {
                if let Some(cluster) = self.at(&slot).cloned() {
                    alone.unplace(&slot);
                    placed.push((slot, cluster));
                }
            }
        }
        let least = |(slot, at): &(Slot, Name)| {
            let goal = self.goal(slot)?;
            self.kb
                .clusters
                .keys()
                .filter(|name| {
                    let mut reasons = Vec::new();
                    self.constraints(goal, name, &mut reasons);
                    reasons.is_empty() || *name == at
                })
                .map(|name| alone.own(slot, name, Held::New).total())
                .min()
        };
        placed.iter().filter_map(least).fold(0, u64::saturating_add)
    }
}

impl Parts {
    pub(super) fn plus(self, other: Self) -> Self {
        Self {
            energy: self.energy.saturating_add(other.energy),
            cost: self.cost.saturating_add(other.cost),
            latency: self.latency.saturating_add(other.latency),
            performance: self.performance.saturating_add(other.performance),
        }
    }
}
