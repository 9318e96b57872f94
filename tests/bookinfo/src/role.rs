//! Which part of the application this process plays.

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{client, load, service};

/// A small book shop whose services call each other by semantic service IPs.
#[derive(Debug, Parser)]
#[command(name = "bookinfo")]
pub(crate) struct Bookinfo {
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// The page: calls details and one of reviews v1, v2, v3 in turn.
    Productpage(ServiceArgs),
    /// Facts about the book; calls nobody.
    Details(ServiceArgs),
    /// Reviews of the book; v2 and v3 call ratings.
    Reviews {
        /// Which of the three.
        #[arg(long)]
        version: Version,
        #[command(flatten)]
        args: ServiceArgs,
    },
    /// Stars; calls nobody.
    Ratings(ServiceArgs),
    /// Does nothing until it is told to stop: a pod from which others are called.
    Idle,
    /// Asks for pages and says who answered.
    Client(client::ClientArgs),
    /// Asks for pages at a fixed rate, whatever the answers.
    Load(load::LoadArgs),
}

/// What the services have in common.
#[derive(Clone, Debug, Args)]
pub(crate) struct ServiceArgs {
    /// The port to listen on, IPv4 and IPv6, and the port of the services it calls.
    #[arg(long, default_value_t = 9080)]
    pub(crate) port: u16,
    /// By which of their VIPs the services it calls are called.
    #[arg(long, default_value = "balanced")]
    pub(crate) policy: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Version {
    V1,
    V2,
    V3,
}

impl Bookinfo {
    /// Plays the part until it is told to stop.
    pub(crate) fn run(self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("failed to start the runtime")?;
        runtime.block_on(async {
            match self.role {
                Role::Productpage(args) => {
                    let calls = service::Calls::Page;
                    service::serve("productpage", None, calls, args).await
                }
                Role::Details(args) => {
                    service::serve("details", None, service::Calls::Nobody, args).await
                }
                Role::Reviews { version, args } => {
                    let (name, calls) = match version {
                        Version::V1 => ("v1", service::Calls::Nobody),
                        Version::V2 => ("v2", service::Calls::Ratings),
                        Version::V3 => ("v3", service::Calls::Ratings),
                    };
                    service::serve("reviews", Some(name), calls, args).await
                }
                Role::Ratings(args) => {
                    service::serve("ratings", None, service::Calls::Nobody, args).await
                }
                Role::Idle => service::idle().await,
                Role::Client(args) => client::run(&args).await,
                Role::Load(args) => load::run(args).await,
            }
        })
    }
}
