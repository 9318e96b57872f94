//! The call: what the runtime says in the environment (CNI spec 1.1, section 2 "Parameters").

use std::{collections::BTreeMap, ffi::OsString, path::PathBuf, time::Duration};

use netmanager_api::cni::PodRef;

use crate::error::Error;

/// The environment of a call.
pub type Env = BTreeMap<OsString, OsString>;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

impl Command {
    const ALL: [(&'static str, Self); 6] = [
        ("ADD", Self::Add),
        ("DEL", Self::Del),
        ("CHECK", Self::Check),
        ("GC", Self::Gc),
        ("STATUS", Self::Status),
        ("VERSION", Self::Version),
    ];

    /// The command of a call.
    pub(crate) fn of(env: &Env) -> Result<Self, Error> {
        let names = Self::ALL.map(|(name, _)| name).join(", ");
        let Some(asked) = var(env, "CNI_COMMAND")? else {
            return Err(Error::Environment(format!(
                "CNI_COMMAND is missing: set it to one of {names}"
            )));
        };
        Self::ALL
            .into_iter()
            .find_map(|(name, command)| (name == asked).then_some(command))
            .ok_or_else(|| {
                Error::Environment(format!("CNI_COMMAND = {asked:?} is none of {names}"))
            })
    }

    pub(crate) fn name(self) -> &'static str {
        Self::ALL
            .into_iter()
            .find_map(|(name, command)| (command == self).then_some(name))
            .expect("every command is in the list")
    }

    /// How long the NetManager may take for all that this command asks of it. An ADD may wait for programs to be
    /// loaded; the others only look or forget.
    pub(crate) const fn patience(self) -> Duration {
        match self {
            Self::Add => Duration::from_secs(10),
            _ => Duration::from_secs(5),
        }
    }

    const fn needs(self) -> &'static [&'static str] {
        match self {
            Self::Add | Self::Check => &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"],
            Self::Del => &["CNI_CONTAINERID", "CNI_IFNAME"],
            Self::Gc | Self::Status | Self::Version => &[],
        }
    }
}

/// One call, complete for its command; what a command does not need is empty.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) container_id: String,
    /// `None` when the runtime has lost it (DEL only).
    pub(crate) netns: Option<PathBuf>,
    pub(crate) ifname: String,
    /// `CNI_ARGS`, by key.
    pub(crate) args: BTreeMap<String, String>,
}

impl Call {
    /// Reads a call; names every variable that is missing or wrong at once.
    pub(crate) fn parse(command: Command, env: &Env) -> Result<Self, Error> {
        let missing: Vec<_> = command
            .needs()
            .iter()
            .filter(|name| matches!(var(env, name), Ok(None)))
            .copied()
            .collect();
        if !missing.is_empty() {
            return Err(Error::Environment(format!(
                "{} needs {}, missing from the environment",
                command.name(),
                missing.join(", ")
            )));
        }
        let container_id = var(env, "CNI_CONTAINERID")?.unwrap_or_default();
        let ifname = var(env, "CNI_IFNAME")?.unwrap_or_default();
        let netns = var(env, "CNI_NETNS")?.map(PathBuf::from);
        let mut wrong = Vec::new();
        if command.needs().contains(&"CNI_CONTAINERID") {
            wrong.extend(check_name("CNI_CONTAINERID", &container_id).err());
            wrong.extend(check_ifname("CNI_IFNAME", &ifname).err());
        }
        if let Some(netns) = netns.as_ref().filter(|path| !path.is_absolute()) {
            wrong.push(format!("CNI_NETNS = {netns:?} is not an absolute path"));
        }
        let args = match parse_args(&var(env, "CNI_ARGS")?.unwrap_or_default()) {
            Ok(args) => args,
            Err(error) => {
                wrong.push(error);
                BTreeMap::new()
            }
        };
        if !wrong.is_empty() {
            return Err(Error::Environment(wrong.join("; ")));
        }
        Ok(Self {
            container_id,
            netns,
            ifname,
            args,
        })
    }

    /// The pod, as far as `CNI_ARGS` says.
    pub(crate) fn pod(&self) -> PodRef {
        let arg = |key: &str| self.args.get(key).cloned().unwrap_or_default();
        PodRef {
            namespace: arg("K8S_POD_NAMESPACE"),
            name: arg("K8S_POD_NAME"),
            uid: arg("K8S_POD_UID"),
        }
    }
}

/// A variable's value; an empty one counts as absent.
fn var(env: &Env, name: &str) -> Result<Option<String>, Error> {
    let Some(value) = env.get(std::ffi::OsStr::new(name)) else {
        return Ok(None);
    };
    let text = value
        .to_str()
        .ok_or_else(|| Error::Environment(format!("{name} = {value:?} is not UTF-8")))?;
    Ok(Some(text.to_owned()).filter(|text| !text.is_empty()))
}

/// `KEY=VALUE` pairs between semicolons, in any order; the last of two equal keys counts.
fn parse_args(text: &str) -> Result<BTreeMap<String, String>, String> {
    text.split(';')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            pair.split_once('=')
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .ok_or_else(|| format!("CNI_ARGS has {pair:?}, which is not KEY=VALUE"))
        })
        .collect()
}

/// A network's or container's name: `[A-Za-z0-9][A-Za-z0-9_.-]*`.
pub(crate) fn check_name(what: &str, name: &str) -> Result<(), String> {
    let first = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    let rest = name
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
    if first && rest {
        return Ok(());
    }
    Err(format!(
        "{what} = {name:?} must start with a letter or digit and hold only letters, digits, '_', '.' and '-'"
    ))
}

/// A name that the kernel takes for a link: `dev_valid_name` in the kernel's net/core/dev.c.
pub(crate) fn check_ifname(what: &str, name: &str) -> Result<(), String> {
    let why = if name.is_empty() || name.len() > 15 {
        "must have 1 to 15 bytes"
    } else if name == "." || name == ".." {
        "must not be a directory"
    } else if name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace()) {
        "must not hold '/', ':' or a space"
    } else {
        return Ok(());
    };
    Err(format!("{what} = {name:?} {why}"))
}
