//! The network configuration on stdin (CNI spec 1.1, section 1), and what it and the call say together.
//!
//! ```json
//! { "cniVersion": "1.1.0", "name": "weft", "type": "weft-cni",
//!   "socket": "/run/weft/cni.sock",      the NetManager's CNI door (default)
//!   "ifname": "weft0",                   name of the interface when chained after another plugin (default)
//!   "capabilities": { "mac": true, "io.kubernetes.cri.pod-annotations": true } }
//! ```
//!
//! Keys that are not known here are somebody else's and let through.

use std::{collections::BTreeMap, path::PathBuf};

use netmanager_api::{
    cni::{AttachmentKey, DEFAULT_SOCKET},
    stream::InstanceRef,
};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    call::{Call, check_ifname, check_name},
    error::Error,
    mac::Mac,
    version::CniVersion,
};

const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";
/// The identity of an instance: what a driver says in `CNI_ARGS`, what a pod's annotations say.
const IDENTITY: [(&str, &str); 3] = [
    ("WEFT_SERVICE", "weft.dev/service"),
    ("WEFT_INSTANCE_NUMBER", "weft.dev/instance"),
    ("WEFT_EPOCH", "weft.dev/epoch"),
];

/// A checked configuration.
#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) version: CniVersion,
    pub(crate) name: String,
    pub(crate) socket: PathBuf,
    /// The chained interface's name.
    pub(crate) ifname: String,
    pub(crate) prev_result: Option<Map<String, Value>>,
    /// `cni.dev/valid-attachments`; `None` when the key is missing.
    pub(crate) valid: Option<Vec<ValidAttachment>>,
    mac: Option<String>,
    annotations: BTreeMap<String, String>,
}

/// An attachment that the runtime still knows.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct ValidAttachment {
    #[serde(rename = "containerID")]
    pub(crate) container_id: String,
    pub(crate) ifname: String,
}

#[derive(Deserialize)]
struct Raw {
    name: Option<String>,
    socket: Option<PathBuf>,
    ifname: Option<String>,
    ipam: Option<Value>,
    #[serde(rename = "prevResult")]
    prev_result: Option<Map<String, Value>>,
    #[serde(rename = "runtimeConfig")]
    runtime: Option<Runtime>,
    args: Option<Args>,
    #[serde(rename = "cni.dev/valid-attachments")]
    valid: Option<Vec<ValidAttachment>>,
}

#[derive(Default, Deserialize)]
struct Runtime {
    mac: Option<String>,
    ips: Option<Value>,
    #[serde(rename = "io.kubernetes.cri.pod-annotations")]
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Default, Deserialize)]
struct Args {
    cni: Option<ArgsCni>,
}

#[derive(Default, Deserialize)]
struct ArgsCni {
    mac: Option<String>,
    ips: Option<Value>,
}

impl Config {
    /// Parses and checks a configuration.
    pub(crate) fn parse(stdin: &[u8]) -> Result<Self, Error> {
        let value: Value =
            serde_json::from_slice(stdin).map_err(|error| Error::Decode(error.to_string()))?;
        let version = CniVersion::asked(&value)?;
        let raw: Raw =
            serde_json::from_value(value).map_err(|error| Error::Decode(error.to_string()))?;
        let name = raw.name.unwrap_or_default();
        check_name("name", &name).map_err(Error::Config)?;
        let ifname = raw.ifname.unwrap_or_else(|| "weft0".to_owned());
        check_ifname("ifname", &ifname).map_err(Error::Config)?;
        let socket = raw.socket.unwrap_or_else(|| DEFAULT_SOCKET.into());
        if !socket.is_absolute() || socket.file_name().is_none() {
            return Err(Error::Config(format!(
                "socket = {socket:?} is not the absolute path of the NetManager's CNI door"
            )));
        }
        let runtime = raw.runtime.unwrap_or_default();
        let args = raw.args.and_then(|args| args.cni).unwrap_or_default();
        refuse(
            "ipam",
            raw.ipam,
            "the mesh gives the addresses; remove the key",
        )?;
        for (key, ips) in [
            ("runtimeConfig.ips", runtime.ips),
            ("args.cni.ips", args.ips),
        ] {
            refuse(
                key,
                ips,
                "the mesh gives the addresses; ask for a VIP instead",
            )?;
        }
        Ok(Self {
            version,
            name,
            socket,
            ifname,
            prev_result: raw.prev_result,
            valid: raw.valid,
            mac: runtime.mac.or(args.mac),
            annotations: runtime.annotations.unwrap_or_default(),
        })
    }

