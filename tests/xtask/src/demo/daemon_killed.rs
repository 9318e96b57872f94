//! Step f: a NetManager is killed and started again, and no flow notices, through the tunnel neither.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{
    load::Load,
    mesh::{Mesh, text, wait},
    report::{Report, seconds},
};

/// Kills the NetManager of the visitor's node while every page crosses its tunnel.
pub(super) fn show(mesh: &Mesh, report: &Report, load: &Load) -> Result<()> {
    let node = mesh.visitor_node()?;
    report.step(&format!(
        "f. the NetManager of {node} is killed and started again"
    ));
    mesh.cli(&["migrate", "shop/bookinfo/details/0", "--to", "fog"])?;
    mesh.settled(Duration::from_secs(30))?;
    let tunnel = process(mesh, &node, "tunnel")?;
    let mark = load.mark();
    let old = process(mesh, &node, "netmanager")?;
    mesh.lab("kill", &[&node, "--only", "run"])?;
    mesh.lab("start", &[&node])?;
    let back = wait(
        "the new NetManager is ready",
        Duration::from_secs(20),
        || {
            let new = process(mesh, &node, "netmanager")?;
            ensure!(new != old, "process {old} is still there");
            let nodes = mesh.get("nodes")?;
            let ready = |one: &Value| text(one, "name") == node && one["ready"] == true;
            ensure!(nodes.iter().any(ready), "{node} is not ready");
            Ok(())
        },
    );
    report.claim(
        "the new NetManager takes over",
        back.map(seconds).map_err(|error| format!("{error:#}")),
    );
    let same = process(mesh, &node, "tunnel")?;
    report.claim(
        "the tunnel process outlived it",
        if same == tunnel {
            Ok(format!("process {tunnel}"))
        } else {
            Err(format!("it was process {tunnel} and is {same}"))
        },
    );
    let seen = load.since(mark)?;
    let crossing: u64 = seen
        .served
        .iter()
        .filter(|(place, _)| place.starts_with("details@fog-"))
        .map(|(_, count)| count)
        .sum();
    report.claim(
        "pages went through the tunnel all the while",
        if crossing > 0 {
            Ok(format!("{crossing} calls answered in the fog"))
        } else {
            Err("no call was answered in the fog".to_owned())
        },
    );
    report.claim("no request failed without the NetManager", seen.flawless());
    Ok(())
}

/// The number of a node's process of a kind.
fn process(mesh: &Mesh, node: &str, kind: &str) -> Result<u64> {
    let status: Value = serde_json::from_str(&mesh.lab("status", &["--json"])?)?;
    let processes = status["processes"]
        .as_array()
        .map_or(&[][..], Vec::as_slice);
    let of_kind = |one: &&Value| text(one, "machine") == node && text(one, "kind") == kind;
    let found = processes.iter().find(of_kind);
    found
        .and_then(|one| one["pid"].as_u64())
        .with_context(|| format!("{node} has no {kind} process"))
}
