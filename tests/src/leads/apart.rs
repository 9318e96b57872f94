//! Leads on machines of their own, as far apart as is said.
//!
//! ```text
//!  lead-a --veth a--.
//!  lead-b --veth b--+-- hub: what comes from a lead and is not for the hub goes into a TUN device, where it is held
//!  lead-c --veth c--'        for half of the round trip, and then to the other lead
//! ```
//!
//! Whoever asks the leads stands in the hub and waits for nobody.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};

use super::NAMES;
use crate::Netns;

/// The port of every lead's door.
const PORT: u16 = 7443;
/// The routing table for what leads send to each other.
const DELAYED: u32 = 100;

/// The machines; they are gone with this.
#[derive(Debug)]
pub struct Apart {
    hub: Netns,
    leads: Vec<Netns>,
}

/// The address of lead `number`, and of the hub on the line to it: a site of the lab's each.
fn line(number: usize) -> [Ipv4Addr; 2] {
    let site = u8::try_from(number + 1).expect("there are few leads");
    [31, 1].map(|host| Ipv4Addr::new(100, 64, site, host))
}

impl Apart {
    /// Makes them, with `rtt` between any two leads.
    ///
    /// # Errors
    /// When the capability to make namespaces is missing.
    pub fn new(rtt: Duration) -> Result<Self> {
        let hub = Netns::new("hub")?;
        hub.sysctl("ipv4.ip_forward", "1")?;
        let device = weft_lab::WAN;
        let mut lines = Vec::new();
        if !rtt.is_zero() {
            lines.push(format!("tuntap add dev {device} mode tun"));
            lines.push(format!("link set {device} up"));
            lines.push(format!("route add default dev {device} table {DELAYED}"));
        }
        let mut leads = Vec::new();
        for (number, name) in NAMES.iter().enumerate() {
            let lead = Netns::new(&format!("lead-{name}"))?;
            let [own, gateway] = line(number);
            lead.ip_batch(&[
                format!(
                    "link add eth0 type veth peer name {name} netns {}",
                    hub.name()
                ),
                format!("address add {own}/24 dev eth0"),
                "link set eth0 up".to_owned(),
                format!("route add default via {gateway}"),
            ])?;
            lines.push(format!("address add {gateway}/24 dev {name}"));
            lines.push(format!("link set dev {name} up"));
            if !rtt.is_zero() {
                lines.push(format!("rule add iif {name} lookup {DELAYED}"));
            }
            leads.push(lead);
        }
        hub.ip_batch(&lines)?;
        if !rtt.is_zero() {
            // It ends with this process, and the device with it.
            hold(&hub, rtt / 2)?;
        }
        Ok(Self { hub, leads })
    }

    /// Where who asks the leads stands.
    #[must_use]
    pub fn hub(&self) -> &Netns {
        &self.hub
    }

    /// The machine of lead `number`.
    #[must_use]
    pub fn lead(&self, number: usize) -> &Netns {
        &self.leads[number]
    }

    /// The doors of the leads.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        let numbers = 0..self.leads.len();
        let addresses = numbers.map(|number| SocketAddr::from((line(number)[0], PORT)));
        addresses.collect()
    }
}

/// Holds what the leads send to each other for `one_way`.
fn hold(hub: &Netns, one_way: Duration) -> Result<()> {
    let sites: Vec<u8> = (0..NAMES.len())
        .map(|number| line(number)[0].octets()[2])
        .collect();
    // A thread keeps the namespace that it was born in.
    let held = hub.run(|| -> io::Result<()> {
        thread::Builder::new()
            .name("wan".to_owned())
            .spawn(move || {
                if let Err(error) = weft_lab::forward_between(&sites, one_way) {
                    eprintln!("the leads hear each other no more: {error}");
                }
            })?;
        Ok(())
    });
    held.context("failed to start a thread")
}
