//! `weft agent`: runs a cluster's agent, or makes this machine one.

use std::io::read_to_string;

use anyhow::Context;
use clap::{Args, Subcommand};
use weft_agent::join::{JoinArgs, join};

use crate::daemon;

/// Runs a cluster's agent, or makes this machine one.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Agent {
    #[command(subcommand)]
    step: Option<Step>,
    #[command(flatten)]
    run: Option<weft_agent::Args>,
}

#[derive(Debug, Subcommand)]
enum Step {
    /// Joins a mesh as a cluster, by what an admin's weft cluster join-string has printed.
    Join(JoinArgs),
}

impl Agent {
    /// Whether this is the daemon.
    pub(crate) fn is_daemon(&self) -> bool {
        self.step.is_none()
    }

    pub(crate) fn run(self) -> anyhow::Result<()> {
        let runtime = daemon::runtime()?;
        match (self.step, self.run) {
            (Some(Step::Join(args)), _) => runtime.block_on(run_join(args)),
            (None, Some(run)) => Ok(runtime.block_on(weft_agent::run(run))?),
            (None, None) => anyhow::bail!("what shall the agent do: see weft agent --help"),
        }
    }
}

async fn run_join(args: JoinArgs) -> anyhow::Result<()> {
    let string = match args.string.as_str() {
        "-" => read_to_string(std::io::stdin()).context("failed to read standard input")?,
        string => string.to_owned(),
    };
    let member = join(&string, &args.out).await?;
    let out = args.out.display();
    let leads: Vec<_> = member
        .leads
        .iter()
        .map(|lead| format!("--lead {lead}"))
        .collect();
    println!(
        "{} is in {out}; its agent renews it. Start the agent with\n  weft agent --config CONFIG --credentials {out} {} \
         --listen IP:PORT --state DIR",
        member.identity,
        leads.join(" ")
    );
    Ok(())
}
