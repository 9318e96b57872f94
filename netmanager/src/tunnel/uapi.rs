//! The tunnel's door: the userspace WireGuard protocol on a unix socket.
//!
//! The socket speaks what `wg(8)` and the `wireguard-control` crate speak
//! (<https://www.wireguard.com/xplatform/#configuration-protocol>), so that a kernel device and this one are
//! configured by one path. The device's own server is not used for changes, because it makes a changed peer
//! anew and so ends its session; here a change goes through the in-process interface, which keeps it.
//!
//! The private key is the device's identity and is not changed through the door.

use std::{
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use gotatun::{
    device::{
        Device, DeviceTransports, Peer,
        uapi::{
            UapiClient,
            command::{Request, Response, Set, SetPeer, SetUnset},
        },
    },
    x25519::{PublicKey, StaticSecret},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    task::JoinSet,
};

/// Where every WireGuard tool looks for sockets.
const FOLDER: &str = "/var/run/wireguard";
/// Bytes of the longest request: 10,000 peers with 40 networks each are about 15 MB.
const MAX_REQUEST: u64 = 32 << 20;

/// The socket of the device `name`.
#[must_use]
pub fn socket_path(name: &str) -> PathBuf {
    Path::new(FOLDER).join(format!("{name}.sock"))
}

/// Why the door cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// Another tunnel answers there, maybe of another network namespace: the folder is shared.
    #[error("another tunnel answers at {}: choose another device name", .0.display())]
    Taken(PathBuf),
    /// The file system refused.
    #[error("failed to open {}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// An open door; its socket is removed on drop.
pub(super) struct Door {
    listener: UnixListener,
    path: PathBuf,
}

impl Door {
    /// Binds the socket of `name`; one that a dead process left is replaced.
    pub(super) async fn open(name: &str) -> Result<Self, DoorError> {
        let path = socket_path(name);
        if UnixStream::connect(&path).await.is_ok() {
            return Err(DoorError::Taken(path));
        }
        let bind = || {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(FOLDER)?;
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(&path)?;
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
            Ok(listener)
        };
        match bind() {
            Ok(listener) => Ok(Self { listener, path }),
            Err(source) => Err(DoorError::Io { path, source }),
        }
    }

    /// Serves until it is dropped; `client` is the device's own server, asked for reads only.
    pub(super) async fn serve<T: DeviceTransports>(
        &self,
        device: Arc<Device<T>>,
        client: UapiClient,
    ) {
        let mut sessions = JoinSet::new();
        loop {
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "failed to accept at the tunnel's door");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    continue;
                }
            };
            while sessions.try_join_next().is_some() {}
            let (device, client) = (Arc::clone(&device), client.clone());
            sessions.spawn(async move {
                if let Err(error) = session(stream, &device, &client).await {
                    tracing::debug!(%error, "a session at the tunnel's door ended");
                }
            });
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Answers the requests of one client: each ends with an empty line, as does each answer.
async fn session<T: DeviceTransports>(
    stream: UnixStream,
    device: &Device<T>,
    client: &UapiClient,
) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read.take(MAX_REQUEST)).lines();
    let mut request = String::new();
    while let Some(line) = lines.next_line().await? {
        if !line.is_empty() {
            request.push_str(&line);
            request.push('\n');
            continue;
        }
        if request.is_empty() {
            continue;
        }
        let answer = answer(&request, device, client).await;
        write.write_all(format!("{answer}\n").as_bytes()).await?;
        request.clear();
    }
    Ok(())
}

/// The answer to one request; its last line is `errno=`.
async fn answer<T: DeviceTransports>(
    request: &str,
    device: &Device<T>,
    client: &UapiClient,
) -> String {
    let errno = match request.parse() {
        Ok(Request::Set(set)) => match change(device, set).await {
            Ok(()) => 0,
            Err(errno) => errno,
        },
        Ok(get @ Request::Get(_)) => match client.send(get).await {
            Ok(response @ Response::Get(_)) => return response.to_string(),
            Ok(Response::Set(_)) | Err(_) => libc::EIO,
        },
        Err(error) => {
            tracing::warn!(%error, "refused a request that is not of the protocol");
            libc::EINVAL
        }
    };
    format!("errno={errno}\n")
}

