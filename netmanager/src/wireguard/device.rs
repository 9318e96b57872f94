//! The real tunnels: a WireGuard device of the kernel or of the userspace process.

use std::{
    collections::BTreeMap,
    io,
    os::unix::net::UnixStream,
    time::{Duration, Instant, SystemTime},
};

use ipnet::IpNet;
use wireguard_control::{
    AllowedIp, Backend, Device as WgDevice, DeviceUpdate, InterfaceName, Key, PeerConfigBuilder,
    PeerInfo, backends,
};

use super::{
    Config, Device, Kind, PeerReport, Report, Tunnels, TunnelsError,
    key::{PrivateKey, PublicKey},
    link,
    peers::{PeerOp, WantedPeer, canonical, diff},
};
use crate::tunnel::{Launch, Supervisor, key_path, socket_path};

/// How long one question to the device may take; it answers within a millisecond.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a tunnel process may take until its door is open; it takes some 20 ms.
const START: Duration = Duration::from_secs(3);

/// How often an eager device speaks to its peers, seconds: as often as peers are probed.
const EAGER_S: u16 = 1;

/// One WireGuard device.
#[derive(Debug)]
pub struct WireGuard {
    config: Config,
    name: InterfaceName,
    key: PrivateKey,
    kind: Kind,
    supervisor: Supervisor,
}

impl WireGuard {
    /// Chooses what carries the device and makes the node's key if it has none. Nothing else is changed: the
    /// device is made by [`Tunnels::ensure`].
    ///
    /// # Errors
    /// When the name cannot be a device's, the key cannot be had, or the kernel cannot be asked.
    pub fn open(config: Config) -> Result<Self, TunnelsError> {
        let name: InterfaceName =
            config
                .name
                .parse()
                .map_err(
                    |reason: wireguard_control::InvalidInterfaceName| TunnelsError::Name {
                        name: config.name.clone(),
                        reason: reason.to_string(),
                    },
                )?;
        let key = PrivateKey::load_or_create(&key_path(&config.state))?;
        let supervisor = Supervisor::new(Launch {
            program: config.program.clone(),
            name: config.name.clone(),
            state: config.state.clone(),
            port: config.port,
            mtu: config.mtu,
        });
        let kind = match config.kind {
            Some(kind) => kind,
            // What carries traffic now goes on carrying it.
            None if supervisor.is_alive()? => Kind::Userspace,
            None if link::kernel_has_wireguard()? => Kind::Kernel,
            None => Kind::Userspace,
        };
        tracing::info!(name = config.name, ?kind, key = %key.public(), "tunnels are chosen");
        Ok(Self {
            config,
            name,
            key,
            kind,
            supervisor,
        })
    }

    /// The public key that peers know this node by.
    #[must_use]
    pub fn public_key(&self) -> PublicKey {
        self.key.public()
    }

    /// Whether another version's process carries the device: a next generation would be this version's.
    ///
    /// # Errors
    /// When the process cannot be asked for.
    pub fn is_outdated(&self) -> Result<bool, TunnelsError> {
        Ok(self.kind == Kind::Userspace && self.supervisor.is_outdated()?)
    }

