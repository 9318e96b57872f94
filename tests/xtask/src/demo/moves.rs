//! Step c: the goals change under load, and services move without a failed request.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};

use super::{
    goal_file,
    load::Load,
    mesh::{Mesh, text, wait},
    report::{Report, seconds},
};

/// The line of the goal file that changes.
const WEIGHTS: &str = "  weights: ";
const LATENCY_FIRST: &str = "  weights: { energy: 1, cost: 1, latency: 8, performance: 1 }";

/// The lab's clusters by their distance from the visitors, the nearest first.
const NEAREST_FIRST: [&str; 3] = ["edge", "fog", "cloud"];

/// Turns the weights from cost to latency and waits until everything has moved.
pub(super) fn show(mesh: &Mesh, report: &Report, load: &Load) -> Result<()> {
    report.step("c. the weights change from cost to latency, under 250 pages/s");
    let mark = load.mark();
    let before = clusters(mesh)?;
    let goal = latency_first(&fs::read_to_string(goal_file()).context("failed to read the goal")?)?;
    apply(mesh, "latency", &goal)?;
    wait("the first service moves", Duration::from_secs(15), || {
        let moves = mesh.get("migrations")?;
        let started = moves.iter().any(|one| text(one, "reason") == "goal");
        ensure!(started, "no migration has begun");
        Ok(())
    })?;
    let settled = mesh.settled(Duration::from_secs(60));
    let after = clusters(mesh)?;
    let moved: Vec<_> = after
        .iter()
        .filter(|place| !before.contains(place))
        .collect();
    for (slot, cluster) in &moved {
        report.say(&format!("{slot} moved to {cluster}"));
    }
    report.claim(
        "services moved to where their callers are, make-before-break",
        match settled {
            Ok(time) if came_nearer(&before, &moved) => {
                Ok(format!("{} instances in {}", moved.len(), seconds(time)))
            }
            Ok(_) => Err(format!("moved: {moved:?}")),
            Err(error) => Err(format!("{error:#}")),
        },
    );
    report.claim(
        "no request failed while services moved",
        load.since(mark)?.flawless(),
    );
    Ok(())
}

/// Whether something moved, everything that did is nearer to the visitors than before, and every service of
/// which something moved is where they are. (A second replica may find its best place on the way.)
fn came_nearer(before: &[(String, String)], moved: &[&(String, String)]) -> bool {
    let distance = |cluster: &str| NEAREST_FIRST.iter().position(|name| *name == cluster);
    let nearer = |(slot, cluster): &(String, String)| {
        let from = before.iter().find(|(other, _)| other == slot);
        from.is_some_and(|(_, from)| distance(cluster) < distance(from))
    };
    let service = |slot: &str| slot.split('#').next().unwrap_or_default().to_owned();
    let arrived = |(slot, _): &(String, String)| {
        moved
            .iter()
            .any(|(other, cluster)| service(other) == service(slot) && cluster == NEAREST_FIRST[0])
    };
    !moved.is_empty() && moved.iter().all(|place| nearer(place) && arrived(place))
}

/// Applies a goal file's text.
pub(super) fn apply(mesh: &Mesh, name: &str, goal: &str) -> Result<()> {
    let file = std::env::temp_dir().join(format!("weft-demo-{}-{name}.yaml", mesh.id()));
    fs::write(&file, goal).with_context(|| format!("failed to write {}", file.display()))?;
    let path = file
        .to_str()
        .context("the temporary folder's path is not UTF-8")?;
    let applied = mesh.cli(&["apply", "-f", path]);
    fs::remove_file(&file).with_context(|| format!("failed to remove {}", file.display()))?;
    applied.map(drop)
}

/// The goal file with latency before everything else.
fn latency_first(goal: &str) -> Result<String> {
    let lines = goal
        .lines()
        .filter(|line| line.starts_with(WEIGHTS))
        .count();
    ensure!(
        lines == 1,
        "the goal file has {lines} lines of weights, not one"
    );
    let changed: Vec<&str> = goal
        .lines()
        .map(|line| {
            if line.starts_with(WEIGHTS) {
                LATENCY_FIRST
            } else {
                line
            }
        })
        .collect();
    Ok(changed.join("\n") + "\n")
}

/// Each slot and its cluster.
fn clusters(mesh: &Mesh) -> Result<Vec<(String, String)>> {
    let bindings = mesh.get("bindings")?;
    let place = |binding: &serde_json::Value| {
        (
            text(binding, "slot").to_owned(),
            text(binding, "cluster").to_owned(),
        )
    };
    Ok(bindings.iter().map(place).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearer_is_what_came_toward_the_visitors_and_reached_them() {
        let places = |list: &[(&str, &str)]| -> Vec<(String, String)> {
            list.iter()
                .map(|(slot, cluster)| ((*slot).to_owned(), (*cluster).to_owned()))
                .collect()
        };
        let before = places(&[("page#0", "cloud"), ("page#1", "cloud"), ("store#0", "fog")]);
        for (moved, want) in [
            (places(&[]), false),
            (places(&[("page#0", "edge")]), true),
            (places(&[("page#0", "edge"), ("page#1", "fog")]), true),
            (places(&[("page#1", "fog")]), false),
            (places(&[("page#0", "edge"), ("store#0", "cloud")]), false),
        ] {
            assert_eq!(
                came_nearer(&before, &moved.iter().collect::<Vec<_>>()),
                want,
                "{moved:?}"
            );
        }
    }

    #[test]
    fn only_the_weights_of_the_goal_file_change() {
        let goal = fs::read_to_string(goal_file()).unwrap();
        let changed = latency_first(&goal).unwrap();
        let differ = goal
            .lines()
            .zip(changed.lines())
            .filter(|(a, b)| a != b)
            .count();
        assert_eq!((differ, goal.lines().count()), (1, changed.lines().count()));
        assert!(latency_first("spec:\n").is_err());
    }
}
