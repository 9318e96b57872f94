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
            Ok(_) if moved.is_empty() => Err("nothing moved".to_owned()),
            Ok(time) => far_from_callers(&links(&goal), &after, &moved).map_or_else(
                || Ok(format!("{} instances in {}", moved.len(), seconds(time))),
                |service| {
                    Err(format!(
                        "{service} has no instance with a caller: {after:?}"
                    ))
                },
            ),
            Err(error) => Err(format!("{error:#}")),
        },
    );
    report.claim(
        "no request failed while services moved",
        load.since(mark)?.flawless(),
    );
    Ok(())
}

/// A service of which something moved, and of which no instance is in a cluster that has one of its callers. (A second
/// replica may find its best place elsewhere.)
fn far_from_callers(
    links: &[(String, String)],
    after: &[(String, String)],
    moved: &[&(String, String)],
) -> Option<String> {
    let clusters = |service: &str| -> Vec<&str> {
        let own = after.iter().filter(|(slot, _)| service_of(slot) == service);
        own.map(|(_, cluster)| cluster.as_str()).collect()
    };
    let far = |service: &str| {
        let mut callers = links.iter().filter(|(_, to)| to == service);
        let own = clusters(service);
        !callers.any(|(from, _)| clusters(from).iter().any(|place| own.contains(place)))
    };
    let services = moved.iter().map(|(slot, _)| service_of(slot));
    services
        .filter(|service| far(service))
        .map(str::to_owned)
        .next()
}

/// The service of `namespace/application/service#instance`.
fn service_of(slot: &str) -> &str {
    let name = slot.rsplit('/').next().unwrap_or(slot);
    name.split('#').next().unwrap_or(name)
}

/// The goal file's links: caller and called.
fn links(goal: &str) -> Vec<(String, String)> {
    let word = |text: &str| {
        let end = text.find([',', ' ', '}']).unwrap_or(text.len());
        text[..end].to_owned()
    };
    goal.lines()
        .filter_map(|line| {
            let (_, link) = line.split_once("{ from: ")?;
            let (_, to) = link.split_once("to: ")?;
            Some((word(link), word(to)))
        })
        .collect()
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
    fn a_service_is_with_its_callers_where_one_instance_is_with_one_of_them() {
        let links = links(&fs::read_to_string(goal_file()).unwrap());
        assert_eq!(links.len(), 7, "{links:?}");
        let places = |list: &[(&str, &str)]| -> Vec<(String, String)> {
            list.iter()
                .map(|(slot, cluster)| (format!("shop/bookinfo/{slot}"), (*cluster).to_owned()))
                .collect()
        };
        let after = places(&[
            ("visitor#0", "edge"),
            ("productpage#0", "edge"),
            ("productpage#1", "fog"),
            ("reviews-v2#0", "fog"),
            ("details#0", "cloud"),
        ]);
        for (moved, want) in [
            (&[1][..], None),
            (&[2], None),
            (&[1, 3], None),
            (&[1, 4], Some("details")),
        ] {
            let moved: Vec<_> = moved.iter().map(|at| &after[*at]).collect();
            let far = far_from_callers(&links, &after, &moved);
            assert_eq!(far.as_deref(), want, "{moved:?}");
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
