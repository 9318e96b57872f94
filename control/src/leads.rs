//! `weft lead`: runs a lead, or changes who the leads are.

use std::{net::SocketAddr, time::Duration};

use ::http::Method;
use anyhow::{Context, ensure};
use clap::{Args, Subcommand};
use control_api::http::{Changed, Drained, Lead as Shown, LeadAdded, LeadRequest, List};
use control_core::name::Name;

use crate::{backup::Recover, client::Ask, daemon, show, user::Common};

/// How often a lead that catches up is looked for.
const LOOK: Duration = Duration::from_millis(250);

/// Runs a lead, or changes who the leads are.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Lead {
    #[command(subcommand)]
    change: Option<Change>,
    #[command(flatten)]
    run: Option<daemon::Daemon>,
}

#[derive(Debug, Subcommand)]
enum Change {
    /// Lists the leads: who leads, who votes, who catches up, who answers.
    List(ListLeads),
    /// Adds a lead: it catches up, then it votes.
    Add(Add),
    /// Removes a lead from the group; a leader hands over first.
    Remove(Remove),
    /// Adds a lead in the place of another, which leaves once the new one votes.
    Replace(Replace),
    /// Lets another lead, so that this one can be stopped.
    Drain(Drain),
    /// Makes one stopped lead a group of its own, when a majority of the leads is lost for good.
    Recover(Recover),
}

impl Lead {
    /// Whether this is the daemon.
    pub(crate) fn is_daemon(&self) -> bool {
        self.change.is_none()
    }

    pub(crate) fn run(self) -> anyhow::Result<()> {
        match (self.change, self.run) {
            (Some(Change::List(list)), _) => list.run(),
            (Some(Change::Add(add)), _) => add.run(),
            (Some(Change::Remove(remove)), _) => remove.run(),
            (Some(Change::Replace(replace)), _) => replace.run(),
            (Some(Change::Drain(drain)), _) => drain.run(),
            (Some(Change::Recover(recover)), _) => recover.run(),
            (None, Some(run)) => run.run(),
            (None, None) => anyhow::bail!("what shall the lead do: see weft lead --help"),
        }
    }
}

#[derive(Debug, Args)]
struct ListLeads {
    /// Answer without a leader, from what the asked lead knows.
    #[arg(long)]
    stale: bool,
    #[command(flatten)]
    common: Common,
}

impl ListLeads {
    fn run(self) -> anyhow::Result<()> {
        let path = format!("/v1/leads?consistent={}", !self.stale);
        self.common.answer(&Ask::get(&path), show::list::<Shown>)
    }
}

#[derive(Debug, Args)]
struct Add {
    /// The new lead's name, as in its certificate.
    name: Name,
    /// Where the other leads will reach it (its --advertise).
    #[arg(long, value_name = "IP:PORT")]
    address: SocketAddr,
    /// Wait so long until it votes.
    #[arg(long, value_name = "TIME", value_parser = daemon::duration)]
    wait: Option<Duration>,
    #[command(flatten)]
    common: Common,
}

impl Add {
    fn run(self) -> anyhow::Result<()> {
        let request = LeadRequest {
            name: self.name.into(),
            address: self.address,
            replaces: None,
        };
        admit(&self.common, &request, self.wait)
    }
}

#[derive(Debug, Args)]
struct Replace {
    /// The lead that leaves; it may be gone for good.
    name: Name,
    /// The new lead's name; the same is allowed, it is another member all the same.
    #[arg(long, value_name = "NAME")]
    with: Name,
    /// Where the other leads will reach the new one (its --advertise).
    #[arg(long, value_name = "IP:PORT")]
    address: SocketAddr,
    /// Wait so long until the new one votes and the old one has left.
    #[arg(long, value_name = "TIME", value_parser = daemon::duration)]
    wait: Option<Duration>,
    #[command(flatten)]
    common: Common,
}

impl Replace {
    fn run(self) -> anyhow::Result<()> {
        let request = LeadRequest {
            name: self.with.into(),
            address: self.address,
            replaces: Some(self.name.into()),
        };
        admit(&self.common, &request, self.wait)
    }
}

fn admit(common: &Common, request: &LeadRequest, wait: Option<Duration>) -> anyhow::Result<()> {
    let ask = Ask {
        method: Method::POST,
        body: serde_json::to_vec(request)?.into(),
        ..Ask::get("/v1/leads")
    };
    let added: LeadAdded = common.leads.ask(&ask)?;
    let Some(wait) = wait else {
        return common.write(&added, show::lead_added);
    };
    let end = std::time::Instant::now() + wait;
    loop {
        let list: List<Shown> = common.leads.ask(&Ask::get("/v1/leads"))?;
        if settled(&list.items, added.id) {
            let text = |_: &LeadAdded| format!("lead {} votes (member {})", added.name, added.id);
            return common.write(&added, text);
        }
        ensure!(
            std::time::Instant::now() < end,
            "lead {} does not vote after {wait:?}: is it running? {}",
            added.name,
            show::lead_added(&added)
        );
        std::thread::sleep(LOOK);
    }
}

/// Whether member `id` votes, and whoever it replaces is gone.
fn settled(leads: &[Shown], id: u64) -> bool {
    let new = leads.iter().find(|lead| lead.id == id);
    new.is_some_and(|new| {
        let gone = |old: u64| leads.iter().all(|lead| lead.id != old);
        new.role != "learner" && new.replaces.is_none_or(gone)
    })
}

#[derive(Debug, Args)]
struct Remove {
    /// The lead that leaves; it may be gone for good.
    name: Name,
    #[command(flatten)]
    common: Common,
}

impl Remove {
    fn run(self) -> anyhow::Result<()> {
        let path = format!("/v1/leads/{}", self.name);
        let ask = Ask {
            method: Method::DELETE,
            ..Ask::get(&path)
        };
        let text = |_: &Changed| format!("lead {} is removed: its data may be deleted", self.name);
        self.common.answer(&ask, text)
    }
}

#[derive(Debug, Args)]
struct Drain {
    /// The lead that shall not lead; whoever does when it is left out.
    name: Option<Name>,
    #[command(flatten)]
    common: Common,
}

impl Drain {
    fn run(self) -> anyhow::Result<()> {
        let path = match &self.name {
            Some(name) => format!("/v1/leads/{name}/drain"),
            None => "/v1/leads/drain".to_owned(),
        };
        let ask = Ask {
            method: Method::POST,
            ..Ask::get(&path)
        };
        let text = |drained: &Drained| format!("lead {} leads", drained.leader);
        let answer = self.common.answer(&ask, text);
        answer.context("nobody else leads")
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use crate::{Cli, Command};

    #[test]
    fn a_lead_is_run_by_its_options_and_changed_by_its_subcommands() {
        let run = [
            "weft",
            "lead",
            "--name",
            "a",
            "--data",
            "d",
            "--credentials",
            "c",
            "--listen",
            "127.0.0.1:1",
        ];
        let add = [
            "weft",
            "lead",
            "add",
            "d",
            "--address",
            "127.0.0.1:2",
            "--lead",
            "127.0.0.1:1",
            "--credentials",
            "c",
        ];
        for (arguments, is_daemon) in [(&run[..], true), (&add[..], false)] {
            let Command::Lead(lead) = Cli::parse_from(arguments).command else {
                panic!("{arguments:?} is about a lead");
            };
            assert_eq!(lead.is_daemon(), is_daemon, "{arguments:?}");
        }
        assert!(Cli::try_parse_from(["weft", "lead", "--name", "a"]).is_err());
    }
}
