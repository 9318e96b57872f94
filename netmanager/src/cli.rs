//! The command line.

use std::{net::IpAddr, net::SocketAddr, path::PathBuf};

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use netmanager_api::cni::DEFAULT_SOCKET;
use tokio::runtime;

use crate::{
    daemon::{self, Settings, TunnelSettings},
    datapath::{HookMode, Sizes, remove_pins},
    follow::Agent,
    links::Links,
    store::Store,
    tunnel,
    wireguard::{Config, Tunnels, WireGuard},
};

/// Makes this node's kernel match its table.
#[derive(Debug, Parser)]
#[command(name = "weft-netmanager", version)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the node's daemon.
    Run(Box<Run>),
    /// Carries a userspace tunnel; started by `run`, and outlives it.
    Tunnel(tunnel::Options),
    /// Removes what `run` left in the kernel; the node leaves the mesh.
    Remove(Remove),
}

#[derive(Debug, Args)]
struct Run {
    /// The node's name within its cluster.
    #[arg(long)]
    node: String,
    /// Address of the agent's node door (HOST:PORT).
    #[arg(long, requires = "credentials", required_unless_present = "table")]
    agent: Option<String>,
    /// Folder of tls.crt, tls.key and ca.crt.
    #[arg(long)]
    credentials: Option<PathBuf>,
    /// Follow a table from a file instead of an agent.
    #[arg(long, conflicts_with = "agent")]
    table: Option<PathBuf>,
    /// State directory: last table, attachments, tunnel key.
    #[arg(long, default_value = "/var/lib/weft/node")]
    state: PathBuf,
    /// The CNI socket.
    #[arg(long, default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// Folder for pins on a BPF file system; one is mounted there if there is none.
    #[arg(long, default_value = "/sys/fs/bpf/weft")]
    bpffs: PathBuf,
    /// UDP port of the tunnel; 0 takes a free one.
    #[arg(long, default_value_t = 27_460)]
    tunnel_port: u16,
    /// Name of the tunnel device, unique on this file system.
    #[arg(long, default_value = "weft-tunnel")]
    tunnel_device: String,
    /// Address by which other nodes reach this one, best first; else those of the default route's link.
    #[arg(long)]
    underlay: Vec<IpAddr>,
    /// Serve Prometheus metrics there (IP:PORT).
    #[arg(long)]
    metrics: Option<SocketAddr>,
    /// Name of the host's own endpoint.
    #[arg(long, default_value = "weft-node")]
    endpoint_device: String,
    /// How links carry the programs; asks the kernel by default.
    #[arg(long)]
    hook: Option<Hook>,
    /// Established flows per pod; 0 is no limit.
    #[arg(long, default_value_t = 32_768)]
    flows_per_endpoint: u32,
    /// Established flows in all; half as many others (UDP, echoes, TCP that opens or closes) are remembered.
    #[arg(long, default_value_t = 131_072)]
    flows: u32,
    /// Backends in all.
    #[arg(long, default_value_t = 16_384)]
    backends: u32,
    /// Slots in all: a backend has one per VIP, a sticky VIP has 16,381.
    #[arg(long, default_value_t = 262_144)]
    slots: u32,
    /// Declared ports in all, by address.
    #[arg(long, default_value_t = 16_384)]
    vips: u32,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Hook {
    /// TCX links (Linux 6.6 and later).
    Tcx,
    /// Classifiers of the clsact qdisc.
    Clsact,
}

#[derive(Debug, Args)]
struct Remove {
    /// State directory, as given to `run`; it stays, with the numbers that were given out.
    #[arg(long, default_value = "/var/lib/weft/node")]
    state: PathBuf,
    /// Name of the tunnel device, as given to `run`.
    #[arg(long, default_value = "weft-tunnel")]
    tunnel_device: String,
    /// Folder for pins, as given to `run`.
    #[arg(long, default_value = "/sys/fs/bpf/weft")]
    bpffs: PathBuf,
    /// Name of the host's own endpoint, as given to `run`.
    #[arg(long, default_value = "weft-node")]
    endpoint_device: String,
}

impl Cli {
    /// Does what the command line says.
    ///
    /// # Errors
    /// When it cannot.
    pub fn execute(self) -> anyhow::Result<()> {
        match self.command {
            Command::Run(options) => {
                let settings = options.settings();
                current_thread()?.block_on(daemon::run(settings))?;
                Ok(())
            }
            Command::Tunnel(options) => Ok(tunnel::run(&options)?),
            Command::Remove(options) => current_thread()?.block_on(options.execute()),
        }
    }

    /// What is logged where `RUST_LOG` says nothing.
    #[must_use]
    pub fn default_log(&self) -> &'static str {
        match self.command {
            Command::Tunnel(_) => tunnel::LOG,
            _ => "info",
        }
    }
}

/// One thread serves: the daemon mostly waits, and threads cost memory on every node.
fn current_thread() -> anyhow::Result<runtime::Runtime> {
    runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("failed to start the runtime")
}

impl Remove {
    /// Goes on after an error and reports the first.
    async fn execute(self) -> anyhow::Result<()> {
        let _lock = Store::open(&self.state)?;
        let tunnel = WireGuard::open(Config {
            name: self.tunnel_device,
            state: self.state,
            port: 0,
            mtu: tunnel::mtu_over(1_500),
            kind: None,
            program: PathBuf::from("/proc/self/exe"),
        });
        let tunnel = match tunnel {
            Ok(mut tunnel) => tunnel.remove().await,
            Err(error) => Err(error),
        };
        let node = Links::connect()?.remove_node(&self.endpoint_device).await;
        remove_pins(&self.bpffs)?;
        node?;
        Ok(tunnel?)
    }
}

impl Run {
    fn settings(self) -> Settings {
        let agent = self
            .agent
            .zip(self.credentials)
            .map(|(address, credentials)| Agent {
                address,
                node: self.node.clone(),
                credentials,
            });
        let gate = format!("{}p", self.endpoint_device);
        Settings {
            node: self.node,
            agent,
            table: self.table,
            state: self.state,
            socket: self.socket,
            bpffs: self.bpffs,
            hook: self.hook.map(|hook| match hook {
                Hook::Tcx => HookMode::Tcx,
                Hook::Clsact => HookMode::Clsact,
            }),
            sizes: Sizes {
                backends: self.backends,
                slots: self.slots,
                vips: self.vips,
                flows: self.flows,
            },
            quota: self.flows_per_endpoint,
            endpoint_names: (self.endpoint_device, gate),
            tunnel: TunnelSettings {
                device: self.tunnel_device,
                port: self.tunnel_port,
            },
            underlay: self.underlay,
            metrics: self.metrics,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent_and_needs_somebody_to_follow() {
        Cli::command().debug_assert();
        let parse = |line: &str| Cli::try_parse_from(line.split(' '));
        assert!(parse("weft-netmanager run --node n1 --table t.json").is_ok());
        assert!(parse("weft-netmanager run --node n1 --agent a:1 --credentials d").is_ok());
        assert!(parse("weft-netmanager run --node n1 --agent a:1").is_err());
        assert!(parse("weft-netmanager run --node n1").is_err());
    }
}
