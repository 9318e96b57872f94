//! The result, for people and for programs.

use std::fs;

use serde::Serialize;

use crate::{figures::Row, gate::Verdict};

/// The result of one bench.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) bench: &'static str,
    pub(crate) machine: String,
    pub(crate) rounds: u32,
    pub(crate) rows: Vec<Row>,
    pub(crate) gates: Vec<Verdict>,
}

/// Processes that want to run now, as the kernel averages them over the last minute.
pub(crate) fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or("unknown").to_owned()
}

impl Report {
    pub(crate) fn print(&self) {
        println!("{} on {}, {} rounds", self.bench, self.machine, self.rounds);
        println!(
            "{:<24} {:<17} {:<5} {:>10} {:>10} {:>10} {:<7} {:>6} {:>6} {:>6}",
            "CASE", "METRIC", "OVER", "MEDIAN", "MIN", "MAX", "UNIT", "RATIO", "LOW", "HIGH"
        );
        for row in &self.rows {
            let ratio = |value: Option<f64>| value.map_or("-".to_owned(), |v| format!("{v:.3}"));
            println!(
                "{:<24} {:<17} {:<5} {:>10.2} {:>10.2} {:>10.2} {:<7} {:>6} {:>6} {:>6}",
                row.case,
                row.metric,
                row.family.name(),
                row.median,
                row.min,
                row.max,
                row.unit,
                ratio(row.ratio),
                ratio(row.ratio_low),
                ratio(row.ratio_high)
            );
        }
        for verdict in &self.gates {
            println!(
                "{} {}, {}: {:.3} [{:.3}, {:.3}] ({})",
                if verdict.passes { "holds " } else { "MISSED" },
                verdict.gate,
                verdict.family.name(),
                verdict.value.median,
                verdict.value.low,
                verdict.value.high,
                verdict.source
            );
        }
    }
}
