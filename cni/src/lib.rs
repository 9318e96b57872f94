//! The CNI plugin: attaches a pod to the mesh, by the CNI specification 1.1.
//!
//! ```text
//!  runtime --env, stdin--> call + config --> attach | detach --unix socket--> NetManager (addresses, programs)
//!                                              |
//!                                              +--netlink--> pair (host side), wiring (inside the pod)
//! ```
//!
//! It keeps no state: what it made is found again by the link group of its veth pairs and the protocol of its
//! routes, and the NetManager holds the rest. It works as a NetworkAttachmentDefinition's delegate (makes
//! `CNI_IFNAME`) and chained after another plugin (makes `ifname` of its configuration). It never touches an
//! interface that it did not make.
#![forbid(unsafe_code)]

mod attach;
mod call;
mod config;
mod detach;
mod door;
mod error;
mod mac;
mod netns;
mod pair;
mod pending;
mod result;
mod version;
mod wiring;

pub use call::Env;
pub use error::Error;
use netmanager_api::cni::{AttachmentKey, Request};
use serde_json::{Value, json};

use crate::{
    call::{Call, Command},
    config::Config,
    door::Door,
    version::CniVersion,
};

/// What the process says and how it ends.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// For the runtime.
    pub stdout: String,
    /// For people, line by line.
    pub log: Vec<String>,
    /// 0, or 1 for an error object on stdout.
    pub exit: u8,
}

/// Carries out one call.
#[must_use]
pub fn run(env: &Env, stdin: &[u8]) -> Answer {
    match carry_out(env, stdin) {
        Ok(answer) => Answer {
            stdout: answer.map_or_else(String::new, |json| format!("{json}\n")),
            log: Vec::new(),
            exit: 0,
        },
        Err(error) => failure(&error, stdin),
    }
}

/// The answer when stdin could not be read.
#[must_use]
pub fn unread(source: std::io::Error) -> Answer {
    failure(&Error::io("read the network configuration", source), &[])
}

/// Reads a call as [`run`] does and carries nothing out; the attachment that it is about, if it is about one.
///
/// # Errors
/// What the runtime would be told.
pub fn read(env: &Env, stdin: &[u8]) -> Result<Option<AttachmentKey>, Error> {
    let Some((command, call, config)) = understand(env, stdin)? else {
        return Ok(None);
    };
    if !matches!(command, Command::Add | Command::Check | Command::Del) {
        return Ok(None);
    }
    let ifname = config.interface(&call)?;
    config.mac(&call)?;
    config.instance(&call)?;
    if let Some(before) = &config.prev_result {
        // Neither can fail; whatever a plugin before said must not stop them.
        result::has_interface(before, &ifname);
        result::expected(before, &ifname);
    }
    Ok(Some(config.key(&call, &ifname)))
}

/// The command, its call and its configuration; `None` for VERSION, which needs neither.
fn understand(env: &Env, stdin: &[u8]) -> Result<Option<(Command, Call, Config)>, Error> {
    let command = Command::of(env)?;
    if command == Command::Version {
        return Ok(None);
    }
    let call = Call::parse(command, env)?;
    let config = Config::parse(stdin)?;
    let (since, what) = match command {
        Command::Gc | Command::Status => (CniVersion::V1_1_0, command.name()),
        Command::Check => (CniVersion::V0_4_0, command.name()),
        _ => (CniVersion::V0_3_0, command.name()),
    };
    if config.version < since {
        return Err(Error::Version(format!(
            "cniVersion {:?} has no {what}: it came with {:?}",
            config.version.name(),
            since.name()
        )));
    }
    Ok(Some((command, call, config)))
}

fn carry_out(env: &Env, stdin: &[u8]) -> Result<Option<Value>, Error> {
    let Some((command, call, config)) = understand(env, stdin)? else {
        return Ok(Some(version::answer(stdin)));
    };
    netns::runtime()?.block_on(async {
        let door = Door {
            socket: config.socket.clone(),
            deadline: tokio::time::Instant::now() + command.patience(),
        };
        match command {
            Command::Add => attach::add(&call, config, &door).await.map(Some),
            Command::Del => detach::del(&call, &config, &door).await.map(|()| None),
            Command::Check => attach::check(&call, &config, &door).await.map(|()| None),
            Command::Gc => detach::gc(&config, &door).await.map(|()| None),
            Command::Status => status(&door).await.map(|()| None),
            Command::Version => unreachable!("answered above"),
        }
    })
}

/// STATUS: whether ADD would succeed now.
async fn status(door: &Door) -> Result<(), Error> {
    match door.request(&Request::Status).await {
        Err(Error::Refused(refused)) if !matches!(refused.code, 50 | 51) => {
            Err(Error::NotAvailable(refused.message))
        }
        Err(Error::TryAgain(why) | Error::Protocol(why)) => Err(Error::NotAvailable(why)),
        answered => answered,
    }
}

/// The error object (CNI spec 1.1, section 5 "Error"), in the asked version where that is one of ours.
fn failure(error: &Error, stdin: &[u8]) -> Answer {
    let version = serde_json::from_slice::<Value>(stdin)
        .ok()
        .and_then(|config| CniVersion::asked(&config).ok())
        .unwrap_or(CniVersion::NEWEST);
    let mut object = json!({
        "cniVersion": version.name(),
        "code": error.code(),
        "msg": error.to_string(),
    });
    let details = error.details();
    if !details.is_empty() {
        object["details"] = details.into();
    }
    Answer {
        stdout: format!("{object}\n"),
        log: vec![error.to_string()],
        exit: 1,
    }
}
