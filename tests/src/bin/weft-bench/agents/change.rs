//! One endpoint's change: who is told of it, and when.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};

use super::{
    agent::{Agent, Change, News},
    shape::{Service, Shape},
};

/// How long a change may take.
const LIMIT: Duration = Duration::from_secs(60);
/// How long it is watched afterwards who else is told something; the leads put changes of 20 ms together.
const AFTER: Duration = Duration::from_millis(250);

/// What came of a change.
#[derive(Clone, Copy, Debug)]
pub(super) struct Told {
    /// From the report until the last concerned node's table was with its agent.
    pub(super) time: Duration,
    /// Agents that were sent something and that it does not concern.
    pub(super) agents: usize,
    /// Tables of nodes that were sent and that it does not concern.
    pub(super) tables: usize,
}

/// The nodes that must be told, by cluster.
type Concerned = BTreeMap<usize, BTreeSet<String>>;

/// Changes endpoints, and hears of what is sent.
#[derive(Debug)]
pub(super) struct Changes {
    pub(super) change: watch::Sender<Option<Arc<Change>>>,
    pub(super) news: mpsc::UnboundedReceiver<News>,
}

impl Changes {
    /// One change, and its end.
    pub(super) async fn one(
        &mut self,
        (shape, turn): (&Shape, usize),
        agents: &[Agent],
    ) -> Result<Told> {
        let (service, instance) = shape.changed(turn);
        let concerned = concerned(shape, agents, service);
        while self.news.try_recv().is_ok() {}
        let started = Instant::now();
        let changing = &agents[service.cluster];
        changing.change(&service.name(), instance, &self.change)?;
        let mut watched = Watched::new(&concerned);
        while !watched.missing.is_empty() {
            let news = timeout(LIMIT, self.news.recv()).await;
            let Ok(news) = news else {
                bail!(
                    "{}#{instance} changed {LIMIT:?} ago, and these were not told: {:?}",
                    service.name(),
                    watched.missing
                );
            };
            watched.take(&news.context("the agents have ended")?);
        }
        let time = watched.last.map_or(Duration::ZERO, |last| last - started);
        let end = tokio::time::Instant::now() + AFTER;
        while let Ok(Some(news)) = tokio::time::timeout_at(end, self.news.recv()).await {
            watched.take(&news);
        }
        Ok(Told {
            time,
            agents: watched.agents.len(),
            tables: watched.tables,
        })
    }

    /// Waits until nobody was sent anything for so long.
    pub(super) async fn rest(&mut self, quiet: Duration, limit: Duration) -> Result<()> {
        let rest = async {
            while let Ok(news) = timeout(quiet, self.news.recv()).await {
                news.context("the agents have ended")?;
            }
            anyhow::Ok(())
        };
        let rested = timeout(limit, rest).await;
        rested.with_context(|| format!("tables and orders are still sent after {limit:?}"))?
    }
}

/// The nodes that run something that calls `service`.
fn concerned(shape: &Shape, agents: &[Agent], service: Service) -> Concerned {
    let mut concerned = Concerned::new();
    for caller in shape.callers(service) {
        let nodes = agents[caller.cluster].nodes_of(&caller.name());
        concerned.entry(caller.cluster).or_default().extend(nodes);
    }
    concerned
}

struct Watched<'a> {
    concerned: &'a Concerned,
    missing: BTreeSet<(usize, String)>,
    last: Option<Instant>,
    agents: BTreeSet<usize>,
    tables: usize,
}

impl<'a> Watched<'a> {
    fn new(concerned: &'a Concerned) -> Self {
        let of = |(cluster, nodes): (&usize, &BTreeSet<String>)| {
            let cluster = *cluster;
            let nodes: Vec<_> = nodes.iter().map(|it| (cluster, it.clone())).collect();
            nodes
        };
        Self {
            missing: concerned.iter().flat_map(of).collect(),
            concerned,
            last: None,
            agents: BTreeSet::new(),
            tables: 0,
        }
    }

    fn take(&mut self, news: &News) {
        let Some(nodes) = self.concerned.get(&news.cluster) else {
            self.agents.insert(news.cluster);
            self.tables += news.nodes.len();
            return;
        };
        self.tables += news.nodes.difference(nodes).count();
        for node in &news.told {
            if self.missing.remove(&(news.cluster, node.clone())) {
                self.last = self.last.max(Some(news.at));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(nodes: &[&str]) -> BTreeSet<String> {
        nodes.iter().map(|node| (*node).to_owned()).collect()
    }

    #[test]
    fn who_is_not_concerned_counts_and_who_is_must_all_be_told() {
        let start = Instant::now();
        let news = |cluster, nodes: &[&str], told: &[&str], ms| News {
            cluster,
            at: start + Duration::from_millis(ms),
            nodes: set(nodes),
            told: set(told),
        };
        let concerned = BTreeMap::from([(1, set(&["n0", "n1"])), (2, set(&["n0"]))]);
        let mut watched = Watched::new(&concerned);
        watched.take(&news(1, &["n0", "n1"], &["n0"], 5));
        watched.take(&news(2, &["n0"], &["n0"], 90));
        assert_eq!(watched.missing.len(), 1);
        watched.take(&news(1, &["n1", "n2"], &["n1", "n2"], 40));
        assert!(watched.missing.is_empty());
        // The same once more, and orders to somebody whom it does not concern.
        watched.take(&news(1, &["n0"], &["n0"], 400));
        watched.take(&news(3, &[], &[], 50));
        assert_eq!(watched.last, Some(start + Duration::from_millis(90)));
        assert_eq!((watched.tables, watched.agents.len()), (1, 1));
    }
}
