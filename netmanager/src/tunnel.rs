//! The userspace tunnel: WireGuard in a process of its own, for kernels that have none.
//!
//! ```text
//!  weft-netmanager run ... --starts, finds again--> weft-netmanager tunnel --name weft0 ...
//!        |                                            [tun] <-> gotatun <-> [udp]
//!        '----- wireguard-control (UAPI socket) ----> [uapi]
//! ```
//!
//! The process outlives the daemon: a TUN device dies with its owner, and the sessions with it. It knows its
//! key, its port and nothing else; peers come through its socket. It adds no addresses and no routes. While
//! it is dead the daemon's `unreachable` routes keep overlay traffic from leaving in clear.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use gotatun::{
    device::{DeviceBuilder, uapi::UapiServer},
    packet::PacketBufPool,
    x25519::StaticSecret,
};
use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
};

use crate::wireguard::key::{KeyError, PrivateKey};

mod supervisor;
mod tun;
mod uapi;
mod udp;

pub(crate) use tun::without_link_local;

pub use supervisor::{Launch, Supervisor, SupervisorError};
pub use uapi::{DoorError, socket_path};

/// What is logged where nothing else is said: gotatun's device logs an error for each packet to a peer whose
/// endpoint is not known yet.
pub const LOG: &str = "info,gotatun=error,gotatun::device=off";

/// Bytes of a packet buffer: a packet of an underlay with MTU 1500 fits, a larger one grows its buffer.
const BUFFER: usize = 2048;
/// Buffers that a pool keeps between bursts.
const POOL_BUFFERS: usize = 512;
/// Worker threads: one for each direction.
const WORKERS: usize = 2;
/// Buffers for packets of one process' side of the tunnel.
type PacketPool = PacketBufPool<BUFFER>;

/// Bytes that WireGuard adds around an inner packet: 40 IPv6, 8 UDP, 16 header, 16 tag.
const OVERHEAD: u32 = 80;
/// The smallest MTU of a link that carries IPv6 (RFC 8200 section 5).
const MIN_MTU: u32 = 1280;

/// The tunnel's MTU over an underlay link with `underlay_mtu`.
#[must_use]
pub const fn mtu_over(underlay_mtu: u32) -> u16 {
    let mtu = underlay_mtu.saturating_sub(OVERHEAD);
    if mtu < MIN_MTU {
        MIN_MTU as u16
    } else if mtu > 65_535 - OVERHEAD {
        (65_535 - OVERHEAD) as u16
    } else {
        mtu as u16
    }
}

/// The options of `weft-netmanager tunnel`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Name of the device; unique on this file system, because its socket is.
    #[arg(long)]
    pub name: String,
    /// Folder with the private key and the pid file.
    #[arg(long)]
    pub state: PathBuf,
    /// UDP port to listen on; 0 takes a free one.
    #[arg(long)]
    pub port: u16,
    /// MTU of the device.
    #[arg(long, default_value_t = mtu_over(1500))]
    pub mtu: u16,
}

