//! The command line.

use std::{
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    path::PathBuf,
};

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum, builder::RangedI64ValueParser};
use netmanager_api::cni::DEFAULT_SOCKET;
use tokio::runtime;

use crate::{
    daemon::{self, Settings, TunnelSettings},
    datapath::{HookMode, Sizes, hand_back, remove_pins},
    follow::Agent,
    guard,
    links::Links,
    store::{Store, StoreError},
    tunnel,
    wireguard::{Tunnels, WireGuard},
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
    /// Keeps packets of the mesh from leaving by a default route until `run` starts: for early in a boot.
    Guard(Guard),
    /// Removes what `run` left in the kernel; the node leaves the mesh.
    Remove(Remove),
    /// Hands forwarding back to the layout of the previous version, flows included: run it after this version was
    /// stopped, then start the previous one.
    Downgrade(Downgrade),
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
    /// UDP port of the tunnel, and the one above it while the tunnel moves to a next generation; 0 takes free ones.
    #[arg(long, default_value_t = 27_460)]
    tunnel_port: u16,
    /// Name of the tunnel device, unique on this file system.
    #[arg(long, default_value = "weft-tunnel")]
    tunnel_device: String,
    /// Begin a next generation of the tunnel: another device, key and port beside the old, which goes once nobody
    /// uses it. A userspace tunnel of another version does that by itself.
    #[arg(long)]
    renew_tunnel: bool,
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
    /// TCP connections that a pod may have, and half as many UDP flows; 0 is no limit.
    #[arg(long, default_value_t = 16_384)]
    flows_per_endpoint: u32,
    /// Endpoints in all: pods and the node's own.
    #[arg(long, default_value_t = 1_024, value_parser = size(16..=65_536))]
    endpoints: u32,
    /// Entries for TCP in all, two for each connection; half as many are for UDP and echoes.
    #[arg(long, default_value_t = 131_072, value_parser = size(1_024..=16_777_216))]
    flows: u32,
    /// Backends in all, with those that died in the last two minutes.
    #[arg(long, default_value_t = 16_384, value_parser = size(64..=4_194_304))]
    backends: u32,
    /// Slots in all: a backend has one per policy (twice while it changes), a sticky VIP has 16,381.
    #[arg(long, default_value_t = 262_144, value_parser = size(1_024..=67_108_864))]
    slots: u32,
    /// Declared ports in all, by address, and one more for each address.
    #[arg(long, default_value_t = 16_384, value_parser = size(64..=4_194_304))]
    vips: u32,
    /// Splice connections within the node between services that ask for it: a folder of the cgroup v2 hierarchy that
    /// holds the pods. Nothing is spliced without it.
    #[arg(long)]
    splice_cgroup: Option<PathBuf>,
}

/// A map's size, which must be in `range`.
fn size(range: RangeInclusive<i64>) -> RangedI64ValueParser<u32> {
    RangedI64ValueParser::new().range(range)
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Hook {
    /// TCX links (Linux 6.6 and later).
    Tcx,
    /// Classifiers of the clsact qdisc.
    Clsact,
}

#[derive(Debug, Args)]
struct Guard {
    /// State directory, as given to `run`.
    #[arg(long, default_value = "/var/lib/weft/node")]
    state: PathBuf,
}

impl Guard {
    async fn execute(&self) -> anyhow::Result<()> {
        match Store::open(&self.state) {
            Ok(store) => Ok(guard::raise(&store, &Links::connect()?).await?),
            Err(StoreError::InUse { .. }) => {
                tracing::info!("a NetManager runs already, which guards");
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }
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

#[derive(Debug, Args)]
struct Downgrade {
    /// State directory, as given to `run`.
    #[arg(long, default_value = "/var/lib/weft/node")]
    state: PathBuf,
    /// Folder for pins, as given to `run`.
    #[arg(long, default_value = "/sys/fs/bpf/weft")]
    bpffs: PathBuf,
}

impl Downgrade {
    fn execute(&self) -> anyhow::Result<()> {
        let _lock = Store::open(&self.state)?;
        Ok(hand_back(&self.bpffs)?)
    }
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
            Command::Guard(options) => current_thread()?.block_on(options.execute()),
            Command::Downgrade(options) => options.execute(),
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
        let store = Store::open(&self.state)?;
        let settings = TunnelSettings {
            device: self.tunnel_device,
            port: 0,
            is_renewed: false,
        };
        let mut tunnel = Ok(());
        for generation in 0..2 {
            let place = settings.place(generation, &self.state, tunnel::mtu_over(1_500));
            if !place.state.exists() {
                continue;
            }
            let removed = match WireGuard::open(place) {
                Ok(mut device) => device.remove().await,
                Err(error) => Err(error),
            };
            tunnel = tunnel.and(removed);
        }
        let node = Links::connect()?.remove_node(&self.endpoint_device).await;
        guard::keep(&store, &[])?;
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
                endpoints: self.endpoints,
                backends: self.backends,
                slots: self.slots,
                vips: self.vips,
                flows: self.flows,
            },
            splice: self.splice_cgroup,
            quota: self.flows_per_endpoint,
            endpoint_names: (self.endpoint_device, gate),
            tunnel: TunnelSettings {
                device: self.tunnel_device,
                port: self.tunnel_port,
                is_renewed: self.renew_tunnel,
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

    #[test]
    fn a_map_size_out_of_range_is_refused_by_its_option() {
        for (option, bad) in [
            ("--vips", "63"),
            ("--slots", "67108865"),
            ("--backends", "-1"),
            ("--flows", "1023"),
            ("--endpoints", "x"),
        ] {
            let line = format!("weft-netmanager run --node n1 --table t.json {option}={bad}");
            let error = Cli::try_parse_from(line.split(' '))
                .unwrap_err()
                .to_string();
            assert!(error.contains(option) && error.contains(bad), "{error}");
        }
    }
}
