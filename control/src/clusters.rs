//! `weft cluster`: which clusters there are, letting one join or leave, emptying one, and taking it out of the mesh.

use std::time::{Duration, Instant};

use ::http::Method;
use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};
use control_api::{
    http::{
        Binding, Changed, Cluster as Shown, InvitationRequest, Lead, List, RevocationRequest,
        Status,
    },
    join::JoinString,
};
use control_core::name::Name;

use crate::{
    client::{Ask, Once},
    daemon,
    security::random_secret,
    show,
    user::Common,
};

/// How often what is still in a cluster is looked at.
const LOOK: Duration = Duration::from_millis(250);

/// How many instances are named that are in the way.
const NAMED: usize = 5;

/// The clusters of the mesh.
#[derive(Debug, Subcommand)]
pub(crate) enum Clusters {
    /// Lists the clusters: their state, and how much runs there.
    List(ListClusters),
    /// Prints what another machine joins with as this cluster, once (weft agent join).
    JoinString(Invite),
    /// Empties a cluster: it gets nothing new, and what runs there moves to others, make before break.
    Drain(Drain),
    /// Uses a cluster again that was drained.
    Undrain(Undrain),
    /// Lets a cluster leave the mesh: it is emptied, its certificates are revoked, and it is forgotten.
    Leave(Leave),
    /// Takes a cluster out of the mesh whose agent is stopped and to which nothing is bound.
    Forget(Forget),
}

