//! WireGuard between the nodes: the device and its peers.
//!
//! Kernel WireGuard where the kernel has it, else the userspace [`tunnel`](crate::tunnel); both are configured
//! by one path, the `wireguard-control` crate (netlink for the one, a unix socket for the other). A change
//! keeps the sessions of all peers that stay.
//!
//! This module makes no addresses and no routes, and never deletes a device that it found.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    io,
    net::SocketAddr,
    path::PathBuf,
    time::Duration,
};

use ipnet::IpNet;

use crate::tunnel::SupervisorError;

mod device;
pub mod generation;
pub mod key;
mod link;
pub mod peers;

pub use device::WireGuard;
use key::{KeyError, PublicKey};
use peers::{PeerOp, PresentPeer, WantedPeer};

/// What the daemon needs of tunnels; [`WireGuard`] is the real one.
pub trait Tunnels: Send {
    /// Makes the device exist, up, with its MTU, key and port; starts it again if it died.
    ///
    /// To be called again and again. Another `ifindex` than before means a new device: its hooks, routes and
    /// peers are gone.
    fn ensure(&mut self) -> impl Future<Output = Result<Device, TunnelsError>> + Send;

    /// The device's MTU from the next [`Tunnels::ensure`] on.
    fn set_mtu(&mut self, mtu: u16);

    /// Makes the device's peers those of `want`; returns what was changed.
    fn apply(
        &mut self,
        want: &BTreeMap<PublicKey, WantedPeer>,
    ) -> impl Future<Output = Result<Vec<PeerOp>, TunnelsError>> + Send;

    /// The device and its peers as they are now.
    fn report(&mut self) -> impl Future<Output = Result<Report, TunnelsError>> + Send;

    /// Removes the device: a node leaves the mesh.
    fn remove(&mut self) -> impl Future<Output = Result<(), TunnelsError>> + Send;
}

/// What carries the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The kernel.
    Kernel,
    /// The process `weft-netmanager tunnel`.
    Userspace,
}

/// How the device should be.
#[derive(Clone, Debug)]
pub struct Config {
    /// Its name; unique on this file system.
    pub name: String,
    /// Folder of the private key and of the userspace tunnel's files.
    pub state: PathBuf,
    /// UDP port; 0 takes a free one and keeps it while the device lives.
    pub port: u16,
    /// MTU of the device, see [`crate::tunnel::mtu_over`].
    pub mtu: u16,
    /// Whether peers are spoken to where nobody else has anything to say: a device that nothing is sent by yet.
    pub is_eager: bool,
    /// What carries it; `None` asks the kernel.
    pub kind: Option<Kind>,
    /// The program that carries the userspace tunnel: `/proc/self/exe` is the daemon's own.
    pub program: PathBuf,
}

/// A device that exists and is up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// What carries it.
    pub kind: Kind,
    /// Its interface index.
    pub ifindex: u32,
    /// Its MTU.
    pub mtu: u32,
    /// Its public key.
    pub public_key: PublicKey,
    /// The UDP port it listens on.
    pub port: u16,
}

/// A device and its peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The device.
    pub device: Device,
    /// Its peers.
    pub peers: BTreeMap<PublicKey, PeerReport>,
}

/// A peer of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerReport {
    /// Where its packets go.
    pub endpoint: Option<SocketAddr>,
    /// The addresses routed to it.
    pub allowed: BTreeSet<IpNet>,
    /// How long ago the last handshake was; `None` before the first.
    pub handshake_age: Option<Duration>,
    /// Bytes received, with WireGuard's own.
    pub rx_bytes: u64,
    /// Bytes sent, with WireGuard's own.
    pub tx_bytes: u64,
}

impl From<PeerReport> for PresentPeer {
    fn from(report: PeerReport) -> Self {
        Self {
            endpoint: report.endpoint,
            allowed: report.allowed,
            handshake_age: report.handshake_age,
        }
    }
}

/// Why tunnels are not as they should be.
#[derive(Debug, thiserror::Error)]
pub enum TunnelsError {
    /// The name cannot be one of an interface.
    #[error("tunnel device name {name:?}: {reason}")]
    Name {
        /// The name.
        name: String,
        /// Why not.
        reason: String,
    },
    /// The node's key cannot be had.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The folder of a device's files cannot be made.
    #[error("failed to make the folder {}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The userspace tunnel does not run.
    #[error(transparent)]
    Supervisor(#[from] SupervisorError),
    /// It runs but does not answer.
    #[error("tunnel {name} does not answer at {} within {} ms", socket.display(), within.as_millis())]
    Silent {
        /// The device.
        name: String,
        /// Its socket.
        socket: PathBuf,
        /// How long was waited.
        within: Duration,
    },
    /// A device of that name has another key: it is not ours.
    #[error(
        "device {name} has the public key {found}, this node's is {ours}: choose another device name"
    )]
    Foreign {
        /// The device.
        name: String,
        /// Its key.
        found: String,
        /// Ours.
        ours: PublicKey,
    },
    /// The system refused.
    #[error("failed to {action} device {name}")]
    Device {
        /// What was tried.
        action: &'static str,
        /// The device.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel refused a change of the link.
    #[error("failed to {action} link {name}")]
    Link {
        /// What was tried.
        action: &'static str,
        /// The link.
        name: String,
        /// Why.
        #[source]
        source: Box<rtnetlink::Error>,
    },
}
