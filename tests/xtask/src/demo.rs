//! The demo: the whole of Weft on this machine, each of its claims checked.
//!
//! Everything in it is the product's own binary doing its job; the lab makes the machines. One file per step;
//! a step says what it claims, and the demo succeeds only if every claim held.

mod daemon_killed;
mod interrupt;
mod leader_lost;
mod leads_stopped;
mod leftovers;
mod load;
mod memory;
mod mesh;
mod moves;
mod node_lost;
mod placing;
mod reaching;
mod report;
mod watch;

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use anyhow::{Context, Result, bail};
use clap::Args;

use self::{interrupt::Interrupt, leftovers::Machine, load::Load, mesh::Mesh, report::Report};
use crate::{build, host};

/// How the demo is shown.
#[derive(Debug, Default, Args)]
pub(crate) struct DemoArgs {
    /// One JSON object on standard output; the talk goes to standard error.
    #[arg(long)]
    json: bool,
    /// Leaves the lab up and says how to look at it.
    #[arg(long)]
    keep: bool,
    /// A live table of where everything runs.
    #[arg(long, conflicts_with = "json")]
    watch: bool,
    /// Shows these binaries instead of building Weft.
    #[arg(long, value_name = "DIR")]
    binaries: Option<PathBuf>,
}

/// Builds Weft and shows it.
pub(crate) fn run(args: &DemoArgs) -> Result<()> {
    host::check(host::Needs::NETWORK)?;
    let binaries = match &args.binaries {
        Some(dir) => dir.clone(),
        None => build::release(build::PRODUCT)?,
    };
    let report = Report::new(args.json);
    let before = Machine::look();
    let interrupt = Interrupt::heard(binaries.join("weft"))?;
    let mesh = Mesh::up(&binaries, args.keep).context("the lab did not come up")?;
    if !args.keep {
        interrupt.takes_down(mesh.id());
    }
    report.say(&format!(
        "lab {} is up: three clusters, six nodes, three leads",
        mesh.id()
    ));
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        if args.watch {
            scope.spawn(|| watch::draw(&mesh, &report, &over));
        }
        if let Err(error) = steps(&mesh, &report) {
            let error = format!("{error:#}");
            report.claim("every step ran to its end", Err::<&str, _>(error));
        }
        over.store(true, Ordering::Relaxed);
    });
    report.step("the end");
    if args.keep {
        mesh.keep(&report);
    } else {
        let own = mesh.id().to_owned();
        let down = mesh.down();
        let down = down
            .map(|()| own.clone())
            .map_err(|error| format!("{error:#}"));
        report.claim("the lab went down", down);
        report.claim("the machine is as it was before", before.compare(&own));
    }
    report.print();
    let failed = report.failed();
    if failed.is_empty() {
        return Ok(());
    }
    bail!("{} claims failed: {}", failed.len(), failed.join("; "))
}

fn steps(mesh: &Mesh, report: &Report) -> Result<()> {
    placing::show(mesh, report).context("step a")?;
    reaching::show(mesh, report).context("step b")?;
    let load = Load::start(mesh)?;
    moves::show(mesh, report, &load).context("step c")?;
    node_lost::show(mesh, report, &load).context("step d")?;
    leader_lost::show(mesh, report, &load).context("step e")?;
    daemon_killed::show(mesh, report, &load).context("step f")?;
    leads_stopped::show(mesh, report, &load).context("step g")?;
    report.step("sums");
    memory::show(mesh, report)?;
    let sum = load.stop()?;
    report.say(&format!("the load in all: {sum}"));
    Ok(())
}

/// The sample application's goal file.
fn goal_file() -> PathBuf {
    build::root().join(Path::new("examples/bookinfo/bookinfo.yaml"))
}