    /// What carries the device.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    fn backend(&self) -> Backend {
        match self.kind {
            Kind::Kernel => Backend::Kernel,
            Kind::Userspace => Backend::Userspace,
        }
    }

    fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> TunnelsError + use<> {
        let name = self.config.name.clone();
        move |source| TunnelsError::Device {
            action,
            name,
            source,
        }
    }

    /// Runs a blocking question on a thread of its own and waits for it in bounded time: a process that hangs
    /// must not hang the daemon.
    async fn ask<T: Send + 'static>(
        &self,
        action: &'static str,
        question: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, TunnelsError> {
        let answer = tokio::task::spawn_blocking(question);
        match tokio::time::timeout(PATIENCE, answer).await {
            Ok(Ok(answer)) => answer.map_err(self.failed(action)),
            Ok(Err(panic)) => Err(self.failed(action)(io::Error::other(panic))),
            Err(_) => Err(TunnelsError::Silent {
                name: self.config.name.clone(),
                socket: socket_path(&self.config.name),
                within: PATIENCE,
            }),
        }
    }

    async fn read(&self) -> Result<WgDevice, TunnelsError> {
        let (name, backend) = (self.name, self.backend());
        self.ask("read", move || WgDevice::get(&name, backend))
            .await
    }

    async fn update(&self, update: DeviceUpdate) -> Result<(), TunnelsError> {
        let (name, backend) = (self.name, self.backend());
        let socket = socket_path(&self.config.name);
        self.ask("configure", move || {
            if backend == Backend::Userspace {
                // Without a socket the crate would start another program under our name.
                UnixStream::connect(&socket)?;
            }
            update.apply(&name, backend)
        })
        .await
    }

    /// Makes a device of the kernel's with our key and port; one that is there keeps its sessions.
    async fn ensure_kernel(&self) -> Result<WgDevice, TunnelsError> {
        if self.read().await.is_err() {
            self.update(
                DeviceUpdate::new()
                    .set_private_key(self.key.key())
                    .set_listen_port(self.config.port),
            )
            .await?;
        }
        self.read().await
    }

    /// Starts the tunnel process if there is none and waits until it answers.
    async fn ensure_userspace(&mut self) -> Result<WgDevice, TunnelsError> {
        let deadline = Instant::now() + START;
        loop {
            self.supervisor.ensure(Instant::now())?;
            match self.read().await {
                Ok(device) => return Ok(device),
                Err(_) if Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Err(_) => {
                    return Err(TunnelsError::Silent {
                        name: self.config.name.clone(),
                        socket: socket_path(&self.config.name),
                        within: START,
                    });
                }
            }
        }
    }

    /// Removes the socket that a killed tunnel left; one that answers is another node's.
    fn remove_dead_socket(&self) -> Result<(), TunnelsError> {
        let socket = socket_path(&self.config.name);
        if UnixStream::connect(&socket).is_ok() {
            return Ok(());
        }
        match std::fs::remove_file(&socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(self.failed("remove the socket of")(error))
            }
            _ => Ok(()),
        }
    }

    async fn describe(&self, device: &WgDevice) -> Result<Device, TunnelsError> {
        let public_key = self.key.public();
        let found = device.public_key.as_ref();
        if found.is_none_or(|found| found.0 != public_key.0) {
            return Err(TunnelsError::Foreign {
                name: self.config.name.clone(),
                found: found.map_or_else(|| "none".to_owned(), Key::to_base64),
                ours: public_key,
            });
        }
        let (ifindex, mtu) = link::up(&self.config.name, self.config.mtu).await?;
        Ok(Device {
            name: self.config.name.clone(),
            kind: self.kind,
            ifindex,
            mtu,
            public_key,
            port: device.listen_port.unwrap_or_default(),
        })
    }
}

impl Tunnels for WireGuard {
    async fn ensure(&mut self) -> Result<Device, TunnelsError> {
        let device = match self.kind {
            Kind::Kernel => self.ensure_kernel().await?,
            Kind::Userspace => self.ensure_userspace().await?,
        };
        let described = self.describe(&device).await?;
        if self.config.port == 0 || described.port == self.config.port {
            return Ok(described);
        }
        self.update(DeviceUpdate::new().set_listen_port(self.config.port))
            .await?;
        Ok(Device {
            port: self.config.port,
            ..described
        })
    }

    fn set_mtu(&mut self, mtu: u16) {
        self.config.mtu = mtu;
        self.supervisor.set_mtu(mtu);
    }

    async fn apply(
        &mut self,
        want: &BTreeMap<PublicKey, WantedPeer>,
    ) -> Result<Vec<PeerOp>, TunnelsError> {
        let now = SystemTime::now();
        let have = self
            .read()
            .await?
            .peers
            .iter()
            .map(|peer| {
                let (key, report) = present(peer, now);
                (key, report.into())
            })
            .collect();
        let ops = diff(&have, want);
        if !ops.is_empty() {
            self.update(update(&ops, self.config.is_eager)).await?;
        }
        Ok(ops)
    }

    async fn report(&mut self) -> Result<Report, TunnelsError> {
        let device = self.read().await?;
        let now = SystemTime::now();
        Ok(Report {
            device: self.describe(&device).await?,
            peers: device.peers.iter().map(|peer| present(peer, now)).collect(),
        })
    }

    async fn remove(&mut self) -> Result<(), TunnelsError> {
        match self.kind {
            Kind::Userspace => {
                self.supervisor.stop()?;
                self.remove_dead_socket()
            }
            Kind::Kernel => {
                let name = self.name;
                self.ask("remove", move || backends::kernel::delete_interface(&name))
                    .await
            }
        }
    }
}

