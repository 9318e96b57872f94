//! The `weft` command: its daemons, and the CLI on the control API.
//!
//! Exit codes: 0 done, 1 it did not work, 2 wrong use, 65 a lead cannot use its data any more. Logs go to standard error, answers to standard output.
#![deny(unsafe_code)]

mod agent;
mod authority;
mod backup;
mod client;
mod clusters;
mod daemon;
mod flows;
mod heap;
mod leads;
mod node_door;
mod quota;
mod security;
mod show;
mod trace;
mod user;

use std::{io::IsTerminal, process::ExitCode};

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;
use weft_lab::LabCommand;
use weft_lead::LeadError;

/// Gives every microservice an address that says how it wants to be reached, and decides where they run.
#[derive(Debug, Parser)]
#[command(name = "weft", version)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Makes a mesh: its certificate authority and its mesh file.
    Init(authority::Init),
    /// Issues a certificate.
    Cert(authority::Cert),
    /// Issues new certificates to the holders of old ones.
    Renew(authority::Renew),
    /// Puts another certificate authority in the place of the mesh's.
    #[command(subcommand)]
    Authority(authority::Authority),
    /// Revokes certificates.
    #[command(subcommand)]
    Certificate(security::Certificates),
    /// Tokens for the control API.
    #[command(subcommand)]
    Token(security::Token),
    /// Bounds what the goals of a namespace ask for.
    #[command(subcommand)]
    Quota(quota::Quota),
    /// Shows who changed what.
    Audit(security::Audit),
    /// Runs a lead, or changes who the leads are.
    Lead(Box<leads::Lead>),
    /// Lists the clusters, lets one join or leave, or empties one.
    #[command(subcommand)]
    Cluster(clusters::Clusters),
    /// Runs a cluster's agent, or makes this machine one.
    Agent(Box<agent::Agent>),
    /// Applies a goal file.
    Apply(user::Apply),
    /// Lists things of one kind.
    Get(user::Get),
    /// Says why a service is where it is.
    Explain(user::Explain),
    /// Deletes an application.
    Delete(user::Delete),
    /// Moves a slot to another cluster.
    Migrate(user::Migrate),
    /// Says how the leads are.
    Status(user::Status),
    /// Writes all that the leads know into a file.
    Backup(backup::Backup),
    /// Makes the mesh what a backup says.
    Restore(backup::Restore),
    /// Shows what happens to flows on this node.
    Flows(flows::Flows),
    /// Says what this node would do with a packet, and why.
    Trace(trace::Trace),
    /// A whole mesh on this machine, in network namespaces.
    #[command(subcommand)]
    Lab(LabCommand),
}

/// Starts logging to standard error; `WEFT_LOG` says what, as in `info,weft_lead=debug`.
pub fn start_tracing(cli: &Cli) {
    // The leads say themselves who leads and who is out of reach; openraft says it with every message.
    let usual = match cli.command {
        Command::Lead(ref lead) if lead.is_daemon() => "info,openraft=off",
        Command::Agent(ref agent) if agent.is_daemon() => "info,openraft=off",
        _ => "warn",
    };
    let filter = EnvFilter::try_from_env("WEFT_LOG").unwrap_or_else(|_| EnvFilter::new(usual));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
}

/// What a service manager is not to start again (`EX_DATAERR` of sysexits.h).
const USELESS_DATA: u8 = 65;

/// How the process ends after `error`.
#[must_use]
pub fn exit_code(error: &anyhow::Error) -> ExitCode {
    match error.downcast_ref::<LeadError>() {
        Some(error) if error.is_final() => ExitCode::from(USELESS_DATA),
        _ => ExitCode::FAILURE,
    }
}

/// Does what the command line says.
///
/// # Errors
/// With everything that a person needs to know.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Init(init) => init.run(),
        Command::Cert(cert) => cert.run(),
        Command::Renew(renew) => renew.run(),
        Command::Authority(step) => step.run(),
        Command::Certificate(certificates) => certificates.run(),
        Command::Token(token) => token.run(),
        Command::Quota(quota) => quota.run(),
        Command::Audit(audit) => audit.run(),
        Command::Lead(lead) => lead.run(),
        Command::Cluster(cluster) => cluster.run(),
        Command::Agent(agent) => agent.run(),
        Command::Apply(apply) => apply.run(),
        Command::Get(get) => get.run(),
        Command::Explain(explain) => explain.run(),
        Command::Delete(delete) => delete.run(),
        Command::Migrate(migrate) => migrate.run(),
        Command::Status(status) => status.run(),
        Command::Backup(backup) => backup.run(),
        Command::Restore(restore) => restore.run(),
        Command::Flows(flows) => flows.run(),
        Command::Trace(trace) => trace.run(),
        Command::Lab(lab) => Ok(lab.run()?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_name_never_becomes_another_request() {
        let ask = |words: &str, name: &str| {
            let lead = ["--lead", "127.0.0.1:1", "--credentials", "c"];
            let words = words.split(' ').map(|word| match word {
                "NAME" => name,
                word => word,
            });
            Cli::try_parse_from(["weft"].into_iter().chain(words).chain(lead))
        };
        for (words, good) in [
            ("cluster drain NAME", "edge"),
            ("cluster undrain NAME", "edge"),
            ("cluster forget NAME", "edge"),
            ("cluster join-string NAME", "edge"),
            ("cluster leave NAME", "edge"),
            ("lead add NAME --address 127.0.0.1:2", "d"),
            ("lead remove NAME", "d"),
            ("lead replace NAME --with e --address 127.0.0.1:2", "d"),
            ("lead replace d --with NAME --address 127.0.0.1:2", "e"),
            ("lead drain NAME", "d"),
            ("token create NAME --access viewer --out f", "ci"),
            ("token revoke NAME", "ci"),
            ("quota set NAME --instances 1", "shop"),
            ("quota remove NAME", "shop"),
            ("delete NAME", "default/shop"),
            ("explain NAME", "default/shop/front"),
            ("migrate NAME --to edge", "default/shop/front/0"),
            ("migrate a/b/c/0 --to NAME", "edge"),
        ] {
            assert!(ask(words, good).is_ok(), "{words}: {good}");
            for end in ["/drain", "?abandon=true", "/../leads", "#x", "%2f", " b"] {
                let bad = format!("{good}{end}");
                let error = ask(words, &bad).unwrap_err().to_string();
                assert!(error.contains(&bad), "{words}: {error}");
            }
            for bad in ["../leads", "a b", "", "."] {
                let error = ask(words, bad).unwrap_err().to_string();
                assert!(error.contains("not"), "{words}: {error}");
            }
        }
    }
}