impl Clusters {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::List(list) => list.run(),
            Self::JoinString(invite) => invite.run(),
            Self::Drain(drain) => drain.run(),
            Self::Undrain(undrain) => undrain.run(),
            Self::Leave(leave) => leave.run(),
            Self::Forget(forget) => forget.run(),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct ListClusters {
    /// Answer without a leader, from what the asked lead knows.
    #[arg(long)]
    stale: bool,
    #[command(flatten)]
    common: Common,
}

impl ListClusters {
    fn run(self) -> anyhow::Result<()> {
        let path = format!("/v1/clusters?consistent={}", !self.stale);
        self.common.answer(&Ask::get(&path), show::list::<Shown>)
    }
}

#[derive(Debug, Args)]
pub(crate) struct Invite {
    /// The cluster.
    name: Name,
    /// How long it is good for.
    #[arg(long, value_name = "MINUTES", default_value_t = 15)]
    minutes: u64,
    /// Take back what was printed before, and print nothing.
    #[arg(long, conflicts_with = "minutes")]
    withdraw: bool,
    #[command(flatten)]
    common: Common,
}

impl Invite {
    fn run(self) -> anyhow::Result<()> {
        let path = format!("/v1/clusters/{}/invitation", self.name);
        if self.withdraw {
            let ask = Ask {
                method: Method::DELETE,
                ..Ask::get(&path)
            };
            let text = |changed: &Changed| match changed.changed {
                true => format!("what was printed for cluster {} counts no more", self.name),
                false => format!("nothing was printed for cluster {}", self.name),
            };
            return self.common.answer(&ask, text);
        }
        let authorities = self.common.leads.authorities()?;
        let leads: List<Lead> = self.common.leads.ask(&Ask::get("/v1/leads"))?;
        let signing: Vec<_> = leads
            .items
            .iter()
            .filter(|lead| lead.answers && lead.issuer_ends_ms.is_some())
            .map(|lead| lead.address)
            .collect();
        ensure!(
            !signing.is_empty(),
            "no lead that answers signs certificates: give one an issuer (weft cert --ca ca --role lead --name NAME --issuer \
             --out its credentials folder)"
        );
        let secret = random_secret()?;
        let string = JoinString {
            cluster: self.name.clone(),
            secret,
            leads: signing,
            authorities,
        };
        let request = InvitationRequest {
            hash: string.hash(),
            minutes: self.minutes,
        };
        let ask = Ask {
            method: Method::POST,
            body: serde_json::to_vec(&request)?.into(),
            ..Ask::get(&path)
        };
        let _: Changed = self.common.leads.ask(&ask)?;
        eprintln!(
            "good for one agent and {} minutes; on its machine: weft agent join STRING --out DIR",
            self.minutes
        );
        println!("{string}");
        Ok(())
    }
}

#[derive(Debug, Args)]
pub(crate) struct Drain {
    /// The cluster.
    name: Name,
    /// Wait so long until nothing runs there any more.
    #[arg(long, value_name = "TIME", value_parser = daemon::duration)]
    wait: Option<Duration>,
    #[command(flatten)]
    once: Once,
    #[command(flatten)]
    common: Common,
}

impl Drain {
    fn run(self) -> anyhow::Result<()> {
        let name = &self.name;
        let path = format!("/v1/clusters/{name}/drain");
        let ask = Ask {
            method: Method::POST,
            key: self.once.key(),
            ..Ask::get(&path)
        };
        let changed: Changed = self.common.leads.ask(&ask)?;
        let Some(wait) = self.wait else {
            return self.common.write(&changed, |_| {
                format!("cluster {name} is drained: weft cluster list says what still runs there")
            });
        };
        wait_until_empty(&self.common, name, wait)?;
        let text = |_: &Changed| format!("cluster {name} is drained: nothing runs there");
        self.common.write(&changed, text)
    }
}

/// Waits until nothing is bound to a cluster.
fn wait_until_empty(common: &Common, name: &Name, wait: Duration) -> anyhow::Result<()> {
    let end = Instant::now() + wait;
    loop {
        let cluster = find(common, name)?;
        let cluster = cluster.with_context(|| format!("cluster {name} was forgotten meanwhile"))?;
        if cluster.bindings == 0 {
            return Ok(());
        }
        if Instant::now() >= end {
            let bindings: List<Binding> = common.leads.ask(&Ask::get("/v1/bindings"))?;
            bail!("{}", stuck(name, wait, &bindings.items));
        }
        std::thread::sleep(LOOK);
    }
}

/// What is still in a cluster, for people.
fn stuck(name: &Name, wait: Duration, bindings: &[Binding]) -> String {
    let slots: Vec<_> = bindings
        .iter()
        .filter(|it| it.cluster == name.as_str())
        .map(|it| it.slot.as_str())
        .collect();
    let more = match slots.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let named = slots[..slots.len().min(NAMED)].join(", ");
    format!(
        "{} instances are still in cluster {name} after {wait:?} ({named}{more}): weft explain says where each may go; make \
         room there, or delete them",
        slots.len()
    )
}

/// A cluster as the leads know it, if they do.
fn find(common: &Common, name: &Name) -> anyhow::Result<Option<Shown>> {
    let list: List<Shown> = common.leads.ask(&Ask::get("/v1/clusters"))?;
    let mut clusters = list.items.into_iter();
    Ok(clusters.find(|cluster| cluster.name == name.as_str()))
}

#[derive(Debug, Args)]
pub(crate) struct Leave {
    /// The cluster.
    name: Name,
    /// How long it may take to be emptied, and then how long its agent may take to be gone.
    #[arg(long, value_name = "TIME", value_parser = daemon::duration, default_value = "5m")]
    wait: Duration,
    /// Although it has not said that all it ran has stopped: its machines are gone for good.
    #[arg(long)]
    abandon: bool,
    #[command(flatten)]
    common: Common,
}

impl Leave {
    /// Each step may be repeated: asked again, it goes on where it was.
    fn run(self) -> anyhow::Result<()> {
        let Self { name, common, .. } = &self;
        let again = || {
            format!(
                "cluster {name} is leaving, and stays where it is: weft cluster leave {name} goes on"
            )
        };
        self.change(Method::POST, "/leave")?;
        wait_until_empty(common, name, self.wait).with_context(again)?;
        self.revoke().with_context(again)?;
        self.wait_until_lost().with_context(again)?;
        let path = format!("?abandon={}", self.abandon);
        let changed = self.change(Method::DELETE, &path).with_context(again)?;
        let text = |_: &Changed| format!("cluster {name} has left: its certificates count no more");
        common.write(&changed, text)
    }

