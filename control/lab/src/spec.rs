//! What a lab consists of: sites, their machines and addresses, the delays between them. Pure.
//!
//! ```text
//!  100.64.S.0/24   the LAN of site S: .1 its router, .11 .12 nodes, .21 agent, .31 lead
//!  100.127.S.0/31  the router's line to the WAN: .0 router, .1 WAN
//! ```
//!
//! The space is RFC 6598's, and no machine has a default route: nothing leaves the lab. Labs share the
//! addresses, not the namespaces.

use std::{net::Ipv4Addr, time::Duration};

use serde::{Deserialize, Serialize};

use crate::error::LabError;

/// The port of a lead's doors.
pub(crate) const LEAD_PORT: u16 = 7443;
/// The port of an agent's node door.
pub(crate) const AGENT_PORT: u16 = 7444;

/// What a lab consists of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Spec {
    pub(crate) sites: Vec<Site>,
    pub(crate) delays: Vec<Delay>,
}

/// One cluster, and where one of the leads stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Site {
    /// The cluster's name.
    pub(crate) name: String,
    /// The site's number in its addresses.
    pub(crate) number: u8,
    /// The name of the lead that stands here.
    pub(crate) lead: String,
    /// How many nodes.
    pub(crate) nodes: u8,
    /// What the operator says of the cluster and of each node.
    pub(crate) facts: Facts,
}

/// What distinguishes the sites for placement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Facts {
    pub(crate) tier: String,
    pub(crate) region: String,
    /// Price of one vCPU for an hour, micro-EUR.
    pub(crate) cpu_price_ueur_h: u64,
    /// Price of one GiB of memory for an hour, micro-EUR.
    pub(crate) memory_price_ueur_h: u64,
    /// Price of one GiB that leaves the cluster, micro-EUR.
    pub(crate) egress_price_ueur_gib: u64,
    /// Marginal power of one busy vCPU, milliwatt.
    pub(crate) cpu_power_mw: u64,
    /// Carbon intensity, grams of CO2 equivalent per kWh.
    pub(crate) carbon_g_kwh: u64,
    /// vCPUs of each node.
    pub(crate) cpu: u32,
    /// Memory of each node, GiB.
    pub(crate) memory_gib: u32,
}

/// The one-way delay between two sites.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Delay {
    pub(crate) between: [String; 2],
    pub(crate) one_way_us: u64,
}

/// What a machine is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Node,
    Agent,
    Lead,
}

/// A machine on a site's LAN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Machine<'spec> {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) site: &'spec Site,
    pub(crate) address: Ipv4Addr,
}

impl Default for Spec {
    fn default() -> Self {
        let site = |number: u8, name: &str, lead: &str, facts: Facts| Site {
            name: name.to_owned(),
            number,
            lead: lead.to_owned(),
            nodes: 2,
            facts,
        };
        let delay = |a: &str, b: &str, millis: u64| Delay {
            between: [a.to_owned(), b.to_owned()],
            one_way_us: millis * 1000,
        };
        Self {
            sites: vec![
                site(1, "cloud", "a", Facts::cloud()),
                site(2, "fog", "b", Facts::fog()),
                site(3, "edge", "c", Facts::edge()),
            ],
            delays: vec![
                delay("cloud", "fog", 10),
                delay("fog", "edge", 5),
                delay("cloud", "edge", 15),
            ],
        }
    }
}

impl Facts {
    fn cloud() -> Self {
        Self {
            tier: "cloud".into(),
            region: "IE".into(),
            cpu_price_ueur_h: 20_000,
            memory_price_ueur_h: 2_000,
            egress_price_ueur_gib: 80_000,
            cpu_power_mw: 6_000,
            carbon_g_kwh: 320,
            cpu: 16,
            memory_gib: 64,
        }
    }

    fn fog() -> Self {
        Self {
            tier: "fog".into(),
            region: "DE".into(),
            cpu_price_ueur_h: 45_000,
            memory_price_ueur_h: 5_000,
            egress_price_ueur_gib: 20_000,
            cpu_power_mw: 5_000,
            carbon_g_kwh: 210,
            cpu: 8,
            memory_gib: 16,
        }
    }

    fn edge() -> Self {
        Self {
            tier: "edge".into(),
            region: "AT".into(),
            cpu_price_ueur_h: 90_000,
            memory_price_ueur_h: 9_000,
            egress_price_ueur_gib: 10_000,
            cpu_power_mw: 4_000,
            carbon_g_kwh: 110,
            cpu: 4,
            memory_gib: 8,
        }
    }
}

impl Site {
    /// The router on the site's LAN.
    pub(crate) fn gateway(&self) -> Ipv4Addr {
        self.host(1)
    }

