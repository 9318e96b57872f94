//! The benches by name: what each measures, against what, and whether its gates hold.

use std::{path::PathBuf, time::Duration};

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};
use weft_tests::steal::CpuTime;

use crate::{
    agents::Agents,
    awake::Awake,
    case::{self, Case},
    control::{self, Control},
    figures::{Figures, Series},
    gate::{self, Gate},
    load::{Family, Metric},
    report::{Report, load_average},
    rounds::{Rounds, Watched},
    statistics::{self, Counting, PROGRAMS},
    table, tunnel,
};

/// The fewest rounds whose interval means something.
const FEWEST: u32 = 15;

/// How long each load lasts in each round unless it is said.
const LOAD: Duration = Duration::from_millis(250);

/// Measures Weft beside its peers.
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
    /// How long each load lasts in each round, milliseconds: 250, for `control` 2,000.
    #[arg(long, global = true)]
    millis: Option<u64>,
    /// Only these metrics; all by default.
    #[arg(long, global = true, value_enum)]
    metric: Vec<Metric>,
    /// One JSON object instead of a table.
    #[arg(long, global = true)]
    json: bool,
    /// Fail where a gate is missed.
    #[arg(long, global = true)]
    gate: bool,
}

#[derive(Debug, Subcommand)]
enum Name {
    /// A VIP on one node.
    Vip,
    /// Nanoseconds per packet of each program.
    Datapath,
    /// A VIP on another node.
    Tunnel,
    /// 10,000 services with 100,000 backends: how long they load, what they weigh.
    Table,
    /// Changes acknowledged by three leads, and what a lost leader costs.
    Control(Control),
    /// Many agents on three leads: who is told of one endpoint's change, and when.
    Agents(Agents),
}

/// What was measured, what each series is divided by, and what is demanded.
struct Measured {
    figures: Figures,
    reference: fn(Series) -> Series,
    gates: &'static [Gate],
    /// Of the machine, what else matters.
    place: String,
}