    fn change(&self, method: Method, rest: &str) -> anyhow::Result<Changed> {
        let path = format!("/v1/clusters/{}{rest}", self.name);
        let ask = Ask {
            method,
            ..Ask::get(&path)
        };
        self.common.leads.ask(&ask)
    }

    /// From now on what its agent was issued counts no more.
    fn revoke(&self) -> anyhow::Result<()> {
        let status: Status = self.common.leads.ask(&Ask::get("/v1/status"))?;
        let mesh = status.mesh.context("there is no mesh yet")?.name;
        let request = RevocationRequest {
            holder: format!("weft://{mesh}/agent/{}", self.name),
            certificate: None,
        };
        let ask = Ask {
            method: Method::POST,
            body: serde_json::to_vec(&request)?.into(),
            ..Ask::get("/v1/revocations")
        };
        let _: Changed = self.common.leads.ask(&ask)?;
        Ok(())
    }

    /// Its agent is shut out, and not heard for a lease.
    fn wait_until_lost(&self) -> anyhow::Result<()> {
        let end = Instant::now() + self.wait;
        while find(&self.common, &self.name)?.is_some_and(|it| it.state != "lost") {
            ensure!(
                Instant::now() < end,
                "its agent still has a stream after {:?}: is a lead cut off from the others (weft lead list)?",
                self.wait
            );
            std::thread::sleep(LOOK);
        }
        Ok(())
    }
}

#[derive(Debug, Args)]
pub(crate) struct Undrain {
    /// The cluster.
    name: Name,
    #[command(flatten)]
    once: Once,
    #[command(flatten)]
    common: Common,
}

impl Undrain {
    fn run(self) -> anyhow::Result<()> {
        let path = format!("/v1/clusters/{}/drain", self.name);
        let ask = Ask {
            method: Method::DELETE,
            key: self.once.key(),
            ..Ask::get(&path)
        };
        let text = |_: &Changed| format!("cluster {} is used again", self.name);
        self.common.answer(&ask, text)
    }
}

#[derive(Debug, Args)]
pub(crate) struct Forget {
    /// The cluster.
    name: Name,
    /// Although it has not said that all it ran has stopped: its machines are gone for good.
    #[arg(long)]
    abandon: bool,
    #[command(flatten)]
    once: Once,
    #[command(flatten)]
    common: Common,
}

impl Forget {
    fn run(self) -> anyhow::Result<()> {
        let path = format!("/v1/clusters/{}?abandon={}", self.name, self.abandon);
        let ask = Ask {
            method: Method::DELETE,
            key: self.once.key(),
            ..Ask::get(&path)
        };
        let text = |_: &Changed| format!("cluster {} is forgotten", self.name);
        self.common.answer(&ask, text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stays_in_a_cluster_is_named_and_counted() {
        let binding = |number: usize| Binding {
            slot: format!("shop/one/web#{number}"),
            epoch: 1,
            cluster: if number < 7 { "edge" } else { "fog" }.to_owned(),
            node: String::new(),
            state: String::new(),
            phase: String::new(),
            reason: String::new(),
            generation: 1,
            addr6: None,
            addr4: None,
            since_ms: 0,
        };
        let bindings: Vec<_> = (0..9).map(binding).collect();
        let edge = "edge".parse().unwrap();
        let text = stuck(&edge, Duration::from_secs(60), &bindings);
        assert!(
            text.starts_with("7 instances are still in cluster edge after 60s (shop/one/web#0, ")
        );
        assert!(
            text.contains("web#4 and 2 more)") && !text.contains("web#5"),
            "{text}"
        );
        let text = stuck(&edge, Duration::from_secs(60), &bindings[6..]);
        assert!(text.contains("(shop/one/web#6)"), "{text}");
    }
}