/// Makes one change; peers that it does not remove keep their sessions.
async fn change<T: DeviceTransports>(device: &Device<T>, set: Set) -> Result<(), i32> {
    let key = set
        .private_key
        .as_ref()
        .map(|key| StaticSecret::from(key.0));
    let port = set.listen_port;
    let refused = device
        .read(async |device| {
            let public = |key: &StaticSecret| PublicKey::from(key);
            key.as_ref()
                .is_some_and(|key| device.private_key().map(public) != Some(public(key)))
        })
        .await;
    if refused {
        tracing::warn!("refused to change the private key of a running tunnel");
        return Err(libc::EPERM);
    }
    if let Some(port) = port {
        listen(device, port).await?;
    }
    device
        .write(async |device| {
            if let Some(mark) = set.fwmark {
                let mark = match mark {
                    SetUnset::Set(mark) => mark.get(),
                    SetUnset::Unset => 0,
                };
                device.set_fwmark(mark).map_err(|_| libc::EIO)?;
            }
            if set.replace_peers {
                for present in device.peers().await {
                    let key = present.peer.public_key;
                    if set
                        .peers
                        .iter()
                        .all(|peer| peer.peer.public_key.0 != key.to_bytes())
                    {
                        device.remove_peer(&key).await;
                    }
                }
            }
            for peer in set.peers {
                put(device, peer, set.replace_peers).await;
            }
            Ok(())
        })
        .await
        .map_err(|_| libc::EIO)?
}

/// Makes, changes or removes one peer.
async fn put<T: DeviceTransports>(
    device: &mut gotatun::device::configure::DeviceWrite<'_, T>,
    set: SetPeer,
    replace: bool,
) {
    let key = PublicKey::from(set.peer.public_key.0);
    if set.remove {
        device.remove_peer(&key).await;
        return;
    }
    let preshared = set.peer.preshared_key.map(|key| match key {
        SetUnset::Set(key) => Some(key.0),
        SetUnset::Unset => None,
    });
    let known = device
        .modify_peer(&key, |peer| {
            if let Some(endpoint) = set.peer.endpoint {
                peer.set_endpoint(Some(endpoint));
            }
            if let Some(interval) = set.peer.persistent_keepalive_interval {
                peer.set_keepalive((interval > 0).then_some(interval));
            }
            if let Some(preshared) = preshared {
                peer.set_preshared_key(preshared);
            }
            if set.replace_allowed_ips || replace {
                peer.clear_allowed_ips();
            }
            peer.add_allowed_ips(set.peer.allowed_ip.iter().copied());
        })
        .await;
    if known || set.update_only {
        return;
    }
    let mut peer = Peer::new(key).with_allowed_ips(set.peer.allowed_ip);
    peer.endpoint = set.peer.endpoint;
    peer.keepalive = set.peer.persistent_keepalive_interval.filter(|s| *s > 0);
    peer.preshared_key = preshared.flatten();
    device.add_peer(peer);
}

/// Moves the tunnel to another port; if that is taken it stays where it was.
async fn listen<T: DeviceTransports>(device: &Device<T>, port: u16) -> Result<(), i32> {
    let old = device.read(async |device| device.listen_port()).await;
    if old == port {
        return Ok(());
    }
    if let Err(error) = device.set_listen_port(port).await {
        tracing::warn!(port, %error, "failed to listen there, the tunnel stays at its port");
        if let Err(error) = device.set_listen_port(old).await {
            tracing::error!(port = old, %error, "failed to go back to the old port");
        }
        return Err(libc::EADDRINUSE);
    }
    tracing::info!(old, port, "the tunnel moved to another port");
    Ok(())
}
