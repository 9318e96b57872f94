//! The run: every case in every round, each round in another order, so that what disturbs the machine disturbs
//! all of them alike.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};
use serde::Serialize;

use crate::{
    case::Case,
    figures::Row,
    load::{Metric, measure},
    mesh,
};

/// The case that every other is divided by.
const REFERENCE: usize = 0;
/// The fewest rounds whose interval means something.
const FEWEST: u32 = 15;

/// Measures Weft's data path beside its peers.
#[derive(Debug, Parser)]
#[command(name = "weft-bench")]
pub(crate) struct Bench {
    #[command(subcommand)]
    name: Name,
    /// The folder of the product's binaries.
    #[arg(long, global = true, default_value = ".")]
    binaries: PathBuf,
    /// What the machine is, for the result.
    #[arg(long, global = true, default_value = "unknown")]
    machine: String,
    /// Interleaved rounds, at least 15.
    #[arg(long, global = true, default_value_t = FEWEST)]
    rounds: u32,
    /// How long each load lasts in each round, milliseconds.
    #[arg(long, global = true, default_value_t = 300)]
    millis: u64,
    /// One JSON object instead of a table.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Clone, Copy, Debug, Subcommand)]
enum Name {
    /// A VIP on one node.
    Vip,
}

/// The result.
#[derive(Debug, Serialize)]
struct Report {
    bench: &'static str,
    machine: String,
    rows: Vec<Row>,
}

impl Bench {
    /// Makes the cases, measures them and prints the result.
    pub(crate) fn run(self) -> Result<()> {
        let Name::Vip = self.name;
        ensure!(
            self.rounds >= FEWEST,
            "--rounds {}: an interval needs at least {FEWEST}",
            self.rounds
        );
        let mut node = mesh::Node::start(&self.binaries)?;
        let cases = [
            Case::direct()?,
            node.case()?,
            Case::iptables()?,
            Case::nftables()?,
        ];
        let report = Report {
            bench: "vip",
            machine: self.machine.clone(),
            rows: self.measure(&cases)?,
        };
        if self.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            print(&report);
        }
        Ok(())
    }

    fn measure(&self, cases: &[Case]) -> Result<Vec<Row>> {
        let time = Duration::from_millis(self.millis);
        let mut values: BTreeMap<(Metric, usize), Vec<f64>> = BTreeMap::new();
        for round in 0..self.rounds as usize {
            for metric in Metric::ALL {
                for turn in 0..cases.len() {
                    let index = (round + turn) % cases.len();
                    let value = measure(&cases[index].path(), metric, time)?;
                    values.entry((metric, index)).or_default().push(value);
                }
            }
            eprintln!("round {} of {}", round + 1, self.rounds);
        }
        let row = |((metric, index), own): (&(Metric, usize), &Vec<f64>)| {
            let reference = &values[&(*metric, REFERENCE)];
            Row::new(
                cases[*index].name,
                metric.name(),
                metric.unit(),
                own,
                reference,
            )
        };
        Ok(values.iter().map(row).collect())
    }
}

fn print(report: &Report) {
    println!("{} on {}", report.bench, report.machine);
    println!(
        "{:<16} {:<17} {:>10} {:>10} {:>10} {:<7} {:>6} {:>6}",
        "CASE", "METRIC", "MEDIAN", "MIN", "MAX", "UNIT", "RATIO", "LOW"
    );
    for row in &report.rows {
        println!(
            "{:<16} {:<17} {:>10.2} {:>10.2} {:>10.2} {:<7} {:>6.3} {:>6.3}",
            row.case, row.metric, row.median, row.min, row.max, row.unit, row.ratio, row.ratio_low
        );
    }
}
