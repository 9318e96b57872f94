//! The agent: one per cluster; carries bindings out, reports, hands tables to the nodes.
//!
//! ```text
//!  leads <--- lead.rs ---.                      .--- door.rs <--- NetManagers
//!                        +--> engine.rs <------'
//!                        |    cluster.rs  state, no I/O: reconcile.rs, report.rs, nodes.rs, room.rs, load.rs, smooth.rs
//!                        |    store.rs    what outlives a restart
//!                        '--> driver.rs   runs the instances
//! ```
//!
//! What it finds around it comes over three seams, which a simulation fills otherwise: [`lead::Lines`] to the leads,
//! [`store::Shelf`] for what is kept, [`driver::Driver`] for the instances. Its clock is tokio's.
//!
//! `join.rs` makes a machine an agent by a token, and `renewal.rs` renews the certificate that it got.
//!
//! With no lead and no node in reach it goes on with what it has (I5), also after a restart. It does not place
//! among clusters and does not know the Knowledge Base.
#![forbid(unsafe_code)]

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Instant};

use netmanager_api::{
    conditions::Conditions,
    identity::{Credentials, Identity, IdentityError, Role},
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

pub use crate::command::{Args, CommandError, run};
use crate::{
    cluster::Cluster,
    config::Config,
    door::Door,
    driver::Driver,
    engine::Engine,
    lead::{LeadClient, Lines, Outbox, TlsLines},
    renewal::Renewal,
    store::{Folder, Shelf, Store, StoreError},
};

pub mod cluster;
mod command;
pub mod config;
pub mod door;
pub mod driver;
pub mod engine;
pub mod event;
pub mod join;
pub mod lead;
pub mod load;
pub mod nodes;
pub mod reconcile;
mod renewal;
pub mod report;
mod request;
pub mod room;
pub mod smooth;
pub mod store;

/// How many events of the streams wait for the engine.
const EVENTS: usize = 256;

/// Why the agent cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The credentials do not serve.
    #[error("the credentials do not serve")]
    Credentials(#[source] IdentityError),
    /// The credentials are somebody else's.
    #[error(
        "the certificate says {found}, and cluster {cluster:?} needs role agent: issue one with weft cert --role \
         agent --name {cluster}"
    )]
    Role {
        /// Who the certificate names.
        found: Identity,
        /// The cluster of the configuration.
        cluster: String,
    },
    /// The kept state does not serve.
    #[error("the state does not serve")]
    Store(#[from] StoreError),
    /// The node door failed.
    #[error("the node door failed")]
    Door(#[source] tonic::transport::Error),
}

/// An agent with all that it needs.
#[derive(Debug)]
pub struct Agent<D> {
    /// The configuration.
    pub config: Config,
    /// Who it is.
    pub credentials: Credentials,
    /// Where the leads are.
    pub leads: Vec<SocketAddr>,
    /// The node door.
    pub listener: TcpListener,
    /// What outlives a restart.
    pub state: Option<PathBuf>,
    /// What runs the instances.
    pub driver: D,
}

impl<D: Driver> Agent<D> {
    /// Works until `shutdown`.
    ///
    /// # Errors
    /// When the credentials are not this cluster's, the state cannot be read, or the node door fails.
    pub async fn serve(self, shutdown: CancellationToken) -> Result<(), AgentError> {
        let identity = self.credentials.identity.clone();
        let cluster = self.config.cluster.clone();
        if !matches!(&identity.role, Role::Agent { cluster: named } if *named == cluster) {
            return Err(AgentError::Role {
                found: identity,
                cluster,
            });
        }
        let server = self.credentials.server(&[b"h2"]);
        let server = server.map_err(AgentError::Credentials)?;
        let client = self
            .credentials
            .client(&[b"h2"], |role| matches!(role, Role::Lead { .. }))
            .map_err(AgentError::Credentials)?;
        let now = now();
        let owner = identity.to_string();
        let shelf = self
            .state
            .map(|dir| Arc::new(Folder(dir)) as Arc<dyn Shelf>);
        let (store, writer, kept) = Store::open(shelf, &owner, now)?;
        let capacity = self.config.capacity();
        let (event, events) = mpsc::channel(EVENTS);
        let (outbox, outgoing) = watch::channel(Outbox::default());
        let (conditions, telling) = watch::channel(Conditions::default());
        let revoked = self.credentials.revoked();
        if let Some(orders) = &kept.charge.orders {
            revoked.set(orders.revoked.clone());
        }
        let nodes = capacity.keys().cloned().collect();
        let door = Door::new(identity, nodes, event.clone(), revoked.clone());
        let credentials = Arc::new(self.credentials);
        let lines: Arc<dyn Lines> = Arc::new(TlsLines {
            tls: client,
            revoked: revoked.clone(),
        });
        let renewal = Renewal {
            credentials: credentials.clone(),
            leads: self.leads.clone(),
            lines: lines.clone(),
        };
        let leads = LeadClient {
            leads: self.leads,
            lines,
            cluster,
            facts: self.config.facts,
            outbox: outgoing,
            conditions: telling,
            events: event,
        };
        let engine = Engine {
            cluster: Cluster::new(capacity, kept, now),
            driver: self.driver,
            store,
            events,
            outbox,
            conditions,
            revoked,
        };
        let end = shutdown.child_token();
        let mut tasks = JoinSet::new();
        let ends = end.clone();
        tasks.spawn(finish(async move {
            ends.run_until_cancelled(renewal.run()).await;
        }));
        let (following, ends) = (credentials.follow(), end.clone());
        tasks.spawn(finish(async move {
            ends.run_until_cancelled(following).await;
        }));
        tasks.spawn(finish(leads.run(end.clone())));
        tasks.spawn(finish(engine.run(end.clone())));
        let serving = door.serve(self.listener, server, end.clone());
        tasks.spawn(async { serving.await.map_err(AgentError::Door) });
        // The writer ends when the engine has dropped the store: nothing that was kept is lost.
        let writing = tokio::spawn(writer.run());
        let mut outcome = Ok(());
        while let Some(ended) = tasks.join_next().await {
            end.cancel(); // One part without the others is no agent.
            match ended {
                Ok(result) => outcome = outcome.and(result),
                Err(error) => tracing::error!(%error, "a task of the agent panicked"),
            }
        }
        if let Err(error) = writing.await {
            tracing::error!(%error, "the writer of the state panicked");
        }
        outcome
    }
}

/// The time by tokio's clock: a stopped one stops the agent too.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

async fn finish(task: impl Future<Output = ()>) -> Result<(), AgentError> {
    task.await;
    Ok(())
}
