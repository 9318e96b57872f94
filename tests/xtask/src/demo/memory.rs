//! What each kind of process takes of memory.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::Value;

use super::{
    mesh::{Mesh, text},
    report::Report,
};

/// Resident memory, MiB, that a process of a kind may take at most, without map memory.
const BUDGETS: [(&str, u64); 4] = [
    ("netmanager", 25),
    ("tunnel", 30),
    ("lead", 60),
    ("agent", 40),
];

/// Says the largest of each kind and claims that it is within its budget.
pub(super) fn show(mesh: &Mesh, report: &Report) -> Result<()> {
    let status: Value = serde_json::from_str(&mesh.lab("status", &["--json"])?)?;
    let largest = largest(
        status["processes"]
            .as_array()
            .map_or(&[][..], Vec::as_slice),
    );
    for (kind, budget) in BUDGETS {
        let Some((count, rss, maps)) = largest.get(kind) else {
            report.claim(
                &format!("there is a {kind}"),
                Err::<&str, _>("none".to_owned()),
            );
            continue;
        };
        let seen = format!("{:.1} MiB the largest of {count}", *rss as f64 / 1024.0);
        let seen = match maps {
            0 => seen,
            maps => format!("{seen}, and {:.1} MiB of maps", *maps as f64 / 1024.0),
        };
        let claim = format!("each {kind} takes at most {budget} MiB of resident memory");
        report.claim(
            &claim,
            if *rss <= budget * 1024 {
                Ok(seen)
            } else {
                Err(seen)
            },
        );
    }
    Ok(())
}

/// Of each kind: how many, and the largest resident and map memory, KiB.
fn largest(processes: &[Value]) -> BTreeMap<String, (usize, u64, u64)> {
    let mut kinds: BTreeMap<String, (usize, u64, u64)> = BTreeMap::new();
    for process in processes {
        let number = |name: &str| process[name].as_u64().unwrap_or(0);
        let entry = kinds.entry(text(process, "kind").to_owned()).or_default();
        entry.0 += 1;
        entry.1 = entry.1.max(number("rss_kib"));
        entry.2 = entry.2.max(number("map_kib"));
    }
    kinds
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_largest_of_a_kind_counts() {
        let processes = [
            json!({ "kind": "lead", "rss_kib": 10, "map_kib": 0 }),
            json!({ "kind": "lead", "rss_kib": 30, "map_kib": 0 }),
            json!({ "kind": "agent", "rss_kib": 5, "map_kib": 2 }),
        ];
        let largest = largest(&processes);
        assert_eq!(largest["lead"], (2, 30, 0));
        assert_eq!(largest["agent"], (1, 5, 2));
    }
}
