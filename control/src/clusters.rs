//! `weft cluster`: which clusters there are, emptying one, using it again, and taking it out of the mesh.

use std::time::{Duration, Instant};

use ::http::Method;
use anyhow::{Context, ensure};
use clap::{Args, Subcommand};
use control_api::http::{Changed, Cluster as Shown, List};
use control_core::name::Name;

use crate::{
    client::{Ask, Once},
    daemon, show,
    user::Common,
};

/// How often what is still in a cluster is looked at.
const LOOK: Duration = Duration::from_millis(250);

/// The clusters of the mesh.
#[derive(Debug, Subcommand)]
pub(crate) enum Clusters {
    /// Lists the clusters: their state, and how much runs there.
    List(ListClusters),
    /// Empties a cluster: it gets nothing new, and what runs there moves to others, make before break.
    Drain(Drain),
    /// Uses a cluster again that was drained.
    Undrain(Undrain),
    /// Takes a cluster out of the mesh whose agent is stopped and to which nothing is bound.
    Forget(Forget),
}

impl Clusters {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::List(list) => list.run(),
            Self::Drain(drain) => drain.run(),
            Self::Undrain(undrain) => undrain.run(),
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
        let end = Instant::now() + wait;
        loop {
            let left = bindings(&self.common, name)?;
            if left == 0 {
                let text = |_: &Changed| format!("cluster {name} is drained: nothing runs there");
                return self.common.write(&changed, text);
            }
            ensure!(
                Instant::now() < end,
                "{left} instances are still in cluster {name} after {wait:?}: weft get bindings names them, weft explain \
                 says where each may go"
            );
            std::thread::sleep(LOOK);
        }
    }
}

/// How many instances are bound to a cluster.
fn bindings(common: &Common, name: &Name) -> anyhow::Result<u32> {
    let list: List<Shown> = common.leads.ask(&Ask::get("/v1/clusters"))?;
    let cluster = list
        .items
        .iter()
        .find(|cluster| cluster.name == name.as_str());
    let cluster = cluster.with_context(|| format!("cluster {name} was forgotten meanwhile"))?;
    Ok(cluster.bindings)
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
