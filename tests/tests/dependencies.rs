//! The dependency rule of the design: which crate of the workspace may know which, and what the pure core
//! may never reach.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand};

/// Each crate outside `tests/` and the crates of the workspace that it may name.
const MAY_KNOW: &[(&str, &[&str])] = &[
    ("ebpf-common", &[]),
    ("netmanager-api", &["ebpf-common"]),
    ("control-core", &["ebpf-common"]),
    ("control-api", &["control-core", "netmanager-api"]),
    ("weft-netmanager", &["ebpf-common", "netmanager-api"]),
    ("weft-cni", &["ebpf-common", "netmanager-api"]),
    (
        "weft-lead",
        &["control-api", "control-core", "netmanager-api"],
    ),
    (
        "weft-agent",
        &["control-api", "control-core", "netmanager-api"],
    ),
    (
        "weft-lab",
        &["control-api", "control-core", "netmanager-api"],
    ),
    (
        "weft",
        &[
            "control-api",
            "control-core",
            "netmanager-api",
            "weft-agent",
            "weft-lab",
            "weft-lead",
        ],
    ),
];
/// Lives under `tests/` and may know everything; nothing may know it.
const TESTS: &[&str] = &[
    "weft-tests",
    "weft-fuzz",
    "weft-history",
    "bookinfo",
    "weft-sim",
    "xtask",
];
/// What the pure core must not reach, by any path.
const IMPURE: &[&str] = &[
    "tokio",
    "kube",
    "openraft",
    "aya",
    "hyper",
    "tonic",
    "rand",
    "getrandom",
];

/// For each crate, the crates it names for building itself (not for its tests).
type Graph = BTreeMap<String, BTreeSet<String>>;

/// Everything in `graph` that the rule forbids, one sentence each.
fn violations(graph: &Graph, members: &BTreeSet<String>) -> Vec<String> {
    let mut found = Vec::new();
    for member in members {
        if TESTS.contains(&member.as_str()) {
            continue;
        }
        let Some((_, allowed)) = MAY_KNOW.iter().find(|(name, _)| name == member) else {
            found.push(format!("{member} has no line in the rule"));
            continue;
        };
        for known in graph.get(member).into_iter().flatten() {
            if members.contains(known) && !allowed.contains(&known.as_str()) {
                found.push(format!("{member} must not depend on {known}"));
            }
        }
    }
    for outside in graph.get("ebpf-common").into_iter().flatten() {
        found.push(format!("ebpf-common must not depend on {outside}"));
    }
    let reached = closure(graph, "control-core");
    for impure in IMPURE.iter().filter(|name| reached.contains(**name)) {
        found.push(format!("control-core must not reach {impure}"));
    }
    found
}

fn closure(graph: &Graph, root: &str) -> BTreeSet<String> {
    let mut reached = BTreeSet::new();
    let mut open = vec![root];
    while let Some(name) = open.pop() {
        for next in graph.get(name).into_iter().flatten() {
            if reached.insert(next.clone()) {
                open.push(next);
            }
        }
    }
    reached
}

/// The resolved graph: features and targets as this workspace builds them.
fn resolved(metadata: &Metadata) -> Graph {
    let names: BTreeMap<_, _> = metadata
        .packages
        .iter()
        .map(|package| (&package.id, package.name.to_string()))
        .collect();
    let mut graph = Graph::new();
    for node in &metadata
        .resolve
        .as_ref()
        .expect("metadata was asked with its graph")
        .nodes
    {
        let known = graph.entry(names[&node.id].clone()).or_default();
        for dependency in &node.deps {
            if dependency
                .dep_kinds
                .iter()
                .any(|kind| kind.kind == DependencyKind::Normal)
            {
                known.insert(names[&dependency.pkg].clone());
            }
        }
    }
    graph
}

fn workspace() -> (Metadata, BTreeSet<String>) {
    let metadata = MetadataCommand::new()
        .manifest_path(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"))
        .exec()
        .expect("cargo knows this workspace");
    let members = metadata
        .workspace_packages()
        .iter()
        .map(|package| package.name.to_string())
        .collect();
    (metadata, members)
}

#[test]
fn every_crate_knows_only_those_it_may() {
    let (metadata, members) = workspace();
    assert_eq!(
        violations(&resolved(&metadata), &members),
        Vec::<String>::new()
    );
}

#[test]
fn nothing_outside_tests_names_a_crate_of_tests_for_any_purpose() {
    let (metadata, _) = workspace();
    for package in metadata.workspace_packages() {
        if TESTS.contains(&package.name.as_str()) {
            continue;
        }
        for dependency in &package.dependencies {
            assert!(
                !TESTS.contains(&dependency.name.as_str()),
                "{} names {}",
                package.name,
                dependency.name
            );
        }
    }
}

#[test]
fn the_kernel_programs_know_only_their_common_crate() {
    let metadata = MetadataCommand::new()
        .manifest_path(concat!(env!("CARGO_MANIFEST_DIR"), "/../ebpf/Cargo.toml"))
        .no_deps()
        .exec()
        .unwrap();
    for package in metadata.workspace_packages() {
        let ours: Vec<_> = package
            .dependencies
            .iter()
            .filter(|dependency| dependency.path.is_some())
            .map(|dependency| dependency.name.as_str())
            .collect();
        assert!(
            ours.iter().all(|name| *name == "ebpf-common"),
            "{} names {ours:?}",
            package.name
        );
    }
}

#[test]
fn a_planted_violation_is_found() {
    let (metadata, members) = workspace();
    let planted = [
        (
            "weft-lead",
            "weft-agent",
            "weft-lead must not depend on weft-agent",
        ),
        (
            "weft-cni",
            "control-core",
            "weft-cni must not depend on control-core",
        ),
        ("weft", "xtask", "weft must not depend on xtask"),
        ("ebpf-common", "libc", "ebpf-common must not depend on libc"),
        ("serde_json", "tokio", "control-core must not reach tokio"),
    ];
    for (from, to, sentence) in planted {
        let mut graph = resolved(&metadata);
        graph.entry(from.into()).or_default().insert(to.into());
        assert_eq!(violations(&graph, &members), [sentence]);
    }
}
