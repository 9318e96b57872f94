//! `weft-netmanager`: the node daemon and the userspace tunnel.

use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;
use weft_netmanager::tunnel;

#[derive(Parser)]
#[command(version, about)]
enum Command {
    /// Carries the userspace tunnel; started by the daemon, outlives it.
    Tunnel(tunnel::Options),
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| tunnel::LOG.into());
    tracing_subscriber::fmt().with_env_filter(filter).init();
    let result = match Command::parse() {
        Command::Tunnel(options) => tunnel::run(&options).map_err(anyhow::Error::from),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
