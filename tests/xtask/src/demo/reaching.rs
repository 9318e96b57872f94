//! Step b: packets find the services, by the policy that is in the address.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{
    mesh::{Mesh, VISITOR, text, wait},
    report::{Report, seconds},
};

/// Pages per question.
const COUNT: u64 = 20;
/// A pod that nobody linked to anything.
const STRANGER: &str = "stranger";
/// How soon a refusal must be seen, microseconds: it is an answer, not a timeout.
const AT_ONCE_US: u64 = 500_000;
/// How often it is asked for a time that a machine that stands still makes longer.
const ATTEMPTS: usize = 3;

/// Asks for pages in every way, and in one way that must be refused.
pub(super) fn show(mesh: &Mesh, report: &Report) -> Result<()> {
    report.step("b. pages by semantic service IP");
    // One page moves to its readers, so that near and far are different places.
    mesh.cli(&["migrate", "shop/bookinfo/productpage/1", "--to", "edge"])?;
    mesh.settled(Duration::from_secs(30))?;
    let clusters = clusters_of_pages(mesh)?;
    let (visitor, host) = (
        (VISITOR, "a pod at the edge"),
        ("edge-1", "a host at the edge"),
    );
    for ((place, who), policy, family) in [
        (visitor, "balanced", 4),
        (visitor, "balanced", 6),
        (visitor, "closest", 4),
        (visitor, "closest", 6),
        (host, "balanced", 4),
        (host, "closest", 6),
    ] {
        let url = mesh.page(policy, family)?;
        if policy == "closest" {
            measured(mesh, report, place, &url)?;
        }
        let answer = ask(mesh, place, &url, COUNT)?;
        let pages = pages(&answer);
        let places: Vec<_> = pages
            .iter()
            .map(|(node, count)| format!("{count} by {node}"))
            .collect();
        let seen = format!("{}{}", places.join(", "), failures(&answer));
        let all = answer["ok"] == COUNT;
        let from = from(&pages);
        let good = all
            && match policy {
                "closest" => from == ["edge"],
                _ => from == clusters,
            };
        let claim = format!("{who} gets {COUNT} pages by the {policy} IPv{family} address");
        report.claim(&claim, if good { Ok(seen) } else { Err(seen) });
    }
    mesh.lab("attach", &["--node", "fog-1", "--name", STRANGER])?;
    let page = mesh.page("balanced", 4)?;
    let mut slowest = Vec::new();
    let (answer, refused) = loop {
        let answer = ask(mesh, STRANGER, &page, COUNT)?;
        let took = slowest_us(&answer);
        slowest.push(format!("{took} us"));
        let is_refused = answer["ok"] == 0;
        let is_prompt = took < AT_ONCE_US;
        // The machine may have stood still.
        if !is_refused || is_prompt || slowest.len() == ATTEMPTS {
            break (answer, is_refused && is_prompt);
        }
    };
    let seen = format!("slowest {}{}", slowest.join(", then "), failures(&answer));
    report.claim(
        "a pod without a link is refused at once",
        if refused { Ok(seen) } else { Err(seen) },
    );
    Ok(())
}

/// Waits until a node that was busy when it measured its peers first has measured them better.
fn measured(mesh: &Mesh, report: &Report, place: &str, url: &str) -> Result<()> {
    let took = wait("the nearest is known", Duration::from_secs(20), || {
        let from = from(&pages(&ask(mesh, place, url, 4)?));
        ensure!(from == ["edge"], "pages came from {from:?}");
        Ok(())
    })?;
    if took > Duration::from_secs(1) {
        report.say(&format!("the nearest was known after {}", seconds(took)));
    }
    Ok(())
}

fn ask(mesh: &Mesh, place: &str, url: &str, count: u64) -> Result<Value> {
    let count = count.to_string();
    mesh.exec(place, &["bookinfo", "client", url, "--count", &count])
}

fn slowest_us(answer: &Value) -> u64 {
    answer["slowest_us"].as_u64().unwrap_or(u64::MAX)
}

/// The clusters in which pages are served, in order.
fn clusters_of_pages(mesh: &Mesh) -> Result<Vec<String>> {
    let mut clusters: Vec<String> = mesh
        .get("bindings")?
        .iter()
        .filter(|binding| text(binding, "slot").starts_with("shop/bookinfo/productpage#"))
        .map(|binding| text(binding, "cluster").to_owned())
        .collect();
    clusters.sort();
    clusters.dedup();
    clusters.first().context("no page is bound")?;
    Ok(clusters)
}

/// How many pages came from which node.
fn pages(answer: &Value) -> BTreeMap<String, u64> {
    let served = answer["served"].as_object();
    let pages = served.into_iter().flatten().filter_map(|(place, count)| {
        let node = place.strip_prefix("productpage@")?;
        Some((node.to_owned(), count.as_u64()?))
    });
    pages.collect()
}

/// The clusters of nodes that are named `CLUSTER-NUMBER`.
fn from(pages: &BTreeMap<String, u64>) -> Vec<String> {
    let clusters = pages.keys().map(|node| match node.rsplit_once('-') {
        Some((cluster, _)) => cluster.to_owned(),
        None => node.clone(),
    });
    let mut clusters: Vec<String> = clusters.collect();
    clusters.dedup();
    clusters
}

fn failures(answer: &Value) -> String {
    let failures = answer["failures"].as_object().into_iter().flatten();
    failures
        .map(|(reason, count)| format!("; {count} x {reason}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn pages_are_counted_by_node_and_their_clusters_named_once() {
        let answer = json!({ "served": {
            "details@cloud-1": 9, "productpage@cloud-1": 3, "productpage@cloud-2": 1,
            "productpage@edge-1": 5 } });
        let pages = pages(&answer);
        assert_eq!(pages["cloud-1"], 3);
        assert_eq!(pages.len(), 3);
        assert_eq!(from(&pages), ["cloud", "edge"]);
    }
}
