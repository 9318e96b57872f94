//! The CNI door: a unix socket on which `weft-cni` asks, one line of JSON each way.
//!
//! Who is not root is turned away by the credentials that the kernel gives of the peer. What is asked is
//! decided by the daemon, one request after the other; this module only carries. A client that says nothing or
//! does not read is dropped after [`PATIENCE`].

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use netmanager_api::cni::{self, MAX_LINE, Refused, Reply, Request};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::timeout,
};

/// How long a client may take to ask, and to take its answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// CNI error codes (spec 1.1, section 5).
const CODE_IO: u32 = 5;
const CODE_DECODE: u32 = 6;
const CODE_FORBIDDEN: u32 = 101;

/// A request and where its answer goes.
pub type Asked = (Request, oneshot::Sender<Reply>);

/// Why there is no door.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// Somebody answers there.
    #[error("another process serves the socket {0}: stop it, or choose another path with --socket")]
    InUse(PathBuf),
    /// The socket cannot be made.
    #[error("failed to {what} the socket {path}")]
    Socket {
        /// What was tried.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A bound door.
#[derive(Debug)]
pub struct Door {
    listener: UnixListener,
    path: PathBuf,
}

impl Drop for Door {
    fn drop(&mut self) {
        // A path that is gone already needs no removal.
        let _ = fs::remove_file(&self.path);
    }
}

impl Door {
    /// Binds `path`, over what a killed predecessor left there.
    ///
    /// # Errors
    /// When somebody serves it, or the path cannot be had.
    pub async fn bind(path: &Path) -> Result<Self, DoorError> {
        let failed = |what| {
            let path = path.to_owned();
            move |source| DoorError::Socket { what, path, source }
        };
        if UnixStream::connect(path).await.is_ok() {
            return Err(DoorError::InUse(path.to_owned()));
        }
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(failed("make the folder of"))?;
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove the old")(error));
            }
            _ => {}
        }
        let listener = UnixListener::bind(path).map_err(failed("bind"))?;
        let door = Self {
            listener,
            path: path.to_owned(),
        };
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed("protect"))?;
        Ok(door)
    }

    /// The next client's connection.
    pub(crate) async fn accept(&self) -> io::Result<UnixStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }

    /// Serves until the daemon stops to listen.
    pub async fn serve(self, daemon: mpsc::Sender<Asked>) {
        let mut clients = JoinSet::new();
        while !daemon.is_closed() {
            tokio::select! {
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        clients.spawn(serve_one(stream, daemon.clone()));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "failed to accept at the CNI door");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
                Some(_) = clients.join_next() => {}
                () = daemon.closed() => {}
            }
        }
    }
}

async fn serve_one(stream: UnixStream, daemon: mpsc::Sender<Asked>) {
    let answered = timeout(PATIENCE * 3, async {
        let is_root = stream
            .peer_cred()
            .is_ok_and(|credentials| credentials.uid() == 0);
        let (reader, mut writer) = stream.into_split();
        let reply = if is_root {
            answer(reader, &daemon).await
        } else {
            refused(CODE_FORBIDDEN, "only root may use the CNI door".to_owned())
        };
        let mut line = serde_json::to_vec(&reply).expect("a reply has only string keys");
        line.push(b'\n');
        timeout(PATIENCE, writer.write_all(&line))
            .await
            .map_err(io::Error::from)?
    });
    match answered.await.map_err(io::Error::from) {
        Ok(Ok(())) => {}
        Ok(Err(error)) | Err(error) => tracing::debug!(%error, "a CNI client went away"),
    }
}

