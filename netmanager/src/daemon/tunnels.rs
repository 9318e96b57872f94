//! Keeps the tunnel device and its peers as the table wants them, beside the loop, because it may wait.
//!
//! A peer is carried before a VIP leads to it and until none does ([`Carrier::carry`]), so that no new flow
//! meets a tunnel that does not know its way yet. While the node moves to a next generation of its tunnel
//! ([`generation`]) it has two devices; one of them sends.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use netmanager_api::table::{Peer, Table};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{DaemonError, Settings};
use crate::{
    follow::chain,
    store::Store,
    tunnel::key_path,
    wireguard::{
        Config, Device, Tunnels, TunnelsError, WireGuard,
        generation::{self, Generations},
        key::PublicKey,
        peers::{self, PeerOp, WantedPeer},
    },
};

/// Which devices there are, in the state directory.
const GENERATIONS_FILE: &str = "tunnel.json";
/// The longest name of a link (`IFNAMSIZ`, linux/if.h, with its end).
const MAX_NAME: usize = 15;

/// How often a device that should be there is looked at: a userspace tunnel may have died.
const LOOK: Duration = Duration::from_secs(2);
/// The same while the node moves to a next generation.
const LOOK_WHILE_MOVING: Duration = Duration::from_millis(250);
/// An old device that nothing came in by for so long is used by nobody: peers are probed every second.
const QUIET: Duration = Duration::from_secs(5);
/// How long maps wait for a peer: a device takes milliseconds, a userspace tunnel that starts some tens.
const PATIENCE: Duration = Duration::from_secs(2);

/// How the tunnel should be.
#[derive(Clone, Debug)]
pub struct TunnelSettings {
    /// Name of the device, unique on this file system.
    pub device: String,
    /// UDP port; 0 takes a free one. A next generation of the device has the one above it.
    pub port: u16,
    /// Whether this start begins a next generation: another device, key and port.
    pub is_renewed: bool,
}

impl TunnelSettings {
    /// Where a generation's device is: two places take turns, because there are at most two at a time.
    #[must_use]
    pub fn place(&self, generation: u32, state: &Path, mtu: u16) -> Config {
        let is_second = generation % 2 == 1;
        let mut name = self.device.clone();
        let mut state = state.to_owned();
        let mut port = self.port;
        if is_second {
            name.truncate(MAX_NAME - 1);
            name.push('b');
            state.push("second");
            port = match port {
                0 => 0,
                u16::MAX => port - 1,
                _ => port + 1,
            };
        }
        Config {
            name,
            state,
            port,
            mtu,
            is_eager: false,
            kind: None,
            program: PathBuf::from("/proc/self/exe"),
        }
    }
}

