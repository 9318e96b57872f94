//! Attaching pods as a runtime does: by executing the plugin.

use std::{
    io::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use weft_tests::{Netns, wait_for};

use super::PATIENCE;

/// What a plugin answers that should be asked again (CNI spec 1.1, section 5 "Error").
const TRY_AGAIN: u64 = 11;

/// A pod's addresses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Addresses {
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Ipv6Addr,
}

/// Attaches `pod`, again as long as it is told to.
pub(super) fn attach(
    node: &Netns,
    pod: &Netns,
    binaries: &Path,
    socket: &Path,
    identity: &str,
) -> Result<Addresses> {
    let result = wait_for("an attachment", PATIENCE, || {
        let result = add(node, pod, binaries, socket, identity);
        match &result {
            Ok(answer) if answer["code"] == TRY_AGAIN => None,
            _ => Some(result),
        }
    })?;
    let addresses: Vec<IpAddr> = result["ips"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok())
        .collect();
    let v4 = addresses.iter().find_map(|address| match address {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    });
    let v6 = addresses.iter().find_map(|address| match address {
        IpAddr::V6(address) => Some(*address),
        IpAddr::V4(_) => None,
    });
    v4.zip(v6)
        .map(|(v4, v6)| Addresses { v4, v6 })
        .with_context(|| format!("weft-cni ADD gave no address of each family: {result}"))
}

/// Executes the plugin; its result or its error object.
fn add(node: &Netns, pod: &Netns, binaries: &Path, socket: &Path, identity: &str) -> Result<Value> {
    let network = json!({
        "cniVersion": "1.1.0", "name": "weft", "type": "weft-cni", "socket": socket,
    });
    let mut child = node.run(|| {
        Command::new(binaries.join("weft-cni"))
            .env_clear()
            .env("CNI_COMMAND", "ADD")
            .env("CNI_CONTAINERID", pod.name())
            .env("CNI_NETNS", pod.path())
            .env("CNI_IFNAME", "net1")
            .env("CNI_PATH", binaries)
            .env("CNI_ARGS", identity)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("failed to start weft-cni")
    })?;
    let mut stdin = child
        .stdin
        .take()
        .context("weft-cni has no standard input")?;
    stdin
        .write_all(network.to_string().as_bytes())
        .context("failed to ask weft-cni")?;
    drop(stdin);
    let output = child
        .wait_with_output()
        .context("failed to wait for weft-cni")?;
    serde_json::from_slice(&output.stdout).context("weft-cni's result is no JSON")
}