async fn answer(reader: tokio::net::unix::OwnedReadHalf, daemon: &mpsc::Sender<Asked>) -> Reply {
    let mut line = Vec::new();
    let mut reader = BufReader::new(reader.take(MAX_LINE as u64));
    match timeout(PATIENCE, reader.read_until(b'\n', &mut line)).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => return refused(CODE_IO, format!("failed to read the request: {error}")),
        Err(_) => return refused(CODE_IO, "no request came within 10 s".to_owned()),
    }
    let request = match serde_json::from_slice(&line) {
        Ok(request) => request,
        Err(error) => {
            return refused(
                CODE_DECODE,
                format!("failed to decode the request: {error}"),
            );
        }
    };
    let (sender, receiver) = oneshot::channel();
    let stopping = || refused(11, "the NetManager is stopping: try again".to_owned());
    if daemon.send((request, sender)).await.is_err() {
        return stopping();
    }
    receiver.await.unwrap_or_else(|_| stopping())
}

fn refused(code: u32, message: String) -> Reply {
    Reply::Refused(Refused { code, message })
}

/// The releases that wait beside the socket, with the files that queue them.
#[must_use]
pub fn pending_releases(socket: &Path) -> Vec<(PathBuf, Request)> {
    let Ok(entries) = fs::read_dir(cni::pending_dir(socket)) else {
        return Vec::new(); // Nothing was ever queued.
    };
    let mut pending = Vec::new();
    for path in entries.flatten().map(|entry| entry.path()) {
        let is_being_written = path
            .file_name()
            .is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        if is_being_written {
            continue;
        }
        match fs::read(&path)
            .map_err(|error| error.to_string())
            .and_then(|line| serde_json::from_slice(&line).map_err(|error| error.to_string()))
        {
            Ok(request @ Request::Release { .. }) => pending.push((path, request)),
            Ok(_) => tracing::warn!(path = %path.display(), "a queued CNI request is no release"),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a queued release is unreadable");
            }
        }
    }
    pending
}

#[cfg(test)]
mod tests {
    use netmanager_api::cni::AttachmentKey;

    use super::*;

    async fn ask(path: &Path, line: &[u8]) -> Reply {
        let mut stream = UnixStream::connect(path).await.unwrap();
        stream.write_all(line).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        serde_json::from_slice(&answer).unwrap()
    }

    #[tokio::test]
    async fn a_request_is_answered_and_nonsense_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/cni.sock");
        let door = Door::bind(&path).await.unwrap();
        assert!(matches!(Door::bind(&path).await, Err(DoorError::InUse(_))));
        let (sender, mut receiver) = mpsc::channel::<Asked>(1);
        let served = tokio::spawn(door.serve(sender));
        let daemon = tokio::spawn(async move {
            let (request, reply) = receiver.recv().await.unwrap();
            assert_eq!(request, Request::Status);
            reply.send(Reply::Done).unwrap();
        });
        // The door is for root; the tests of the whole daemon run as such.
        let is_root = nix::unistd::Uid::effective().is_root();
        let status = b"{\"op\":\"status\"}\n";
        if is_root {
            assert!(matches!(
                ask(&path, b"{\"op\":\"dance\"}\n").await,
                Reply::Refused(Refused {
                    code: CODE_DECODE,
                    ..
                })
            ));
            assert_eq!(ask(&path, status).await, Reply::Done);
            daemon.await.unwrap();
            served.await.unwrap();
            assert!(!path.exists(), "the socket goes with its door");
        } else {
            assert!(matches!(
                ask(&path, status).await,
                Reply::Refused(Refused {
                    code: CODE_FORBIDDEN,
                    ..
                })
            ));
        }
    }

    #[test]
    fn queued_releases_are_found_and_files_in_the_making_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("cni.sock");
        assert_eq!(pending_releases(&socket), []);
        let queue = cni::pending_dir(&socket);
        fs::create_dir_all(&queue).unwrap();
        let key = AttachmentKey {
            network: "weft".into(),
            container_id: "c".into(),
            ifname: "net1".into(),
        };
        let release = Request::Release { key: key.clone() };
        fs::write(
            queue.join(key.file_name()),
            serde_json::to_vec(&release).unwrap(),
        )
        .unwrap();
        fs::write(queue.join(".half"), "{").unwrap();
        fs::write(queue.join("bad"), "{").unwrap();
        assert_eq!(
            pending_releases(&socket),
            [(queue.join(key.file_name()), release)]
        );
    }
}