    /// The attachment that `call` names by `ifname`.
    pub(crate) fn key(&self, call: &Call, ifname: &str) -> AttachmentKey {
        AttachmentKey {
            network: self.name.clone(),
            container_id: call.container_id.clone(),
            ifname: ifname.to_owned(),
        }
    }

    /// The interface that an ADD makes: its own name when chained after another plugin, else `CNI_IFNAME`.
    pub(crate) fn interface(&self, call: &Call) -> Result<String, Error> {
        if self.prev_result.is_none() {
            return Ok(call.ifname.clone());
        }
        if self.ifname == call.ifname {
            return Err(Error::Config(format!(
                "ifname = {:?} is the interface of the plugin before: choose another",
                self.ifname
            )));
        }
        Ok(self.ifname.clone())
    }

    /// The MAC address asked for: `runtimeConfig.mac`, `args.cni.mac` or `MAC` of `CNI_ARGS`, in this order.
    pub(crate) fn mac(&self, call: &Call) -> Result<Option<Mac>, Error> {
        if let Some(mac) = self.mac.as_ref().filter(|mac| !mac.is_empty()) {
            return mac
                .parse()
                .map(Some)
                .map_err(|why| Error::Config(format!("mac: {why}")));
        }
        match call.args.get("MAC").filter(|mac| !mac.is_empty()) {
            Some(mac) => mac
                .parse()
                .map(Some)
                .map_err(|why| Error::Environment(format!("CNI_ARGS: MAC: {why}"))),
            None => Ok(None),
        }
    }

    /// Which instance is attached: by `CNI_ARGS`, else by the pod's annotations, else none (a mere client).
    pub(crate) fn instance(&self, call: &Call) -> Result<Option<InstanceRef>, Error> {
        if let Some(ip) = call.args.get("IP").filter(|ip| !ip.is_empty()) {
            return Err(Error::Field {
                key: "CNI_ARGS IP",
                value: ip.clone(),
                way_out: "the mesh gives the addresses; ask for a VIP instead",
            });
        }
        let from_args = identity(&call.args, IDENTITY.map(|(arg, _)| arg))
            .map_err(|why| Error::Environment(format!("CNI_ARGS: {why}")))?;
        if from_args.is_some() {
            return Ok(from_args);
        }
        identity(
            &self.annotations,
            IDENTITY.map(|(_, annotation)| annotation),
        )
        .map_err(|why| Error::Config(format!("runtimeConfig.{ANNOTATIONS}: {why}")))
    }
}

/// Refuses a key that asks for something unless its value says nothing.
fn refuse(key: &'static str, value: Option<Value>, way_out: &'static str) -> Result<(), Error> {
    match value {
        None | Some(Value::Null) => Ok(()),
        Some(Value::Array(list)) if list.is_empty() => Ok(()),
        Some(Value::Object(map)) if map.is_empty() => Ok(()),
        Some(value) => Err(Error::Field {
            key,
            value: value.to_string(),
            way_out,
        }),
    }
}

/// The instance that three keys name together; all of them or none.
fn identity(
    map: &BTreeMap<String, String>,
    keys: [&str; 3],
) -> Result<Option<InstanceRef>, String> {
    let [service, instance, epoch] = keys.map(|key| map.get(key).filter(|v| !v.is_empty()));
    if service.is_none() && instance.is_none() && epoch.is_none() {
        return Ok(None);
    }
    let (Some(service), Some(instance), Some(epoch)) = (service, instance, epoch) else {
        let missing: Vec<_> = keys
            .into_iter()
            .zip([service, instance, epoch])
            .filter_map(|(key, value)| value.is_none().then_some(key))
            .collect();
        return Err(format!(
            "an instance is named by {} together; missing: {}",
            keys.join(", "),
            missing.join(", ")
        ));
    };
    if service.split('/').count() != 3 || service.split('/').any(str::is_empty) {
        return Err(format!(
            "{} = {service:?} is not namespace/application/service",
            keys[0]
        ));
    }
    Ok(Some(InstanceRef {
        service: service.clone(),
        instance: number(keys[1], instance)?,
        epoch: number(keys[2], epoch)?,
    }))
}

fn number<T: std::str::FromStr>(key: &str, text: &str) -> Result<T, String> {
    text.parse()
        .map_err(|_| format!("{key} = {text:?} is not a number from 0"))
}
