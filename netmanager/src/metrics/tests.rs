use std::{collections::BTreeSet, fmt::Write, path::Path};

use ebpf_common::{
    layout::{Count, RefusedKey},
    reason::Reason,
};

use super::*;
use crate::{
    datapath::LogCounts,
    observe::{BackendName, VipName},
};

const NOW: Duration = Duration::from_secs(100);

fn names() -> Names {
    Names {
        node: "n1".into(),
        vips: BTreeMap::from([
            (
                1,
                VipName {
                    service: "shop/web/front".into(),
                    policy: "closest",
                    instance: None,
                },
            ),
            (
                2,
                VipName {
                    service: "shop/web/\"odd\\\n".into(),
                    policy: "instance",
                    instance: Some(3),
                },
            ),
        ]),
        backends: BTreeMap::from([(
            7,
            BackendName {
                service: "shop/web/front".into(),
                instance: 0,
                epoch: 4,
                node: 2,
            },
        )]),
        peers: BTreeMap::from([(2, "edge/n2".into()), (3, "edge/n3".into())]),
        ..Names::default()
    }
}

fn reading() -> Reading {
    let count = Count {
        packets: [10, 9],
        bytes: [1_000, 90_000],
        flows: 2,
    };
    let key = |counter, reason: Reason| RefusedKey {
        counter,
        reason: reason as u32,
    };
    Reading {
        log: LogCounts {
            full: 4,
            ..LogCounts::default()
        },
        reasons: vec![(Reason::NotLinked, 3)],
        // What has no name any more is not exported.
        vips: vec![(1, count), (2, count), (9, count)],
        backends: vec![(7, count), (8, count)],
        refused: vec![
            (key(1, Reason::NoBackend), 5),
            (key(9, Reason::NoBackend), 5),
            (
                RefusedKey {
                    counter: 1,
                    reason: 999,
                },
                5,
            ),
        ],
    }
}

fn gauges() -> Gauges {
    Gauges {
        endpoints: 2,
        table_since: Some(Duration::from_secs(40)),
        unreachable: 1,
        rtt_us: BTreeMap::from([(2, 1_500), (99, 1)]),
        tunnel_mtu: 1_420,
        flows: BTreeMap::from([("FLOWS", 7)]),
        map_sizes: BTreeMap::from([("VIPS", 9)]),
        map_entries: BTreeMap::from([("VIPS", 4)]),
        ..Gauges::default()
    }
}

/// Reads the exposition format (Prometheus, 0.0.4); the samples by family, or what is wrong with which line.
fn parse(text: &str) -> Result<BTreeMap<String, Vec<(String, f64)>>, String> {
    let is_name = |name: &str| {
        name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
    };
    let mut families = BTreeMap::<String, Vec<(String, f64)>>::new();
    let mut current = String::new();
    let mut seen = BTreeSet::new();
    for line in text.lines() {
        let wrong = |what: &str| format!("{what}: {line}");
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').ok_or_else(|| wrong("no help"))?;
            if help.is_empty() || families.contains_key(name) {
                return Err(wrong("empty or repeated"));
            }
            families.insert(name.to_owned(), Vec::new());
            current = name.to_owned();
            continue;
        }
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').ok_or_else(|| wrong("no type"))?;
            let fits = match kind {
                "counter" => name.ends_with("_total"),
                "gauge" => !name.ends_with("_total"),
                _ => false,
            };
            if name != current || !fits {
                return Err(wrong("a type that does not fit"));
            }
            continue;
        }
        let (series, value) = line.rsplit_once(' ').ok_or_else(|| wrong("no value"))?;
        let value = value.parse().map_err(|_| wrong("no number"))?;
        let (name, labels) = series.split_once('{').ok_or_else(|| wrong("no labels"))?;
        let mut rest = labels.strip_suffix('}').ok_or_else(|| wrong("no brace"))?;
        loop {
            let (label, after) = rest.split_once("=\"").ok_or_else(|| wrong("no label"))?;
            if !is_name(label) {
                return Err(wrong("a bad label"));
            }
            let mut escaped = false;
            let end = after.find(|c| {
                let ends = c == '"' && !escaped;
                escaped = c == '\\' && !escaped;
                ends
            });
            rest = &after[end.ok_or_else(|| wrong("no end of a value"))? + 1..];
            match rest.strip_prefix(',') {
                Some(more) => rest = more,
                None if rest.is_empty() => break,
                None => return Err(wrong("something after a value")),
            }
        }
        if !is_name(name) || name != current || !seen.insert(series.to_owned()) {
            return Err(wrong("a series of another family, or twice"));
        }
        let samples = families.get_mut(name).ok_or_else(|| wrong("no family"))?;
        samples.push((series.to_owned(), value));
    }
    Ok(families)
}

