//! The answer to ADD (CNI spec 1.1, section 5 "ADD Success"), in the version that was asked for.
//!
//! A plugin that came before is heard out: its `prevResult` is kept with all its unknown fields, and ours is
//! added behind it.

use std::net::IpAddr;

use ipnet::IpNet;
use netmanager_api::cni::{AttachmentKey, Reserved};
use serde_json::{Map, Value, json};

use crate::{
    error::Error,
    version::CniVersion,
    wiring::{Expected, Leg},
};

/// What an ADD made.
#[derive(Debug)]
pub(crate) struct Made<'a> {
    pub(crate) version: CniVersion,
    pub(crate) key: &'a AttachmentKey,
    /// `CNI_NETNS`.
    pub(crate) sandbox: &'a str,
    pub(crate) reserved: &'a Reserved,
    pub(crate) legs: &'a [Leg],
}

/// The result of an ADD, behind that of the plugin before.
pub(crate) fn success(made: &Made<'_>, prev: Option<Map<String, Value>>) -> Result<Value, Error> {
    let mut result = prev.unwrap_or_default();
    result.insert("cniVersion".into(), made.version.name().into());
    let reserved = made.reserved;
    let interfaces = list(&mut result, "interfaces")?;
    let mut host = json!({"name": reserved.host_ifname, "mac": reserved.host_mac});
    let mut pod = json!({
        "name": made.key.ifname, "mac": reserved.mac, "sandbox": made.sandbox,
    });
    if made.version >= CniVersion::V1_1_0 {
        host["mtu"] = reserved.mtu.into();
        pod["mtu"] = reserved.mtu.into();
    }
    let index = interfaces.len() + 1;
    interfaces.extend([host, pod]);
    list(&mut result, "ips")?.extend(made.legs.iter().map(|leg| {
        let mut ip = json!({
            "address": leg.address, "gateway": leg.gateway, "interface": index,
        });
        if made.version < CniVersion::V1_0_0 {
            ip["version"] = if leg.gateway.is_ipv4() { "4" } else { "6" }.into();
        }
        ip
    }));
    list(&mut result, "routes")?.extend(
        made.legs
            .iter()
            .map(|leg| json!({"dst": leg.mesh, "gw": leg.gateway})),
    );
    Ok(Value::Object(result))
}

/// The list of a key, made where it is not there.
fn list<'a>(
    result: &'a mut Map<String, Value>,
    key: &'static str,
) -> Result<&'a mut Vec<Value>, Error> {
    let value = result.entry(key).or_insert_with(|| json!([]));
    if value.is_null() {
        *value = json!([]);
    }
    match value {
        Value::Array(list) => Ok(list),
        other => Err(Error::Decode(format!(
            "prevResult.{key} = {other} is not a list"
        ))),
    }
}

/// Whether a result has an interface of that name inside a pod.
pub(crate) fn has_interface(result: &Map<String, Value>, name: &str) -> bool {
    interface(result, name).is_some()
}

/// What a result says of an interface inside the pod; `None` when it says nothing.
pub(crate) fn expected(result: &Map<String, Value>, name: &str) -> Option<Expected> {
    let (index, interface) = interface(result, name)?;
    let ips = result.get("ips").and_then(Value::as_array);
    let ips = ips.into_iter().flatten().filter_map(|ip| {
        if ip.get("interface")?.as_u64()? != index as u64 {
            return None;
        }
        let address: IpNet = ip.get("address")?.as_str()?.parse().ok()?;
        let gateway: Option<IpAddr> = ip
            .get("gateway")
            .and_then(|gateway| gateway.as_str()?.parse().ok());
        Some((address, gateway))
    });
    Some(Expected {
        mac: interface
            .get("mac")
            .and_then(Value::as_str)
            .map(str::to_ascii_lowercase),
        ips: ips.collect(),
    })
}

fn interface<'a>(result: &'a Map<String, Value>, name: &str) -> Option<(usize, &'a Value)> {
    let text = |interface: &'a Value, key| interface.get(key).and_then(Value::as_str);
    result
        .get("interfaces")?
        .as_array()?
        .iter()
        .enumerate()
        .find(|(_, interface)| {
            text(interface, "name") == Some(name)
                && text(interface, "sandbox").is_some_and(|sandbox| !sandbox.is_empty())
        })
}
