//! Keeps the tunnel device and its peers as the table wants them, beside the loop, because it may wait.

use std::{path::PathBuf, sync::Arc, time::Duration};

use netmanager_api::table::Table;
use tokio::{sync::watch, task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;

use super::{DaemonError, Settings};
use crate::{
    follow::chain,
    wireguard::{Config, Device, Tunnels, WireGuard, peers},
};

/// How often a device that should be there is looked at: a userspace tunnel may have died.
const LOOK: Duration = Duration::from_secs(2);

/// How the tunnel should be.
#[derive(Clone, Debug)]
pub struct TunnelSettings {
    /// Name of the device, unique on this file system.
    pub device: String,
    /// UDP port; 0 takes a free one.
    pub port: u16,
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
    wanting: watch::Receiver<Option<Arc<Table>>>,
    shutdown: CancellationToken,
) -> Result<watch::Receiver<Option<Device>>, DaemonError> {
    let tunnels = WireGuard::open(Config {
        name: settings.tunnel.device.clone(),
        state: settings.state.clone(),
        port: settings.tunnel.port,
        mtu,
        kind: None,
        program: PathBuf::from("/proc/self/exe"),
    })?;
    let (sender, receiver) = watch::channel(None);
    let has_agent = settings.agent.is_some();
    tasks.spawn(keep(tunnels, has_agent, wanting, sender, shutdown));
    Ok(receiver)
}

async fn keep(
    mut tunnels: impl Tunnels,
    has_agent: bool,
    mut wanting: watch::Receiver<Option<Arc<Table>>>,
    device: watch::Sender<Option<Device>>,
    shutdown: CancellationToken,
) {
    let mut last_error = None;
    while !shutdown.is_cancelled() {
        let table = wanting.borrow_and_update().clone();
        let has_peers = table.as_ref().is_some_and(|table| !table.peers.is_empty());
        if has_agent || has_peers {
            let result = ensure(&mut tunnels, table.as_deref(), &device).await;
            let error = result.err().map(|error| chain(&error));
            if let Some(error) = error.as_ref().filter(|_| error != last_error) {
                tracing::warn!(%error, "the tunnel is not as it should be");
            }
            last_error = error;
        }
        tokio::select! {
            // Looked at again after a while, changed or not.
            changed = timeout(LOOK, wanting.changed()) => if let Ok(Err(_)) = changed { return },
            () = shutdown.cancelled() => return,
        }
    }
}

async fn ensure(
    tunnels: &mut impl Tunnels,
    table: Option<&Table>,
    device: &watch::Sender<Option<Device>>,
) -> Result<(), crate::wireguard::TunnelsError> {
    let found = tunnels.ensure().await?;
    if let Some(table) = table {
        let (wanted, bad) = peers::wanted(table);
        for peer in bad {
            tracing::warn!(error = chain(&peer), "a peer of the table is left out");
        }
        for op in tunnels.apply(&wanted).await? {
            tracing::info!(?op, "changed a tunnel peer");
        }
    }
    device.send_if_modified(|known| {
        let is_new = known.as_ref() != Some(&found);
        *known = Some(found);
        is_new
    });
    Ok(())
}
