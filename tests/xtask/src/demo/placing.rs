//! Step a: a goal file becomes running services.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::{
    goal_file,
    mesh::{Mesh, text},
    report::{Report, seconds},
};

/// Applies the shop, says for each service where it runs and why, and waits until all of it is ready.
pub(super) fn show(mesh: &Mesh, report: &Report) -> Result<()> {
    report.step("a. weft apply -f examples/bookinfo/bookinfo.yaml");
    let file = goal_file();
    let file = file.to_str().context("the goal file's path is not UTF-8")?;
    let answer = mesh.cli(&["apply", "-f", file])?;
    let slots = answer["applications"][0]["slots"].as_array();
    let slots = slots.map_or(&[][..], Vec::as_slice);
    for slot in slots {
        report.say(&describe(slot));
    }
    let pending: Vec<&str> = slots
        .iter()
        .filter(|slot| slot["cluster"].is_null())
        .map(|slot| text(slot, "slot"))
        .collect();
    report.claim(
        "every instance has a cluster, and every other cluster a reason why not",
        if pending.is_empty() && !slots.is_empty() && slots.iter().all(explained) {
            Ok(format!("{} instances", slots.len()))
        } else {
            Err(format!(
                "pending: {pending:?}, of {} instances",
                slots.len()
            ))
        },
    );
    let again = mesh.cli(&["apply", "-f", file])?;
    let result = text(&again["applications"][0], "result").to_owned();
    report.claim(
        "the same goal file again changes nothing",
        if result == "unchanged" {
            Ok(result)
        } else {
            Err(result)
        },
    );
    let ready = mesh.settled(Duration::from_secs(40));
    report.claim(
        "every instance is ready",
        ready.map(seconds).map_err(|error| format!("{error:#}")),
    );
    Ok(())
}

/// Whether both clusters that were not chosen have a reason.
fn explained(slot: &Value) -> bool {
    slot["decision"]["others"]
        .as_object()
        .is_some_and(|others| others.len() == 2)
}

fn describe(slot: &Value) -> String {
    let decision = &slot["decision"];
    let parts: Vec<String> = ["energy", "cost", "latency", "performance"]
        .iter()
        .map(|part| format!("{part} {}", decision["parts"][part]))
        .collect();
    let others: Vec<String> = decision["others"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(cluster, lost)| format!("not {cluster}: {}", plain(lost)))
        .collect();
    format!(
        "{} -> {} ({} uEUR/h); {}",
        text(slot, "slot"),
        text(slot, "cluster"),
        parts.join(", "),
        others.join("; ")
    )
}

/// A reason without JSON's signs.
fn plain(value: &Value) -> String {
    value
        .to_string()
        .replace(['"', '{', '}', '[', ']'], "")
        .replace(':', " ")
}
