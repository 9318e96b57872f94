//! A NetManager's CNI door that keeps the protocol, remembers what it was asked, and can be told to misbehave.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::{Ipv4Addr, Ipv6Addr},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant},
};

use netmanager_api::cni::{AttachmentKey, Refused, Reply, Request, Reserved};

/// How the door answers one kind of request.
#[derive(Clone, Debug)]
pub(crate) enum Mood {
    Refuse(u32, &'static str),
    /// Takes the request and never answers.
    Hang,
    /// Answers something that is none.
    Garble,
}

#[derive(Default)]
struct State {
    asked: Vec<Request>,
    moods: BTreeMap<&'static str, Mood>,
    reserved: BTreeMap<AttachmentKey, Reserved>,
    active: BTreeMap<AttachmentKey, u32>,
    /// Hung connections, kept open.
    held: Vec<UnixStream>,
}

pub(crate) struct FakeDoor {
    dir: tempfile::TempDir,
    state: Arc<(Mutex<State>, Condvar)>,
}

impl FakeDoor {
    pub(crate) fn open() -> Self {
        let door = Self::closed();
        let listener = UnixListener::bind(door.socket()).unwrap();
        let state = door.state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                serve(stream, &state);
            }
        });
        door
    }

    /// A door that nobody opens.
    pub(crate) fn closed() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            state: Arc::default(),
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("cni.sock")
    }

    pub(crate) fn pending(&self) -> PathBuf {
        self.dir.path().join("cni-pending")
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn mood(&self, op: &'static str, mood: Mood) {
        self.state.0.lock().unwrap().moods.insert(op, mood);
    }

    pub(crate) fn good_mood(&self) {
        self.state.0.lock().unwrap().moods.clear();
    }

    pub(crate) fn asked(&self) -> Vec<Request> {
        self.state.0.lock().unwrap().asked.clone()
    }

    pub(crate) fn ops(&self) -> Vec<&'static str> {
        self.asked().iter().map(op).collect()
    }

    pub(crate) fn reservations(&self) -> Vec<AttachmentKey> {
        self.state
            .0
            .lock()
            .unwrap()
            .reserved
            .keys()
            .cloned()
            .collect()
    }

    pub(crate) fn active(&self) -> BTreeMap<AttachmentKey, u32> {
        self.state.0.lock().unwrap().active.clone()
    }

    /// Waits until a request of this kind has come.
    pub(crate) fn wait_for(&self, wanted: &str) {
        let (state, changed) = &*self.state;
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut state = state.lock().unwrap();
        while !state.asked.iter().any(|request| op(request) == wanted) {
            let left = deadline.checked_duration_since(Instant::now());
            let left = left.unwrap_or_else(|| panic!("nobody asked for {wanted}"));
            state = changed.wait_timeout(state, left).unwrap().0;
        }
    }
}

fn op(request: &Request) -> &'static str {
    match request {
        Request::Reserve(_) => "reserve",
        Request::Activate { .. } => "activate",
        Request::Release { .. } => "release",
        Request::Check { .. } => "check",
        Request::Gc { .. } => "gc",
        Request::Status => "status",
    }
}

fn serve(mut stream: UnixStream, state: &(Mutex<State>, Condvar)) {
    let mut line = String::new();
    let read = BufReader::new(&stream).read_line(&mut line);
    let Ok(request) = serde_json::from_str::<Request>(&line) else {
        assert!(read.is_err() || line.is_empty(), "not a request: {line:?}");
        return;
    };
    let (state, changed) = state;
    let mut state = state.lock().unwrap();
    let mood = state.moods.get(op(&request)).cloned();
    state.asked.push(request.clone());
    changed.notify_all();
    let answer = match mood {
        Some(Mood::Hang) => {
            state.held.push(stream);
            return;
        }
        Some(Mood::Garble) => "{\"hello\":1}".to_owned(),
        Some(Mood::Refuse(code, message)) => reply(&refused(code, message)),
        None => reply(&state.answer(request)),
    };
    drop(state);
    // The plugin may have been killed meanwhile.
    let _ = writeln!(stream, "{answer}");
}

fn reply(reply: &Reply) -> String {
    serde_json::to_string(reply).unwrap()
}

fn refused(code: u32, message: &str) -> Reply {
    Reply::Refused(Refused {
        code,
        message: message.to_owned(),
    })
}

impl State {
    fn answer(&mut self, request: Request) -> Reply {
        match request {
            Request::Reserve(reserve) => {
                let number = self.reserved.len() as u32 + 2;
                let reserved = self.reserved.entry(reserve.key).or_insert_with(|| {
                    let mut reserved = reservation(number);
                    reserved.mac = reserve.mac.unwrap_or(reserved.mac);
                    reserved
                });
                Reply::Reserved(reserved.clone())
            }
            Request::Activate { key, host_ifindex } => {
                if !self.reserved.contains_key(&key) {
                    return refused(100, "not reserved");
                }
                self.active.insert(key, host_ifindex);
                Reply::Done
            }
            Request::Release { key } => {
                self.reserved.remove(&key);
                self.active.remove(&key);
                Reply::Done
            }
            Request::Check { key } if !self.active.contains_key(&key) => {
                refused(100, "the attachment is not published")
            }
            Request::Gc { network, keep } => {
                let stays = |key: &AttachmentKey| key.network != network || keep.contains(key);
                self.reserved.retain(|key, _| stays(key));
                self.active.retain(|key, _| stays(key));
                Reply::Done
            }
            Request::Check { .. } | Request::Status => Reply::Done,
        }
    }
}

/// What the fake gives to its `number`th endpoint.
pub(crate) fn reservation(number: u32) -> Reserved {
    let host = |number: u32| Ipv4Addr::from(0x0a10_0020 + number);
    let six = |number: u32| {
        Ipv6Addr::from((0xfd00_0001_0002_u128 << 80) + (7 << 32) + u128::from(number))
    };
    Reserved {
        endpoint: number,
        host_ifname: format!("weft{number}"),
        mac: format!("02:00:5e:00:01:{number:02x}"),
        host_mac: format!("02:00:5e:00:02:{number:02x}"),
        addr6: six(number),
        addr4: Some(host(number)),
        gateway6: six(1),
        gateway4: Some(host(1)),
        mesh6: "fd00:1:2::/48".parse().unwrap(),
        mesh4: Some("10.16.0.0/12".parse().unwrap()),
        mtu: 1420,
    }
}
