//! The command `weft agent`: its arguments, and from them an agent that runs until it is told to end.

use std::{io, net::SocketAddr, path::PathBuf};

use netmanager_api::identity::{Credentials, IdentityError};
use tokio::{
    net::TcpListener,
    signal::{
        ctrl_c,
        unix::{SignalKind, signal},
    },
};
use tokio_util::sync::CancellationToken;

use crate::{
    Agent, AgentError,
    config::{Config, ConfigError, DriverConfig},
    driver::local::{LocalDriver, LocalError},
};

/// The agent's command line.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The configuration file (agent.yaml).
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// The directory with tls.crt, tls.key and ca.crt, role agent.
    #[arg(long, value_name = "DIR")]
    pub credentials: PathBuf,
    /// A lead's address; name several, any of them will do.
    #[arg(long = "lead", value_name = "IP:PORT", required = true)]
    pub leads: Vec<SocketAddr>,
    /// Where the NetManagers of this cluster knock.
    #[arg(long, value_name = "IP:PORT")]
    pub listen: SocketAddr,
    /// What outlives a restart; without it the agent starts with nothing.
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
}

/// Why the command fails.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The configuration does not serve.
    #[error("the configuration does not serve")]
    Config(#[from] ConfigError),
    /// The credentials do not serve.
    #[error("the credentials in {path} do not serve")]
    Credentials {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: IdentityError,
    },
    /// The node door cannot be opened.
    #[error("failed to bind to {address}")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The driver cannot be made.
    #[error("the local driver does not start")]
    Driver(#[from] LocalError),
    /// Signals cannot be awaited.
    #[error("failed to wait for signals")]
    Signals(#[source] io::Error),
    /// The agent cannot start or go on.
    #[error(transparent)]
    Agent(#[from] AgentError),
}

/// Runs the agent until SIGTERM or SIGINT; the instances go on without it.
///
/// # Errors
/// When something that it is given does not serve.
pub async fn run(args: Args) -> Result<(), CommandError> {
    let config = Config::load(&args.config)?;
    let credentials =
        Credentials::load(&args.credentials).map_err(|source| CommandError::Credentials {
            path: args.credentials,
            source,
        })?;
    let DriverConfig::Local(local) = &config.driver;
    let driver = LocalDriver::open(local)?;
    let bind = TcpListener::bind(args.listen).await;
    let listener = bind.map_err(|source| CommandError::Bind {
        address: args.listen,
        source,
    })?;
    let shutdown = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).map_err(CommandError::Signals)?;
    let agent = Agent {
        config,
        credentials,
        leads: args.leads,
        listener,
        state: args.state,
        driver,
    };
    let serving = agent.serve(shutdown.clone());
    tokio::pin!(serving);
    tokio::select! {
        result = &mut serving => return Ok(result?),
        _ = terminate.recv() => tracing::info!("SIGTERM: ending"),
        result = ctrl_c() => {
            result.map_err(CommandError::Signals)?;
            tracing::info!("SIGINT: ending");
        }
    }
    shutdown.cancel();
    Ok(serving.await?)
}