#[test]
fn what_is_exported_reads_back_and_says_what_was_counted() {
    let text = render(&names(), &gauges(), &reading(), NOW);
    let families = parse(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    let front = "node=\"n1\",service=\"shop/web/front\"";
    for (series, value) in [
        ("weft_refused_packets_total{node=\"n1\",reason=\"not_linked\"}".to_owned(), 3.0),
        (
            format!("weft_vip_packets_total{{{front},policy=\"closest\",instance=\"\",direction=\"request\"}}"),
            10.0,
        ),
        (
            "weft_vip_bytes_total{node=\"n1\",service=\"shop/web/\\\"odd\\\\\\n\",policy=\"instance\",instance=\"3\",direction=\"answer\"}".to_owned(),
            90_000.0,
        ),
        (
            format!("weft_vip_refused_packets_total{{{front},policy=\"closest\",instance=\"\",reason=\"no_backend\"}}"),
            5.0,
        ),
        (
            format!("weft_backend_flows_opened_total{{{front},instance=\"0\",epoch=\"4\",at=\"2\"}}"),
            2.0,
        ),
        ("weft_flows{node=\"n1\",map=\"FLOWS\"}".to_owned(), 7.0),
        ("weft_map_entries{node=\"n1\",map=\"VIPS\"}".to_owned(), 4.0),
        ("weft_map_entries_limit{node=\"n1\",map=\"VIPS\"}".to_owned(), 9.0),
        ("weft_endpoints{node=\"n1\"}".to_owned(), 2.0),
        ("weft_flow_log_events_total{node=\"n1\",fate=\"full\"}".to_owned(), 4.0),
        ("weft_table_age_seconds{node=\"n1\"}".to_owned(), 60.0),
        ("weft_peers{node=\"n1\",state=\"silent\"}".to_owned(), 1.0),
        ("weft_peer_rtt_seconds{node=\"n1\",peer=\"edge/n2\"}".to_owned(), 0.0015),
        ("weft_tunnel_mtu_bytes{node=\"n1\"}".to_owned(), 1_420.0),
    ] {
        let family = &families[series.split('{').next().unwrap()];
        let found = family.iter().find(|(name, _)| *name == series);
        assert_eq!(found.map(|(_, value)| *value), Some(value), "{series}\n{text}");
    }
    assert_eq!(
        families["weft_vip_flows_opened_total"].len(),
        2,
        "the nameless one is left out"
    );
    assert_eq!(families["weft_vip_refused_packets_total"].len(), 1);
    assert_eq!(families["weft_backend_packets_total"].len(), 2);
}

#[test]
fn the_parser_refuses_what_is_wrong() {
    let head = "# HELP a_total x\n# TYPE a_total counter\n";
    for bad in [
        "a_total{x=\"1\"} 2",
        "# HELP a x\n# TYPE a counter",
        &format!("{head}a_total{{x=\"1\"}} two"),
        &format!("{head}a_total{{x=\"1}} 2"),
        &format!("{head}a_total{{x-y=\"1\"}} 2"),
        &format!("{head}a_total{{x=\"1\"}} 2\na_total{{x=\"1\"}} 3"),
        &format!("{head}b_total{{x=\"1\"}} 2"),
    ] {
        assert!(parse(bad).is_err(), "{bad}");
    }
}

#[test]
fn the_metrics_page_names_every_family_and_no_other() {
    let mut page = String::new();
    for family in families::ALL {
        let labels = family.labels.iter().map(|label| format!("`{label}`"));
        let labels = labels.collect::<Vec<_>>().join(", ");
        let _ = writeln!(
            page,
            "| `{}` | {} | {labels} | {} |",
            family.name, family.kind, family.help
        );
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
    let text = std::fs::read_to_string(path).unwrap();
    let rows: String = text
        .split_inclusive('\n')
        .filter(|line| line.starts_with("| `weft_"))
        .collect();
    assert_eq!(
        rows, page,
        "docs/metrics.md should have exactly these rows:\n{page}"
    );
    let text = render(&names(), &gauges(), &reading(), NOW);
    let written = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let written: Vec<&str> = written.filter_map(|line| line.split(' ').next()).collect();
    let listed: Vec<&str> = families::ALL.iter().map(|family| family.name).collect();
    assert_eq!(
        written, listed,
        "every family is written, in the order of the list"
    );
}
