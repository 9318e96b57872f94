//! `weft quota`: what the goals of a namespace may ask for together.

use ::http::Method;
use clap::{Args, Subcommand};
use control_api::http::{Amounts, Changed, Quota as Shown};
use control_core::{
    goal::{Bytes, Cpu},
    name::Name,
};

use crate::{client::Ask, show, user::Common};

/// What the goals of a namespace may ask for together.
#[derive(Debug, Subcommand)]
pub(crate) enum Quota {
    /// Bounds a namespace, in the place of the quota that it had: what is not named is not bounded.
    Set(Set),
    /// Lists the quotas, with what is asked for now.
    List(List),
    /// Takes the quota of a namespace away.
    Remove(Remove),
}

impl Quota {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Set(set) => set.run(),
            Self::List(List { common }) => {
                common.answer(&Ask::get("/v1/quotas"), show::list::<Shown>)
            }
            Self::Remove(remove) => remove.run(),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct List {
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
pub(crate) struct Set {
    /// The namespace.
    namespace: Name,
    #[command(flatten)]
    most: Most,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
struct Most {
    /// How many applications.
    #[arg(long, value_name = "COUNT")]
    applications: Option<u64>,
    /// How many replicas of all services.
    #[arg(long, value_name = "COUNT")]
    instances: Option<u64>,
    /// How much processing power all replicas request, as in 2 or 500m.
    #[arg(long, value_name = "CPU")]
    cpu: Option<Cpu>,
    /// How much memory all replicas request, as in 512Mi.
    #[arg(long, value_name = "SIZE")]
    memory: Option<Bytes>,
    /// How many GPUs all replicas request.
    #[arg(long, value_name = "COUNT")]
    gpus: Option<u64>,
}

impl Set {
    fn run(self) -> anyhow::Result<()> {
        let most = &self.most;
        let request = Amounts {
            applications: most.applications,
            instances: most.instances,
            cpu: most.cpu.map(|it| it.to_string()),
            memory: most.memory.map(|it| it.to_string()),
            gpus: most.gpus,
        };
        let path = format!("/v1/quotas/{}", self.namespace);
        let ask = Ask {
            method: Method::POST,
            body: serde_json::to_vec(&request)?.into(),
            ..Ask::get(&path)
        };
        let text = |changed: &Changed| match changed.changed {
            true => format!("namespace {} has a quota", self.namespace),
            false => format!("namespace {} had that quota already", self.namespace),
        };
        self.common.answer(&ask, text)
    }
}

#[derive(Debug, Args)]
pub(crate) struct Remove {
    /// The namespace.
    namespace: Name,
    #[command(flatten)]
    common: Common,
}

impl Remove {
    fn run(self) -> anyhow::Result<()> {
        let path = format!("/v1/quotas/{}", self.namespace);
        let ask = Ask {
            method: Method::DELETE,
            ..Ask::get(&path)
        };
        let text = |changed: &Changed| match changed.changed {
            true => format!("namespace {} has no quota any more", self.namespace),
            false => format!("namespace {} had no quota", self.namespace),
        };
        self.common.answer(&ask, text)
    }
}
