//! A simulated agent: the stream is `weft agent`'s own ([`LeadClient`]), the cluster behind it is simulated.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use anyhow::{Context, Result};
use netmanager_api::{
    identity::{Credentials, RevokedList, Role},
    table::Table,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use weft_agent::{
    event::Event,
    lead::{LeadClient, Outbox, TlsLines},
};

use super::{cluster::Cluster, shape::cluster_name};

/// How many messages of a stream wait for its cluster.
const EVENTS: usize = 64;

/// An instance's new endpoint, which tables will show.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) service: String,
    pub(super) addr6: std::net::Ipv6Addr,
}

/// What an agent was sent beside answers to what it said.
#[derive(Debug)]
pub(super) struct News {
    pub(super) cluster: usize,
    pub(super) at: Instant,
    /// The nodes whose tables came, and of them those whose show the change.
    pub(super) nodes: BTreeSet<String>,
    pub(super) told: BTreeSet<String>,
}

/// One agent; its tasks are in the set that it was started with.
#[derive(Debug)]
pub(super) struct Agent {
    cluster: Arc<Mutex<Cluster>>,
    outbox: Arc<watch::Sender<Outbox>>,
    welcomes: watch::Receiver<Welcomes>,
}

/// Whether a stream is up.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Welcomes {
    /// How often one ended.
    pub(super) parted: usize,
    /// Since when one is welcomed; none now.
    pub(super) up_since: Option<Instant>,
}

/// What all agents share.
#[derive(Clone, Debug)]
pub(super) struct Common {
    pub(super) leads: Vec<SocketAddr>,
    pub(super) change: watch::Receiver<Option<Arc<Change>>>,
    pub(super) news: mpsc::UnboundedSender<News>,
    pub(super) shutdown: CancellationToken,
}

impl Agent {
    /// Starts cluster `number` of so many nodes.
    pub(super) fn start(
        (number, nodes): (usize, usize),
        credentials: &Path,
        common: Common,
        tasks: &mut JoinSet<()>,
    ) -> Result<Self> {
        let credentials = Credentials::load(credentials)?;
        let tls = credentials.client(&[b"h2"], |role| matches!(role, Role::Lead { .. }))?;
        let (outbox, said) = watch::channel(Outbox::default());
        let (events, heard) = mpsc::channel(EVENTS);
        let (welcomed, welcomes) = watch::channel(Welcomes::default());
        let (unmeasured, conditions) = watch::channel(Default::default());
        let client = LeadClient {
            leads: common.leads.clone(),
            lines: Arc::new(TlsLines {
                tls,
                revoked: RevokedList::default(),
            }),
            cluster: cluster_name(number),
            facts: Cluster::facts(number),
            outbox: said,
            conditions,
            events,
        };
        let agent = Self {
            cluster: Arc::new(Mutex::new(Cluster::new(number, nodes))),
            outbox: Arc::new(outbox),
            welcomes,
        };
        let mut heart = Heart {
            number,
            cluster: agent.cluster.clone(),
            outbox: agent.outbox.clone(),
            welcomed,
            change: common.change,
            news: common.news,
        };
        heart.publish(None);
        tasks.spawn(async move {
            // Nobody measures here; the client ends where this is closed.
            let _unmeasured = unmeasured;
            client.run(common.shutdown).await;
        });
        tasks.spawn(async move { heart.beat(heard).await });
        Ok(agent)
    }

    fn cluster(&self) -> MutexGuard<'_, Cluster> {
        lock(&self.cluster)
    }

    /// Gives an instance another endpoint and reports it; `told` hears of it first, so that nothing is sent before.
    pub(super) fn change(
        &self,
        service: &str,
        instance: u32,
        told: &watch::Sender<Option<Arc<Change>>>,
    ) -> Result<()> {
        let addr6 = self.cluster().attach_anew(service, instance)?;
        told.send_replace(Some(Arc::new(Change {
            service: service.to_owned(),
            addr6,
        })));
        publish(&self.outbox, &self.cluster, None);
        Ok(())
    }

    pub(super) fn attached(&self) -> usize {
        self.cluster().attached()
    }

    pub(super) fn nodes_of(&self, service: &str) -> BTreeSet<String> {
        self.cluster().nodes_of(service)
    }

    pub(super) fn welcomes(&self) -> Welcomes {
        *self.welcomes.borrow()
    }

    /// Waits until a stream is up.
    pub(super) async fn is_up(&self) -> Result<Welcomes> {
        let mut welcomes = self.welcomes.clone();
        let up = welcomes.wait_for(|it| it.up_since.is_some()).await;
        up.map(|it| *it).context("the agent has ended")
    }
}

fn lock(cluster: &Mutex<Cluster>) -> MutexGuard<'_, Cluster> {
    cluster.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says anew how things stand, in `session` where there is another.
fn publish(outbox: &watch::Sender<Outbox>, cluster: &Mutex<Cluster>, session: Option<u64>) {
    outbox.send_modify(|outbox| {
        let cluster = lock(cluster);
        outbox.report = Some(Arc::new(cluster.report()));
        outbox.revision = cluster.revision;
        outbox.session = session.or(outbox.session);
    });
}

/// What takes an agent's messages.
#[derive(Debug)]
struct Heart {
    number: usize,
    cluster: Arc<Mutex<Cluster>>,
    outbox: Arc<watch::Sender<Outbox>>,
    welcomed: watch::Sender<Welcomes>,
    change: watch::Receiver<Option<Arc<Change>>>,
    news: mpsc::UnboundedSender<News>,
}

impl Heart {
    async fn beat(&mut self, mut events: mpsc::Receiver<Event>) {
        while let Some(event) = events.recv().await {
            let mut says_something = self.take(event);
            // One report for many messages, as the agent does it.
            while let Ok(event) = events.try_recv() {
                says_something |= self.take(event);
            }
            if says_something {
                self.publish(None);
            }
        }
    }

    /// Takes a message; whether there is something to say to it.
    fn take(&mut self, event: Event) -> bool {
        match event {
            Event::Welcomed { welcome, .. } => {
                self.publish(Some(welcome.session));
                self.welcomed
                    .send_modify(|it| it.up_since = Some(Instant::now()));
                false
            }
            Event::Parted => {
                self.welcomed.send_modify(|it| {
                    it.parted += 1;
                    it.up_since = None;
                });
                false
            }
            Event::Ordered(orders) => {
                self.tell(&BTreeMap::new());
                lock(&self.cluster).order(&orders);
                true
            }
            Event::Tabled(tables) => {
                self.tell(&tables);
                lock(&self.cluster).tabled(&tables);
                true
            }
            _ => false,
        }
    }

    fn tell(&self, tables: &BTreeMap<String, Table>) {
        let at = Instant::now();
        let change = self.change.borrow().clone();
        let shows = |table: &Table| {
            change.as_ref().is_some_and(|change| {
                let mut services = table.services.iter();
                let service = services.find(|service| service.name == change.service);
                service.is_some_and(|service| {
                    let mut backends = service.backends.iter();
                    backends.any(|backend| backend.addr6 == change.addr6)
                })
            })
        };
        let told = tables.iter().filter(|(_, table)| shows(table));
        let news = News {
            cluster: self.number,
            at,
            told: told.map(|(node, _)| node.clone()).collect(),
            nodes: tables.keys().cloned().collect(),
        };
        // Whoever measures may be gone already.
        let _ = self.news.send(news);
    }

    fn publish(&self, session: Option<u64>) {
        publish(&self.outbox, &self.cluster, session);
    }
}