/// A peer as the device tells it. The device counts by the wall clock; a handshake of the future (the clock
/// was set back) is a fresh one.
fn present(peer: &PeerInfo, now: SystemTime) -> (PublicKey, PeerReport) {
    let report = PeerReport {
        endpoint: peer.config.endpoint.map(canonical),
        allowed: peer
            .config
            .allowed_ips
            .iter()
            .filter_map(|allowed| IpNet::new(allowed.address, allowed.cidr).ok())
            .collect(),
        handshake_age: peer
            .stats
            .last_handshake_time
            .map(|then| now.duration_since(then).unwrap_or_default()),
        rx_bytes: peer.stats.rx_bytes,
        tx_bytes: peer.stats.tx_bytes,
    };
    (PublicKey(peer.config.public_key.0), report)
}

/// The changes as one update of the device.
fn update(ops: &[PeerOp], is_eager: bool) -> DeviceUpdate {
    ops.iter().fold(DeviceUpdate::new(), |update, op| match op {
        PeerOp::Remove(key) => update.remove_peer_by_key(&Key(key.0)),
        PeerOp::Put {
            key,
            endpoint,
            allowed,
        } => {
            let mut peer = PeerConfigBuilder::new(&Key(key.0));
            if is_eager {
                peer = peer.set_persistent_keepalive_interval(EAGER_S);
            }
            if let Some(endpoint) = endpoint {
                peer = peer.set_endpoint(*endpoint);
            }
            if let Some(allowed) = allowed {
                let allowed: Vec<AllowedIp> = allowed
                    .iter()
                    .map(|net| AllowedIp {
                        address: net.addr(),
                        cidr: net.prefix_len(),
                    })
                    .collect();
                peer = peer.replace_allowed_ips().add_allowed_ips(&allowed);
            }
            update.add_peer(peer)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_become_one_update_that_names_each_peer_once() {
        let allowed =
            ["10.16.0.32/27", "fd12:3456:789a:0:0:9::/96"].map(|net| net.parse::<IpNet>().unwrap());
        let ops = [
            PeerOp::Remove(PublicKey([1; 32])),
            PeerOp::Put {
                key: PublicKey([2; 32]),
                endpoint: Some("192.0.2.2:7000".parse().unwrap()),
                allowed: Some(allowed.into_iter().collect()),
            },
            PeerOp::Put {
                key: PublicKey([3; 32]),
                endpoint: None,
                allowed: Some([].into()),
            },
        ];
        let want = DeviceUpdate::new()
            .add_peer(PeerConfigBuilder::new(&Key([1; 32])).remove())
            .add_peer(
                PeerConfigBuilder::new(&Key([2; 32]))
                    .set_endpoint("192.0.2.2:7000".parse().unwrap())
                    .replace_allowed_ips()
                    .add_allowed_ip("10.16.0.32".parse().unwrap(), 27)
                    .add_allowed_ip("fd12:3456:789a:0:0:9::".parse().unwrap(), 96),
            )
            .add_peer(PeerConfigBuilder::new(&Key([3; 32])).replace_allowed_ips());
        assert_eq!(update(&ops, false), want);
    }

    #[test]
    fn a_peer_is_told_with_its_age_and_a_clock_set_back_makes_it_young() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let mut info = PeerInfo::from_public_key(Key([7; 32]));
        info.config.endpoint = Some("[::ffff:192.0.2.2]:7000".parse().unwrap());
        info.config.allowed_ips = vec!["10.16.0.32/27".parse().unwrap()];
        let cases = [(None, None), (Some(990), Some(10)), (Some(1010), Some(0))];
        for (then, age) in cases {
            info.stats.last_handshake_time =
                then.map(|then| SystemTime::UNIX_EPOCH + Duration::from_secs(then));
            let (key, report) = present(&info, now);
            assert_eq!(key, PublicKey([7; 32]));
            assert_eq!(
                report.handshake_age,
                age.map(Duration::from_secs),
                "{then:?}"
            );
            assert_eq!(report.endpoint, Some("192.0.2.2:7000".parse().unwrap()));
        }
    }

    #[test]
    fn a_name_that_no_device_can_have_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["", "a b", "a/b", "sixteen-letters-"] {
            let error = WireGuard::open(Config {
                name: name.to_owned(),
                state: dir.path().to_owned(),
                port: 0,
                mtu: 1420,
                is_eager: false,
                kind: Some(Kind::Userspace),
                program: "/nonexistent".into(),
            })
            .unwrap_err();
            assert!(
                matches!(error, TunnelsError::Name { .. }),
                "{name:?}: {error}"
            );
        }
    }
}
