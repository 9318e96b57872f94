//! Many agents on three leads: how soon one endpoint's change is where it is needed, who else hears of it, what the leads
//! weigh, and how soon one serves again that was killed.
//!
//! ```text
//!  three weft leads (processes) <== mTLS streams == 250 agents (tasks of this process), each a cluster of 40 nodes
//!         ^                                          with 1,000 endpoints
//!         '-- goal files through the API
//! ```
//!
//! The agents speak by `weft agent`'s own stream; their clusters are simulated (`agents/cluster.rs`): no driver, no node,
//! no load, and of round-trip times eight per node.

mod agent;
mod change;
mod cluster;
mod shape;

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use clap::Args;
use futures::{StreamExt, TryStreamExt, future::try_join_all, stream};
use tokio::{
    runtime::Builder,
    sync::{mpsc, watch},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use weft_tests::leads::{
    Leads, Place, check,
    client::{Connection, Door, request},
};

use self::{
    agent::{Agent, Common, Welcomes},
    change::Changes,
    shape::{Shape, cluster_name},
};
use crate::{
    control::{WEFT, ms, place, push},
    figures::Figures,
};

/// From an agent's report of an endpoint to the last concerned table, milliseconds: of all changes, and 99 of 100.
const TOLD: &str = "told";
pub(crate) const TOLD_P99: &str = "told_p99";
/// Agents that were sent something for a change that does not concern them, and tables of such nodes.
pub(crate) const UNCONCERNED: &str = "unconcerned_agents";
const UNCONCERNED_TABLES: &str = "unconcerned_tables";
/// The leader's resident memory: with the changes, and the most that it ever had, MiB.
pub(crate) const LEADER_RSS: &str = "leader_rss";
const LEADER_PEAK: &str = "leader_rss_peak";
/// From the start of a lead that was killed until it answers with all that was acknowledged, milliseconds.
pub(crate) const SERVES: &str = "restarted_serves";
/// From the kill of a lead until all agents have a stream again, milliseconds.
const BACK: &str = "agents_back";
/// All goal files, until every endpoint is there, seconds.
const FILLED: &str = "filled";

/// Goal files that are sent at once.
const WRITERS: usize = 16;
/// How long one of them may wait for its turn.
const PATIENCE: Duration = Duration::from_secs(600);
/// Between two looks at how far the agents are.
const LOOK: Duration = Duration::from_millis(250);
/// Between two lines about it.
const SAID: Duration = Duration::from_secs(10);
/// How long nothing may be sent before the changes begin.
const QUIET: Duration = Duration::from_secs(2);
/// How long agents may take to be back.
const RETURN: Duration = Duration::from_secs(120);

/// How large, and what is done.
#[derive(Debug, Args)]
pub(crate) struct Agents {
    /// Clusters, each with its agent.
    #[arg(long, default_value_t = 250)]
    agents: usize,
    /// Nodes of each cluster.
    #[arg(long, default_value_t = 40)]
    nodes: usize,
    /// Endpoints of each cluster, a multiple of 100.
    #[arg(long, default_value_t = 1_000)]
    endpoints: usize,
    /// How many endpoints are changed, one after the other.
    #[arg(long, default_value_t = 300)]
    changes: usize,
    /// How many leads are killed and started again, one after the other.
    #[arg(long, default_value_t = 3)]
    restarts: usize,
    /// How long it may take until everything runs, seconds.
    #[arg(long, default_value_t = 1_800)]
    fill: u64,
    /// Where the leads keep their data: on the disk that is meant.
    #[arg(long, value_name = "DIR", default_value = ".")]
    data: PathBuf,
}

/// The agents; they end with this.
struct Fleet {
    agents: Vec<Agent>,
    changes: Changes,
    _tasks: JoinSet<()>,
    _end: DropGuard,
}

impl Agents {
    /// Measures into `figures`; says on what disk, and how large.
    pub(crate) fn measure(&self, binaries: &Path, figures: &mut Figures) -> Result<String> {
        let shape = Shape::new(self.agents, self.nodes, self.endpoints)?;
        ensure!(self.changes > 0, "--changes 0: nothing is measured");
        let data = tempfile::Builder::new()
            .prefix("weft-bench-agents-")
            .tempdir_in(&self.data)
            .with_context(|| format!("failed to make a folder in {}", self.data.display()))?;
        let place = place::of(data.path())?;
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .context("failed to start the runtime")?;
        runtime.block_on(self.run(&shape, (binaries, data.path()), figures))?;
        Ok(format!(
            "{place}, {} agents with {} nodes and {} endpoints each",
            self.agents, self.nodes, self.endpoints
        ))
    }

    async fn run(
        &self,
        shape: &Shape,
        (binaries, data): (&Path, &Path),
        figures: &mut Figures,
    ) -> Result<()> {
        // Without IPv4: it serves some 4,000 full nodes.
        let mut leads = Leads::start(binaries, data, &["--no-ipv4"], Place::here()?).await?;
        let mut fleet = Fleet::start(shape, &leads).await?;
        let filling = Instant::now();
        let limit = Duration::from_secs(self.fill);
        timeout(limit, fill(shape, &leads, &fleet.agents))
            .await
            .with_context(|| format!("the mesh is not filled after {limit:?}"))??;
        fleet.changes.rest(QUIET, limit).await?;
        push(
            figures,
            (WEFT, FILLED),
            "s",
            ms(filling.elapsed()) / 1_000.0,
        );
        self.change(shape, &leads, &mut fleet, figures).await?;
        for restart in 0..self.restarts {
            let (serves, back) = fall(&mut leads, restart, &fleet.agents).await?;
            push(figures, (WEFT, SERVES), "ms", ms(serves));
            push(figures, (WEFT, BACK), "ms", ms(back));
            eprintln!("lead {} of {} restarted", restart + 1, self.restarts);
            fleet.changes.rest(QUIET, limit).await?;
        }
        Ok(())
    }

    /// Changes endpoints, one after the other.
    async fn change(
        &self,
        shape: &Shape,
        leads: &Leads,
        fleet: &mut Fleet,
        figures: &mut Figures,
    ) -> Result<()> {
        let leader = leads.pids()[leads.leader().await?];
        let mut times = Vec::new();
        for turn in 0..self.changes {
            let told = fleet.changes.one((shape, turn), &fleet.agents).await?;
            times.push(told.time);
            push(figures, (WEFT, TOLD), "ms", ms(told.time));
            push(figures, (WEFT, UNCONCERNED), "", told.agents as f64);
            push(figures, (WEFT, UNCONCERNED_TABLES), "", told.tables as f64);
            push(figures, (WEFT, LEADER_RSS), "MiB", memory(leader, "VmRSS")?);
        }
        times.sort();
        let rank = (times.len() * 99).div_ceil(100);
        push(figures, (WEFT, TOLD_P99), "ms", ms(times[rank - 1]));
        push(
            figures,
            (WEFT, LEADER_PEAK),
            "MiB",
            memory(leader, "VmHWM")?,
        );
        Ok(())
    }
}

impl Fleet {
    /// Starts the agents and waits until each is welcomed.
    async fn start(shape: &Shape, leads: &Leads) -> Result<Self> {
        let (change, changes) = watch::channel(None);
        let (news, heard) = mpsc::unbounded_channel();
        let shutdown = CancellationToken::new();
        let common = Common {
            leads: leads.doors().iter().map(|door| door.address).collect(),
            change: changes,
            news,
            shutdown: shutdown.clone(),
        };
        let mut tasks = JoinSet::new();
        let mut agents = Vec::new();
        for number in 0..shape.clusters {
            let credentials = leads.agent(&cluster_name(number))?;
            let size = (number, shape.nodes);
            agents.push(Agent::start(
                size,
                &credentials,
                common.clone(),
                &mut tasks,
            )?);
        }
        let fleet = Self {
            agents,
            changes: Changes {
                change,
                news: heard,
            },
            _tasks: tasks,
            _end: shutdown.drop_guard(),
        };
        all_up(&fleet.agents).await?;
        eprintln!("{} agents are connected", shape.clusters);
        Ok(fleet)
    }
}

/// Applies every goal file, and waits until all that it asks for runs.
async fn fill(shape: &Shape, leads: &Leads, agents: &[Agent]) -> Result<()> {
    let wanted = shape.endpoints() * shape.clusters;
    let watch = async {
        let mut said = Instant::now();
        loop {
            let attached: usize = agents.iter().map(Agent::attached).sum();
            if attached == wanted {
                return Ok(());
            }
            if said.elapsed() >= SAID {
                said = Instant::now();
                eprintln!("{attached} of {wanted} endpoints");
            }
            sleep(LOOK).await;
        }
    };
    let clusters = shape.clusters;
    let goals = (0..shape.applications())
        .flat_map(|application| (0..clusters).map(move |cluster| (cluster, application)));
    let doors = leads.doors();
    let connections = try_join_all(doors.iter().map(Door::open)).await?;
    let connections = &connections;
    let apply = stream::iter(goals.enumerate())
        .map(|(turn, (cluster, application))| {
            let connection = &connections[turn % connections.len()];
            apply(connection, shape.goal(cluster, application))
        })
        .buffer_unordered(WRITERS)
        .try_collect::<()>();
    tokio::try_join!(apply, watch).map(|_| ())
}

/// Applies a goal file; the leads may be too busy for it at first.
async fn apply(connection: &Connection, goal: String) -> Result<()> {
    let started = Instant::now();
    loop {
        let body = Bytes::from(goal.clone());
        let asked = request("POST", "/v1/applications", "application/yaml", body);
        let answer = connection.ask(asked).await;
        match answer.and_then(|answer| check(&answer)) {
            Ok(()) => return Ok(()),
            Err(error) if started.elapsed() > PATIENCE => return Err(error),
            Err(_) => sleep(LOOK).await,
        }
    }
}

/// Kills a lead and starts it again: how long until it serves, and until all agents have a stream.
async fn fall(leads: &mut Leads, number: usize, agents: &[Agent]) -> Result<(Duration, Duration)> {
    let number = number % leads.doors().len();
    let before: Vec<usize> = agents.iter().map(|it| it.welcomes().parted).collect();
    let killed = Instant::now();
    leads.kill(number)?;
    let started = Instant::now();
    leads.restart_by(number, "/v1/clusters").await?;
    let serves = started.elapsed();
    // Whoever followed it has noticed by now.
    let up = all_up(agents).await?;
    let anew = up
        .iter()
        .zip(before)
        .filter(|(it, parted)| it.parted > *parted);
    let last = anew.filter_map(|(it, _)| it.up_since).max();
    let back = last.map_or(Duration::ZERO, |last| {
        last.saturating_duration_since(killed)
    });
    Ok((serves, back))
}

/// Waits until each agent has a stream.
async fn all_up(agents: &[Agent]) -> Result<Vec<Welcomes>> {
    match timeout(RETURN, try_join_all(agents.iter().map(Agent::is_up))).await {
        Ok(up) => up,
        Err(_) => {
            let up = agents.iter().filter(|it| it.welcomes().up_since.is_some());
            let (up, all) = (up.count(), agents.len());
            bail!("{up} of {all} agents have a stream after {RETURN:?}")
        }
    }
}

/// A line of proc_pid_status(5) in kB, as MiB.
fn memory(pid: u32, key: &str) -> Result<f64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("failed to read {path}"))?;
    let kib = kib(&text, key).with_context(|| format!("{path} has no {key}"))?;
    Ok(kib as f64 / 1024.0)
}

fn kib(status: &str, key: &str) -> Option<u64> {
    let mut lines = status.lines();
    let value = lines.find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    value.trim().strip_suffix(" kB")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_the_line_of_its_own_name() {
        let status = "VmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\nRssAnon:\t 9 kB\n";
        assert_eq!(kib(status, "VmRSS"), Some(1024));
        assert_eq!(kib(status, "VmHWM"), Some(2048));
        assert_eq!(kib(status, "Vm"), None);
    }
}
