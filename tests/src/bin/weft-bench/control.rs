//! The control plane: changes that three leads acknowledge beside what a three-member etcd does, on the same disk in the
//! same run, and what a lost or a drained leader costs.
//!
//! ```text
//!  64 writers, each one HTTP/2 connection over mutual TLS --+--> lead a, b, c    a goal file that changes a goal
//!  (writer n at member n mod 3, one change at a time)       '--> etcd 1, 2, 3    a put of the same bytes
//! ```
//!
//! The members are processes as an operator starts them, with the defaults of their programs. The writers are spread
//! over the members, as clients are that know all addresses; the client is the same code for both, and what it costs is
//! a row of its own. A change of Weft's is acknowledged when it is on the disks of a majority *and* planned for; the
//! planner's time is not left out.
//!
//! With round trips between the leads (`--rtt`) each is on a machine of its own, and only the fall of the leader is measured.

mod etcd;
mod fall;
pub(crate) mod place;
mod writers;

use std::{path::Path, path::PathBuf, time::Duration};

use anyhow::{Context, Result};
use clap::Args;
use tokio::runtime::{Builder, Runtime};

use weft_tests::leads::{Leads, Place, apart::Apart, member::CpuTime};

use self::{etcd::Etcd, writers::Writers};
use crate::{
    figures::{Figures, Series},
    load::Family,
    rounds::{Repeats, Rounds},
};

/// How long each load lasts in each round unless it is said.
pub(crate) const LOAD: Duration = Duration::from_secs(2);
/// The case of the leads.
pub(crate) const WEFT: &str = "weft";
/// The case of etcd.
pub(crate) const ETCD: &str = "etcd";
/// The case of the disk under both.
const DISK: &str = "disk";

/// Changes that were acknowledged, per second.
pub(crate) const WRITES: &str = "writes_per_second";
/// How long one change takes, milliseconds.
const P50: &str = "p50";
pub(crate) const P99: &str = "p99";
/// What the three members and the client spend on one change, microseconds of CPU time.
const MEMBERS_CPU: &str = "members_cpu";
const CLIENT_CPU: &str = "client_cpu";
/// From the kill of the leader to the next change that is acknowledged, milliseconds.
pub(crate) const LEADER_KILLED: &str = "leader_killed";
/// Changes that were acknowledged and are not there after a kill.
pub(crate) const LOST: &str = "lost_writes";
/// The longest time without an acknowledgement around a hand-over, milliseconds, and in leases as they were then.
const DRAINED: &str = "drained";
pub(crate) const DRAINED_LEASES: &str = "drained_leases";
/// Up to this round-trip time leads are near each other.
const NEAR: Duration = Duration::from_millis(10);
/// A write of 4 KiB until it is on the disk, milliseconds.
const FSYNC: &str = "fsync_p50";

/// What is measured, and with what.
#[derive(Debug, Args)]
pub(crate) struct Control {
    /// The etcd to compare with.
    #[arg(long, value_name = "PROGRAM", default_value = "etcd")]
    etcd: PathBuf,
    /// Where the members keep their data: on the disk that is meant.
    #[arg(long, value_name = "DIR", default_value = ".")]
    data: PathBuf,
    /// How often the leader is killed.
    #[arg(long, default_value_t = 3)]
    kills: u32,
    /// How often the leader is drained.
    #[arg(long, default_value_t = 3)]
    drains: u32,
    /// The round-trip time between the leads, milliseconds: only what a lost leader costs is measured then.
    #[arg(long, value_name = "MS")]
    rtt: Option<u64>,
}

impl Control {
    /// Measures into `figures`; says on what disk.
    pub(crate) fn measure(
        &self,
        binaries: &Path,
        rounds: Rounds,
        figures: &mut Figures,
    ) -> Result<String> {
        let data = tempfile::Builder::new()
            .prefix("weft-bench-control-")
            .tempdir_in(&self.data)
            .with_context(|| format!("failed to make a folder in {}", self.data.display()))?;
        let place = place::of(data.path())?;
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .context("failed to start the runtime")?;
        let Some(rtt) = self.rtt() else {
            let start = Leads::start(binaries, data.path(), &[], Place::here()?);
            let leads = runtime.block_on(start)?;
            {
                let etcd = runtime.block_on(Etcd::start(&self.etcd, data.path()))?;
                writes(&runtime, (&leads, &etcd), data.path(), rounds, figures)?;
            }
            self.falls(&runtime, leads, figures)?;
            return Ok(place);
        };
        let machines = Apart::new(rtt)?;
        // What is started by this thread ends with it.
        machines.hub().run(|| {
            let start = Leads::start(binaries, data.path(), &[], Place::apart(&machines));
            self.falls(&runtime, runtime.block_on(start)?, figures)
        })?;
        Ok(format!("{place}, {rtt:?} between the leads"))
    }