/// What the keeper carries now.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Carried {
    /// The device that sends, once it exists.
    pub(super) device: Option<Device>,
    /// The one that is told to peers: the newest.
    announced: Option<Device>,
    /// Every device that packets may come out of.
    ifindexes: Vec<u32>,
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

    /// The device that peers are to know.
    pub(super) fn announced(&self) -> Option<Device> {
        self.carried.borrow().announced.clone()
    }

    /// Every device that packets may come out of.
    pub(super) fn devices(&self) -> impl Iterator<Item = u32> + use<> {
        self.carried.borrow().ifindexes.clone().into_iter()
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
    store: Arc<Store>,
    mtu: u16,
    shutdown: CancellationToken,
) -> Result<Carrier, DaemonError> {
    let generations: Generations = store.load(GENERATIONS_FILE)?.unwrap_or_default();
    let (own, state) = (settings.tunnel.clone(), settings.state.clone());
    let open = move |generation, is_eager, mtu| {
        let place = own.place(generation, &state, mtu);
        make_folder(&place.state)?;
        WireGuard::open(Config { is_eager, ..place })
    };
    let tunnels = open(generations.current, false, mtu)?;
    let is_outdated = settings.tunnel.is_renewed || tunnels.is_outdated()?;
    let next = match generations.is_moving {
        true => Some(open(generations.current + 1, true, mtu)?),
        false => None,
    };
    let (own, state) = (settings.tunnel.clone(), settings.state.clone());
    let forget_key = move |generation| {
        // It is made anew with the device.
        let _ = fs::remove_file(key_path(&own.place(generation, &state, 0).state));
    };
    let (wanted, wanting) = watch::channel(None);
    let (mtu, mtus) = watch::channel(mtu);
    let (sender, carried) = watch::channel(Carried::default());
    let keeper = Keeper {
        tunnels,
        next,
        generations,
        is_outdated,
        open: Box::new(open),
        forget_key: Box::new(forget_key),
        store,
        heard: None,
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

/// Makes the device of a generation: its number, whether it is eager, its MTU.
type Open<T> = Box<dyn Fn(u32, bool, u16) -> Result<T, TunnelsError> + Send>;

struct Keeper<T> {
    /// The device that all peers know.
    tunnels: T,
    /// The one that the node moves to.
    next: Option<T>,
    generations: Generations,
    /// Another version's process carries the device, or another is asked for.
    is_outdated: bool,
    open: Open<T>,
    forget_key: Box<dyn Fn(u32) + Send>,
    store: Arc<Store>,
    /// What had come in by the old device when something last did, and when that was.
    heard: Option<(u64, Instant)>,
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
            let mtu = *mtus.borrow_and_update();
            self.tunnels.set_mtu(mtu);
            if let Some(next) = &mut self.next {
                next.set_mtu(mtu);
            }
            self.is_needed |= table.as_ref().is_some_and(|table| !table.peers.is_empty());
            if self.is_needed {
                let trouble = match self.ensure(table.as_deref(), mtu).await {
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
                changed = timeout(self.rest(), wanting.changed()) => if let Ok(Err(_)) = changed { return },
                Ok(()) = mtus.changed() => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    fn rest(&self) -> Duration {
        if self.next.is_some() {
            LOOK_WHILE_MOVING
        } else {
            LOOK
        }
    }

    /// Makes devices and peers so; gives what is wrong with peers that were left out.
    async fn ensure(
        &mut self,
        table: Option<&Table>,
        mtu: u16,
    ) -> Result<Vec<String>, TunnelsError> {
        let device = self.tunnels.ensure().await?;
        let mut wrong = Vec::new();
        let mut carried = Carried {
            ifindexes: vec![device.ifindex],
            announced: Some(device.clone()),
            device: Some(device),
            peers: Vec::new(),
        };
        if let Some(table) = table {
            let (wanted, bad) = peers::wanted(table);
            wrong.extend(bad.iter().map(|peer| chain(peer)));
            if self.next.is_none() && self.must_move(&wanted).await? {
                self.begin(mtu)?;
            }
            if self.next.is_some() {
                self.go_on(&wanted, &mut carried).await?;
            } else {
                note(self.tunnels.apply(&wanted).await?);
            }
            carried.peers.clone_from(&table.peers);
        } else if let Some(next) = &mut self.next {
            let device = next.ensure().await?;
            carried.ifindexes.push(device.ifindex);
            if self.generations.is_switched {
                carried.device = Some(device.clone());
            }
            carried.announced = Some(device);
        }
        self.carried.send_if_modified(|known| {
            let is_new = *known != carried;
            *known = carried;
            is_new
        });
        Ok(wrong)
    }

    /// Whether this node, or one of its peers, is to have a next generation.
    async fn must_move(
        &mut self,
        wanted: &BTreeMap<PublicKey, WantedPeer>,
    ) -> Result<bool, TunnelsError> {
        if self.is_outdated {
            return Ok(true);
        }
        let present = self.tunnels.report().await?.peers;
        Ok(generation::has_moved(&present, wanted))
    }

    /// Begins a next generation.
    fn begin(&mut self, mtu: u16) -> Result<(), TunnelsError> {
        let number = self.generations.current + 1;
        (self.forget_key)(number);
        self.next = Some((self.open)(number, true, mtu)?);
        self.generations.is_moving = true;
        self.generations.is_switched = false;
        self.is_outdated = false;
        tracing::info!(generation = number, "the tunnel moves to a next generation");
        self.keep();
        Ok(())
    }

    /// Goes on with the move to the next generation.
    async fn go_on(
        &mut self,
        wanted: &BTreeMap<PublicKey, WantedPeer>,
        carried: &mut Carried,
    ) -> Result<(), TunnelsError> {
        let Some(next) = &mut self.next else {
            return Ok(());
        };
        let device = next.ensure().await?;
        note(next.apply(wanted).await?);
        let old = self.tunnels.report().await?.peers;
        note(self.tunnels.apply(&generation::held(&old, wanted)).await?);
        carried.ifindexes.push(device.ifindex);
        carried.announced = Some(device.clone());
        if !self.generations.is_switched && generation::is_ready(&old, &next.report().await?.peers)
        {
            tracing::info!(
                device = device.name,
                "every peer answers on the next tunnel: sending there"
            );
            self.generations.is_switched = true;
            self.keep();
        }
        if !self.generations.is_switched {
            return Ok(());
        }
        carried.device = Some(device);
        let received = generation::received(&old);
        match self.heard {
            Some((before, since)) if before == received => {
                if since.elapsed() >= QUIET {
                    self.finish(carried).await?;
                }
            }
            _ => self.heard = Some((received, Instant::now())),
        }
        Ok(())
    }

    /// Nothing comes in by the old device any more: it is removed.
    async fn finish(&mut self, carried: &mut Carried) -> Result<(), TunnelsError> {
        self.tunnels.remove().await?;
        if let Some(next) = self.next.take() {
            self.tunnels = next;
        }
        self.heard = None;
        self.is_outdated = false;
        self.generations = Generations {
            current: self.generations.current + 1,
            ..Generations::default()
        };
        carried.ifindexes = carried.device.iter().map(|device| device.ifindex).collect();
        tracing::info!(
            generation = self.generations.current,
            "the old tunnel is removed"
        );
        self.keep();
        Ok(())
    }

    fn keep(&self) {
        if let Err(error) = self.store.save(GENERATIONS_FILE, &self.generations) {
            // The node goes on; a restart would look for the device where it was.
            tracing::error!(
                error = chain(&error),
                "failed to keep the tunnel's generation"
            );
        }
    }
}

fn note(ops: Vec<PeerOp>) {
    for op in ops {
        tracing::info!(?op, "changed a tunnel peer");
    }
}

/// Makes a folder that only its owner reads: a key will be in it.
fn make_folder(path: &Path) -> Result<(), TunnelsError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| TunnelsError::Folder {
            path: path.to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests;