    /// The two ends of the router's line to the WAN: the router's and the WAN's.
    pub(crate) fn line(&self) -> [Ipv4Addr; 2] {
        [0, 1].map(|end| Ipv4Addr::new(100, 127, self.number, end))
    }

    fn host(&self, number: u8) -> Ipv4Addr {
        Ipv4Addr::new(100, 64, self.number, number)
    }
}

impl Spec {
    /// Every machine on a LAN, in the order in which they are made.
    pub(crate) fn machines(&self) -> Vec<Machine<'_>> {
        let mut machines = Vec::new();
        for site in &self.sites {
            for number in 1..=site.nodes {
                machines.push(Machine {
                    name: format!("{}-{number}", site.name),
                    kind: Kind::Node,
                    site,
                    address: site.host(10 + number),
                });
            }
            machines.push(Machine {
                name: format!("agent-{}", site.name),
                kind: Kind::Agent,
                site,
                address: site.host(21),
            });
            machines.push(Machine {
                name: format!("lead-{}", site.lead),
                kind: Kind::Lead,
                site,
                address: site.host(31),
            });
        }
        machines
    }

    /// Replaces the delay between two sites by `text`, for instance `cloud-edge=15ms`.
    pub(crate) fn set_delay(&mut self, text: &str) -> Result<(), LabError> {
        let error = || LabError::Delay {
            text: text.to_owned(),
            sites: self
                .sites
                .iter()
                .map(|site| site.name.as_str())
                .collect::<Vec<_>>()
                .join(", "),
        };
        let (pair, time) = text.split_once('=').ok_or_else(error)?;
        let (a, b) = pair.split_once('-').ok_or_else(error)?;
        let one_way_us = micros(time).ok_or_else(error)?;
        let delay = self.delays.iter_mut().find(|delay| delay.joins(a, b));
        match delay {
            Some(delay) => delay.one_way_us = one_way_us,
            None => return Err(error()),
        }
        Ok(())
    }

    /// The one-way delay between the sites of these numbers; none within a site.
    pub(crate) fn delay(&self, from: u8, to: u8) -> Duration {
        let name = |number: u8| {
            self.sites
                .iter()
                .find(|site| site.number == number)
                .map_or("", |site| site.name.as_str())
        };
        let (from, to) = (name(from), name(to));
        self.delays
            .iter()
            .find(|delay| delay.joins(from, to))
            .map_or(Duration::ZERO, |delay| {
                Duration::from_micros(delay.one_way_us)
            })
    }
}

impl Delay {
    fn joins(&self, a: &str, b: &str) -> bool {
        let [x, y] = &self.between;
        (x == a && y == b) || (x == b && y == a)
    }
}

/// `15ms`, `700us` or `1s` in microseconds; at most ten seconds.
fn micros(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|character: char| character.is_ascii_alphabetic());
    let factor = match &text[digits.len()..] {
        "us" => 1,
        "ms" => 1_000,
        "s" => 1_000_000,
        _ => return None,
    };
    let value = digits.parse::<u64>().ok()?.checked_mul(factor)?;
    (value <= 10_000_000).then_some(value)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_machine_has_a_name_and_an_address_of_its_own() {
        let spec = Spec::default();
        let machines = spec.machines();
        assert_eq!(machines.len(), 12);
        let names: BTreeSet<_> = machines.iter().map(|machine| &machine.name).collect();
        let addresses: BTreeSet<_> = machines.iter().map(|machine| machine.address).collect();
        assert_eq!((names.len(), addresses.len()), (12, 12));
        assert!(names.contains(&"edge-2".to_owned()));
        assert!(names.contains(&"lead-c".to_owned()));
    }

    #[test]
    fn a_delay_is_the_same_in_both_directions() {
        let mut spec = Spec::default();
        assert_eq!(spec.delay(1, 3), Duration::from_millis(15));
        assert_eq!(spec.delay(3, 1), Duration::from_millis(15));
        assert_eq!(spec.delay(2, 2), Duration::ZERO);
        spec.set_delay("edge-cloud=700us").unwrap();
        assert_eq!(spec.delay(1, 3), Duration::from_micros(700));
    }

    #[test]
    fn a_delay_that_cannot_be_read_is_refused_with_the_sites() {
        for text in [
            "cloud-edge",
            "cloud=5ms",
            "cloud-moon=5ms",
            "cloud-edge=5",
            "cloud-edge=11s",
        ] {
            let error = Spec::default().set_delay(text).unwrap_err().to_string();
            assert!(
                error.contains(text) && error.contains("cloud, fog, edge"),
                "{error}"
            );
        }
    }
}