    /// The round-trip time between leads on machines of their own.
    fn rtt(&self) -> Option<Duration> {
        self.rtt.map(Duration::from_millis)
    }

    /// Whether leads are so near each other that the usual timers do.
    pub(crate) fn is_near(&self) -> bool {
        self.rtt().is_none_or(|rtt| rtt <= NEAR)
    }

    /// Kills and drains the leader, again and again.
    fn falls(&self, runtime: &Runtime, mut leads: Leads, figures: &mut Figures) -> Result<()> {
        for kill in 0..self.kills {
            let killed = runtime.block_on(fall::kill(&mut leads, kill))?;
            push(figures, (WEFT, LEADER_KILLED), "ms", ms(killed.pause));
            push(figures, (WEFT, LOST), "", killed.lost as f64);
            eprintln!("kill {} of {}", kill + 1, self.kills);
        }
        for drain in 0..self.drains {
            let (pause, lease) = runtime.block_on(fall::drain(&leads, drain))?;
            push(figures, (WEFT, DRAINED), "ms", ms(pause));
            let leases = pause.as_secs_f64() / lease.as_secs_f64();
            push(figures, (WEFT, DRAINED_LEASES), "", leases);
            eprintln!("drain {} of {}", drain + 1, self.drains);
        }
        Ok(())
    }
}

/// Both stores in every round, each round in another order.
fn writes(
    runtime: &Runtime,
    (leads, etcd): (&Leads, &Etcd),
    data: &Path,
    rounds: Rounds,
    figures: &mut Figures,
) -> Result<()> {
    let mut stores = [
        (
            WEFT,
            runtime.block_on(Writers::of_weft(leads))?,
            leads.pids(),
        ),
        (ETCD, runtime.block_on(Writers::of_etcd(etcd))?, etcd.pids()),
    ];
    for (_, writers, _) in &mut stores {
        runtime.block_on(writers.write(rounds.time))?;
    }
    let mut repeats = Repeats::new(rounds.count);
    rounds.each(|round| {
        let measured = repeats.undisturbed(|| {
            let fsync = place::fsync(data)?;
            let mut measured = Vec::new();
            for turn in 0..stores.len() {
                let at = (round + turn) % stores.len();
                let (name, writers, members) = &mut stores[at];
                let before = (CpuTime::of_all(members)?, CpuTime::own()?);
                let written = runtime.block_on(writers.write(rounds.time))?;
                let members = before.0.until(CpuTime::of_all(members)?);
                let client = before.1.until(CpuTime::own()?);
                measured.push((*name, written, members, client));
            }
            Ok((fsync, measured))
        })?;
        let (fsync, measured) = measured;
        push(figures, (DISK, FSYNC), "ms", ms(fsync));
        for (case, written, members, client) in measured {
            let each = |time: Duration| time.as_secs_f64() * 1e6 / written.count() as f64;
            push(figures, (case, WRITES), "1/s", written.per_second());
            push(figures, (case, P50), "ms", ms(written.latency(0.50)));
            push(figures, (case, P99), "ms", ms(written.latency(0.99)));
            push(figures, (case, MEMBERS_CPU), "us", each(members));
            push(figures, (case, CLIENT_CPU), "us", each(client));
        }
        Ok(())
    })
}

pub(crate) fn push(
    figures: &mut Figures,
    (case, metric): (&'static str, &'static str),
    unit: &'static str,
    value: f64,
) {
    let series = Series {
        metric,
        family: Family::Ipv4,
        case,
    };
    figures.push(series, unit, value);
}

pub(crate) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1_000.0
}
