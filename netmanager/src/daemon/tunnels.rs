//! Keeps the tunnel device and its peers as the table wants them, beside the loop, because it may wait.
//!
//! A peer is carried before a VIP leads to it and until none does ([`Carrier::carry`]), so that no new flow
//! meets a tunnel that does not know its way yet.

use std::{path::PathBuf, sync::Arc, time::Duration};

use netmanager_api::table::{Peer, Table};
use tokio::{sync::watch, task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;

use super::{DaemonError, Settings};
use crate::{
    follow::chain,
    wireguard::{Config, Device, Tunnels, TunnelsError, WireGuard, peers},
};

/// How often a device that should be there is looked at: a userspace tunnel may have died.
const LOOK: Duration = Duration::from_secs(2);
/// How long maps wait for a peer: a device takes milliseconds, a userspace tunnel that starts some tens.
const PATIENCE: Duration = Duration::from_secs(2);

/// How the tunnel should be.
#[derive(Clone, Debug)]
pub struct TunnelSettings {
    /// Name of the device, unique on this file system.
    pub device: String,
    /// UDP port; 0 takes a free one.
    pub port: u16,
}

/// What the keeper carries now.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Carried {
    /// The device, once it exists.
    pub(super) device: Option<Device>,
    /// The table's peers that it has.
    peers: Vec<Peer>,
}

/// The node's end of the keeper.
pub(super) struct Carrier {
    wanted: watch::Sender<Option<Arc<Table>>>,
    mtu: watch::Sender<u16>,
    carried: watch::Receiver<Carried>,
    /// Peers that were waited for in vain; they are not waited for again.
    late: Vec<Peer>,
}

impl Carrier {
    /// The device, once it exists.
    pub(super) fn device(&self) -> Option<Device> {
        self.carried.borrow().device.clone()
    }

    /// For waiting until the device or its peers change.
    pub(super) fn watch(&self) -> watch::Receiver<Carried> {
        self.carried.clone()
    }

    /// The device's MTU from now on.
    pub(super) fn set_mtu(&self, mtu: u16) {
        self.mtu.send_replace(mtu);
    }

    /// Makes the peers of `table` known beside those that are; returns when they are, or after [`PATIENCE`].
    pub(super) async fn carry(&mut self, table: &Arc<Table>) {
        if self.carried.borrow().peers == table.peers {
            return;
        }
        let known = self.carried.borrow().peers.clone();
        let is_known = |peer: &Peer| known.contains(peer) || self.late.contains(peer);
        if table.peers.iter().all(is_known) {
            return;
        }
        let is_named = |peer: &&Peer| table.peers.iter().any(|new| new.number == peer.number);
        let leaving = known.iter().filter(|peer| !is_named(peer)).cloned();
        let mut both = Table::clone(table);
        both.peers.extend(leaving);
        self.wanted.send_replace(Some(Arc::new(both)));
        let is_there =
            |carried: &Carried| table.peers.iter().all(|peer| carried.peers.contains(peer));
        let waited = timeout(PATIENCE, self.carried.wait_for(is_there)).await;
        if !matches!(waited, Ok(Ok(_))) {
            tracing::warn!("going on although the tunnel does not know every peer yet");
            self.late.clone_from(&table.peers);
        }
    }

    /// Forgets the peers that `table` does not name.
    pub(super) fn settle(&mut self, table: &Arc<Table>) {
        self.late.retain(|peer| table.peers.contains(peer));
        self.wanted.send_if_modified(|known| {
            let is_new = known.as_ref() != Some(table);
            *known = Some(table.clone());
            is_new
        });
    }
}

/// Starts the keeper. The device exists from the start where there is an agent (who must be told its key),
/// else from the first table that has peers.
///
/// # Errors
/// When the node's key cannot be had, or the kernel cannot be asked.
pub(super) fn spawn(
    tasks: &mut JoinSet<()>,
    settings: &Settings,
    mtu: u16,
    shutdown: CancellationToken,
) -> Result<Carrier, DaemonError> {
    let tunnels = WireGuard::open(Config {
        name: settings.tunnel.device.clone(),
        state: settings.state.clone(),
        port: settings.tunnel.port,
        mtu,
        kind: None,
        program: PathBuf::from("/proc/self/exe"),
    })?;
    let (wanted, wanting) = watch::channel(None);
    let (mtu, mtus) = watch::channel(mtu);
    let (sender, carried) = watch::channel(Carried::default());
    let keeper = Keeper {
        tunnels,
        is_needed: settings.agent.is_some(),
        carried: sender,
        trouble: None,
    };
    tasks.spawn(keeper.run(wanting, mtus, shutdown));
    Ok(Carrier {
        wanted,
        mtu,
        carried,
        late: Vec::new(),
    })
}

struct Keeper<T> {
    tunnels: T,
    /// From the first need on the device is kept.
    is_needed: bool,
    carried: watch::Sender<Carried>,
    trouble: Option<String>,
}

impl<T: Tunnels> Keeper<T> {
    async fn run(
        mut self,
        mut wanting: watch::Receiver<Option<Arc<Table>>>,
        mut mtus: watch::Receiver<u16>,
        shutdown: CancellationToken,
    ) {
        loop {
            let table = wanting.borrow_and_update().clone();
            self.tunnels.set_mtu(*mtus.borrow_and_update());
            self.is_needed |= table.as_ref().is_some_and(|table| !table.peers.is_empty());
            if self.is_needed {
                let trouble = match self.ensure(table.as_deref()).await {
                    Ok(bad) if bad.is_empty() => None,
                    Ok(bad) => Some(bad.join("; ")),
                    Err(error) => Some(chain(&error)),
                };
                if let Some(error) = trouble.as_ref().filter(|_| trouble != self.trouble) {
                    tracing::warn!(%error, "the tunnel is not as it should be");
                }
                self.trouble = trouble;
            }
            tokio::select! {
                // Looked at again after a while, changed or not.
                changed = timeout(LOOK, wanting.changed()) => if let Ok(Err(_)) = changed { return },
                Ok(()) = mtus.changed() => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    /// Makes device and peers so; gives what is wrong with peers that were left out.
    async fn ensure(&mut self, table: Option<&Table>) -> Result<Vec<String>, TunnelsError> {
        let device = self.tunnels.ensure().await?;
        let mut wrong = Vec::new();
        let mut carried = Carried {
            device: Some(device),
            peers: Vec::new(),
        };
        if let Some(table) = table {
            let (wanted, bad) = peers::wanted(table);
            wrong.extend(bad.iter().map(|peer| chain(peer)));
            for op in self.tunnels.apply(&wanted).await? {
                tracing::info!(?op, "changed a tunnel peer");
            }
            carried.peers.clone_from(&table.peers);
        }
        self.carried.send_if_modified(|known| {
            let is_new = *known != carried;
            *known = carried;
            is_new
        });
        Ok(wrong)
    }
}

#[cfg(test)]
mod tests;