/// Why a tunnel did not start or ended.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// There is no usable private key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Another process carries this tunnel.
    #[error("a tunnel {name} runs already: {} is locked", path.display())]
    Running {
        /// The device.
        name: String,
        /// Its pid file.
        path: PathBuf,
    },
    /// Its door cannot be opened.
    #[error(transparent)]
    Door(#[from] DoorError),
    /// Something that it needs from the system was refused.
    #[error("failed to {action}")]
    System {
        /// What was tried.
        action: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The socket cannot be bound.
    #[error("failed to listen on UDP port {port}")]
    Listen {
        /// The port.
        port: u16,
        /// Why.
        #[source]
        source: gotatun::device::Error,
    },
    /// It ran and then lost its device.
    #[error("the tunnel lost its device")]
    Lost,
}

fn system(action: impl Into<String>) -> impl FnOnce(io::Error) -> TunnelError {
    let action = action.into();
    move |source| TunnelError::System { action, source }
}

/// The file that holds the private key of the tunnels in `state`.
#[must_use]
pub fn key_path(state: &Path) -> PathBuf {
    state.join("tunnel.key")
}

/// The file that holds the tunnel's process number; it is locked as long as that process lives.
#[must_use]
pub fn pid_path(state: &Path, name: &str) -> PathBuf {
    state.join(format!("tunnel-{name}.pid"))
}

/// Carries the tunnel until SIGTERM or SIGINT, or until its device is gone.
///
/// # Errors
/// When it cannot start, and when it ended by itself.
pub fn run(options: &Options) -> Result<(), TunnelError> {
    // A session of its own: what ends the daemon's terminal or process group does not reach the tunnel. It
    // fails only where the process leads a group already, which is as good.
    let _ = nix::unistd::setsid();
    let _lock = lock(options)?;
    let key = PrivateKey::load_or_create(&key_path(&options.state))?;
    runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .build()
        .map_err(system("start the runtime"))?
        .block_on(carry(options, &key))
}

/// Takes the lock that says that this process carries the tunnel, and writes its number for people.
fn lock(options: &Options) -> Result<File, TunnelError> {
    let path = pid_path(&options.state, &options.name);
    let action = format!("write {}", path.display());
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(system(action.as_str()))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(TunnelError::Running {
                name: options.name.clone(),
                path,
            });
        }
        Err(TryLockError::Error(source)) => return Err(system(action)(source)),
    }
    file.set_len(0)
        .and_then(|()| writeln!(file, "{}", std::process::id()))
        .map_err(system(action))?;
    Ok(file)
}

/// Puts the parts together and waits for an end.
async fn carry(options: &Options, key: &PrivateKey) -> Result<(), TunnelError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(system("handle SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(system("handle SIGINT"))?;
    let door = uapi::Door::open(&options.name).await?;
    let mut tun = tun::open(&options.name, options.mtu)
        .map_err(system(format!("make the TUN device {}", options.name)))?;
    let (client, server) = UapiServer::new();
    let listen = |source| TunnelError::Listen {
        port: options.port,
        source,
    };
    let device = DeviceBuilder::new()
        .with_udp(udp::Udp)
        .with_ip_pair(tun.writer, tun.reader)
        .with_private_key(StaticSecret::from(key.bytes()))
        .with_listen_port(options.port)
        .with_uapi(server)
        .build()
        .await
        .map_err(listen)?;
    // A device without peers does not listen yet; a change of its set of peers, even from none to none, makes it.
    device.clear_peers().await.map_err(listen)?;
    tracing::info!(name = options.name, port = options.port, mtu = options.mtu, key = %key.public(), "the tunnel is up");

    let device = Arc::new(device);
    let ended = tokio::select! {
        () = door.serve(Arc::clone(&device), client) => Ok(()),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        end = tun.tasks.join_next() => {
            tracing::error!(?end, "the TUN device is gone");
            Err(TunnelError::Lost)
        }
    };
    drop(door);
    if let Some(device) = Arc::into_inner(device) {
        device.stop().await;
    }
    tun.tasks.shutdown().await;
    tracing::info!(name = options.name, "the tunnel is down");
    ended
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mtu_leaves_room_for_the_overhead_and_never_falls_below_ipv6s() {
        let cases = [
            (1500, 1420),
            (9000, 8920),
            (1450, 1370),
            (1360, 1280),
            (1280, 1280),
            (68, 1280),
            (0, 1280),
            (65_536, 65_455),
        ];
        for (underlay, mtu) in cases {
            assert_eq!(mtu_over(underlay), mtu, "{underlay}");
        }
    }

    #[test]
    fn a_second_tunnel_of_one_name_is_refused_while_the_first_lives() {
        let dir = tempfile::tempdir().unwrap();
        let options = Options {
            name: "weft0".to_owned(),
            state: dir.path().to_owned(),
            port: 0,
            mtu: 1420,
        };
        let first = lock(&options).unwrap();
        let error = lock(&options).unwrap_err();
        assert!(matches!(error, TunnelError::Running { .. }), "{error}");
        drop(first);
        lock(&options).unwrap();
    }
}
