//! Step d: a node is lost, its backends are withdrawn, its instances run elsewhere.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result, ensure};

use super::{
    load::Load,
    mesh::{Mesh, text, wait},
    report::{Report, seconds},
};

/// How soon pages must come again without a failure.
const HEALED: Duration = Duration::from_secs(25);

/// Kills every process of the node that serves most, the visitor's apart.
pub(super) fn show(mesh: &Mesh, report: &Report, load: &Load) -> Result<()> {
    let visitor = mesh.visitor_node()?;
    let mut serving: BTreeMap<String, usize> = BTreeMap::new();
    for binding in mesh.get("bindings")? {
        let node = text(&binding, "node");
        if node != visitor {
            *serving.entry(node.to_owned()).or_default() += 1;
        }
    }
    let (victim, count) = serving
        .into_iter()
        .max_by_key(|(_, count)| *count)
        .context("every instance is on the visitor's node: there is no other to lose")?;
    report.step(&format!(
        "d. all processes of {victim} are killed, {count} instances among them"
    ));
    let mark = load.mark();
    report.say(mesh.lab("kill", &[&victim])?.trim());
    let withdrawn = wait("its instances are bound elsewhere", HEALED, || {
        let left = mesh
            .get("bindings")?
            .iter()
            .filter(|one| text(one, "node") == victim)
            .count();
        ensure!(left == 0, "{left} instances are still bound to {victim}");
        Ok(())
    });
    report.claim(
        "its backends are withdrawn and its instances placed again",
        withdrawn.map(seconds).map_err(|error| format!("{error:#}")),
    );
    let ready = mesh.settled(HEALED);
    let whole = ready.and_then(|first| {
        let then = wait("three seconds without a failed page", HEALED, || {
            let last = load.last(3);
            ensure!(last.failed == 0 && last.ok > 0, "{last}");
            Ok(())
        })?;
        Ok(first + then)
    });
    report.claim(
        "every page is answered again",
        whole.map(seconds).map_err(|error| format!("{error:#}")),
    );
    let seen = load.since(mark)?;
    report.say(&format!("the client saw: {seen}"));
    mesh.lab("start", &[&victim])?;
    let back = mesh.nodes_ready(Duration::from_secs(20));
    report.claim(
        "the node comes back",
        back.map(seconds).map_err(|error| format!("{error:#}")),
    );
    Ok(())
}
