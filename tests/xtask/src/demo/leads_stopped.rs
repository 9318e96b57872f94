//! Step g: all leads are stopped, traffic goes on, and they come back with nothing lost.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Result, ensure};

use super::{
    load::Load,
    mesh::{Mesh, text, wait},
    report::{Report, seconds},
};

const LEADS: [&str; 3] = ["lead-a", "lead-b", "lead-c"];
/// How many seconds there is no lead at all: longer than a lease.
const ALONE: usize = 5;

/// Each application's generation, and each slot's epoch, cluster and node.
type Known = BTreeMap<String, String>;

/// Kills every lead, lets the mesh go on alone, and starts them again.
pub(super) fn show(mesh: &Mesh, report: &Report, load: &Load) -> Result<()> {
    report.step("g. all leads are killed, and come back");
    let before = known(mesh)?;
    let mark = load.mark();
    mesh.lab("kill", &LEADS)?;
    let alone = load.mark();
    wait(
        "the mesh is alone for a while",
        Duration::from_secs(30),
        || {
            ensure!(load.seconds_since(alone) >= ALONE, "not yet");
            Ok(())
        },
    )?;
    mesh.lab("start", &LEADS)?;
    let back = wait("the leads have a leader", Duration::from_secs(20), || {
        mesh.leader().map(drop)
    });
    report.claim(
        "the leads come back",
        back.map(seconds).map_err(|error| format!("{error:#}")),
    );
    mesh.nodes_ready(Duration::from_secs(20))?;
    mesh.settled(Duration::from_secs(20))?;
    let seen = load.since(mark)?;
    let after = known(mesh)?;
    report.claim(
        "nothing was lost",
        if after == before {
            Ok(format!(
                "{} applications and bindings as they were",
                after.len()
            ))
        } else {
            Err(difference(&before, &after))
        },
    );
    report.claim("no request failed without any lead", seen.flawless());
    Ok(())
}

fn known(mesh: &Mesh) -> Result<Known> {
    let mut known = Known::new();
    for app in mesh.get("applications")? {
        known.insert(text(&app, "name").to_owned(), app["generation"].to_string());
    }
    for binding in mesh.get("bindings")? {
        let place = format!(
            "epoch {} on {}/{}",
            binding["epoch"],
            text(&binding, "cluster"),
            text(&binding, "node")
        );
        known.insert(text(&binding, "slot").to_owned(), place);
    }
    Ok(known)
}

fn difference(before: &Known, after: &Known) -> String {
    let names: Vec<&String> = before.keys().chain(after.keys()).collect();
    let mut lines: Vec<String> = names
        .into_iter()
        .filter(|name| before.get(*name) != after.get(*name))
        .map(|name| format!("{name}: {:?} is {:?}", before.get(name), after.get(name)))
        .collect();
    lines.dedup();
    lines.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_and_what_is_new_is_named() {
        let known = |entries: &[(&str, &str)]| -> Known {
            entries
                .iter()
                .map(|(name, place)| ((*name).into(), (*place).into()))
                .collect()
        };
        let text = difference(
            &known(&[("a", "1"), ("b", "2")]),
            &known(&[("b", "2"), ("c", "3")]),
        );
        assert_eq!(text, r#"a: Some("1") is None; c: None is Some("3")"#);
    }
}