impl Bench {
    /// Makes the cases, measures them and prints the result.
    pub(crate) fn run(self) -> Result<()> {
        ensure!(
            self.rounds >= FEWEST,
            "--rounds {}: an interval needs at least {FEWEST}",
            self.rounds
        );
        let (load, time) = (load_average(), CpuTime::now()?);
        let _awake = Awake::keep()?;
        let measured = match &self.name {
            Name::Vip => self.vip()?,
            Name::Datapath => self.datapath()?,
            Name::Tunnel => self.tunnel()?,
            Name::Table => self.table()?,
            Name::Control(control) => self.control(control)?,
            Name::Agents(agents) => self.agents(agents)?,
        };
        let report = Report {
            bench: match self.name {
                Name::Vip => "vip",
                Name::Datapath => "datapath",
                Name::Tunnel => "tunnel",
                Name::Table => "table",
                Name::Control(_) => "control",
                Name::Agents(_) => "agents",
            },
            machine: format!(
                "{}{}, load average {load} before, {:.1} % of the time stolen by its host",
                self.machine,
                measured.place,
                100.0 * time.stolen_until(CpuTime::now()?)
            ),
            rounds: self.rounds,
            rows: measured.figures.rows(measured.reference),
            gates: gate::judge(measured.gates, &measured.figures),
        };
        if self.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            report.print();
        }
        let missed = report.gates.iter().filter(|gate| !gate.passes).count();
        ensure!(
            !self.gate || missed == 0,
            "{missed} of {} gates are missed",
            report.gates.len()
        );
        Ok(())
    }

    /// Those of a bench's metrics that are asked for.
    fn metrics(&self, all: &[Metric]) -> Vec<Metric> {
        let wanted = |metric: &Metric| self.metric.is_empty() || self.metric.contains(metric);
        all.iter().copied().filter(wanted).collect()
    }

    fn rounds(&self) -> Rounds {
        self.rounds_of(LOAD)
    }

    /// Rounds whose loads last so long unless it is said.
    fn rounds_of(&self, time: Duration) -> Rounds {
        Rounds {
            count: self.rounds,
            time: self.millis.map_or(time, Duration::from_millis),
        }
    }

    fn control(&self, control: &Control) -> Result<Measured> {
        let mut figures = Figures::default();
        let rounds = self.rounds_of(control::LOAD);
        let place = control.measure(&self.binaries, rounds, &mut figures)?;
        Ok(Measured {
            figures,
            reference: |series| Series {
                case: match series.case {
                    control::WEFT => control::ETCD,
                    other => other,
                },
                ..series
            },
            gates: match control.is_near() {
                true => gate::CONTROL,
                false => gate::CONTROL_FAR,
            },
            place: format!(", {place}"),
        })
    }

    fn agents(&self, agents: &Agents) -> Result<Measured> {
        let mut figures = Figures::default();
        let place = agents.measure(&self.binaries, &mut figures)?;
        Ok(Measured {
            figures,
            // There is nothing beside it.
            reference: |series| Series { case: "", ..series },
            gates: gate::AGENTS,
            place: format!(", {place}"),
        })
    }

    fn vip(&self) -> Result<Measured> {
        let cases = [
            Case::direct()?,
            Case::vip(&self.binaries)?,
            Case::iptables()?,
            Case::nftables()?,
            Case::spliced(&self.binaries)?,
        ];
        let metrics = self.metrics(&[
            Metric::Throughput,
            Metric::RequestResponse,
            Metric::Connections,
            Metric::RequestResponseOneCpu,
            Metric::ConnectionsOneCpu,
            Metric::Datagrams,
        ]);
        let mut figures = Figures::default();
        self.rounds().values(&cases, &metrics, &mut figures)?;
        Ok(Measured {
            figures,
            reference: by_direct_route,
            gates: gate::VIP,
            place: String::new(),
        })
    }

    fn datapath(&self) -> Result<Measured> {
        let same = [Case::direct()?, Case::vip(&self.binaries)?];
        let far = tunnel::vip(&self.binaries)?;
        let mut figures = Figures::default();
        self.rounds()
            .values(&same, &self.metrics(&[Metric::Datagrams]), &mut figures)?;
        let (node, [client, backend]) = (&same[1].machines[0], [0, 1].map(|n| &far.machines[n]));
        let (pod, tunnel) = ("weft_dispatch_pod", "weft_dispatch_tunnel");
        let watched = [
            Watched {
                case: &same[1],
                programs: vec![(PROGRAMS[0], node.program(pod)?)],
            },
            Watched {
                case: &far,
                programs: vec![
                    (PROGRAMS[1], client.program(pod)?),
                    (PROGRAMS[2], backend.program(tunnel)?),
                    (PROGRAMS[3], backend.program(pod)?),
                    (PROGRAMS[4], client.program(tunnel)?),
                ],
            },
        ];
        let metrics = self.metrics(&[
            Metric::Throughput,
            Metric::RequestResponse,
            Metric::Connections,
            Metric::Datagrams,
        ]);
        // Only now: counting itself costs time.
        let _counting = Counting::start()?;
        self.rounds().costs(&watched, &metrics, &mut figures)?;
        Ok(Measured {
            figures,
            reference: |series| {
                if statistics::is_program(series.case) {
                    Series {
                        family: Family::Ipv4,
                        ..series
                    }
                } else {
                    by_direct_route(series)
                }
            },
            gates: gate::DATAPATH,
            place: String::new(),
        })
    }

    fn tunnel(&self) -> Result<Measured> {
        let cases = [tunnel::plain(&self.binaries)?, tunnel::vip(&self.binaries)?];
        let metrics = self.metrics(&[
            Metric::Throughput,
            Metric::RequestResponse,
            Metric::Latency,
            Metric::Connections,
        ]);
        let mut figures = Figures::default();
        self.rounds().values(&cases, &metrics, &mut figures)?;
        Ok(Measured {
            figures,
            reference: |series| Series {
                case: match series.case {
                    tunnel::VIP_KERNEL => tunnel::PLAIN_KERNEL,
                    tunnel::VIP_USERSPACE => tunnel::PLAIN_USERSPACE,
                    plain => plain,
                },
                ..series
            },
            gates: gate::TUNNEL,
            place: String::new(),
        })
    }

    fn table(&self) -> Result<Measured> {
        let mut figures = Figures::default();
        table::measure(self.rounds, &mut figures)?;
        Ok(Measured {
            figures,
            reference: |series| Series {
                case: match series.case {
                    table::WHOLE => table::ONE,
                    other => other,
                },
                ..series
            },
            gates: gate::TABLE,
            place: String::new(),
        })
    }
}

fn by_direct_route(series: Series) -> Series {
    Series {
        case: case::DIRECT,
        ..series
    }
}
