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
    report.say("where each instance runs, in micro-EUR per hour, and why nowhere else:");
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
    let others = decision["others"].as_object().into_iter().flatten();
    let others: Vec<String> = others
        .map(|(cluster, lost)| why_not(cluster, lost))
        .collect();
    format!(
        "{} -> {}: {}; {}",
        text(slot, "slot"),
        text(slot, "cluster"),
        parts(&decision["parts"]),
        others.join("; ")
    )
}

/// The parts of an objective, micro-EUR per hour.
fn parts(parts: &Value) -> String {
    let names = ["energy", "cost", "latency", "performance"];
    names
        .map(|name| format!("{name} {}", parts[name]))
        .join(", ")
}

/// Why a cluster was not chosen.
fn why_not(cluster: &str, lost: &Value) -> String {
    if let Some(reasons) = lost["refused"].as_array() {
        let reasons: Vec<&str> = reasons.iter().filter_map(Value::as_str).collect();
        return format!("not {cluster}: {}", reasons.join(", "));
    }
    let dearer = &lost["dearer"];
    format!(
        "not {cluster}: {} dearer ({})",
        dearer["by"],
        parts(&dearer["parts"])
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_place_is_described_with_its_parts_and_why_the_others_lost() {
        let parts = json!({ "energy": 1, "cost": 2, "latency": 3, "performance": 4 });
        let slot = json!({ "slot": "a/b/c#0", "cluster": "fog", "decision": { "parts": parts, "others": {
            "cloud": { "refused": ["tier: needs fog, is cloud"] },
            "edge": { "dearer": { "by": 9, "parts": parts } } } } });
        assert!(explained(&slot));
        assert_eq!(
            describe(&slot),
            "a/b/c#0 -> fog: energy 1, cost 2, latency 3, performance 4; \
             not cloud: tier: needs fog, is cloud; \
             not edge: 9 dearer (energy 1, cost 2, latency 3, performance 4)"
        );
    }
}
