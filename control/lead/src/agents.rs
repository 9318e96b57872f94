//! The door for agents: one stream per cluster, on whatever lead the agent dialled.
//!
//! ```text
//!  Hello --> register (log) --> Welcome
//!     |-- Report --> newest only --> log, when it changed or the last one gets old
//!     |-- Alive  --> newest only --> the leader's leases --> Renewed
//!     |-- Conditions --> newest only --> the leader's board --> Conditions of the mesh
//!     '-- the replica changes    --> what is new of Assignments and Tables
//! ```
//!
//! A stream ends when its session does (the cluster was lost, or its agent came back on another lead), and when this
//! lead is out of touch with the others; the agent dials again. While there is no leader reports and renewals wait,
//! and nothing is withdrawn.

use std::{
    hash::{BuildHasher, RandomState},
    sync::Arc,
    time::Duration,
};

use control_api::stream::{FromAgent, Hello, ToAgent, Welcome, lead_door_server::LeadDoor};
use control_core::{
    base::{ClusterState, KnowledgeBase},
    command::{Command, Outcome, Refusal},
    name::Name,
    report::Report,
};
use netmanager_api::{
    conditions::{Concern, Conditions},
    identity::{Identity, Role, Shown},
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    claims, joins,
    lead::{Answer, Ask, AskError, Lead},
    raft::propose::ProposeError,
    tables::{Sent, news},
};

/// How long an agent may take to say hello.
const HELLO: Duration = Duration::from_secs(10);
/// Messages that wait for a slow agent.
const QUEUE: usize = 16;
/// A report that says the same is logged again after this, so that it does not look stale.
const REFRESH: Duration = Duration::from_secs(8);
/// How many refused claims of one report are named in the log.
const CLAIMS: usize = 10;
/// How long what is refused because disks are full waits.
const NO_ROOM: Duration = Duration::from_secs(1);
/// Changes within this time are sent together.
const COALESCE: Duration = Duration::from_millis(20);
/// Sessions are random numbers below 2^53, so that every JSON reader keeps them exact.
const SESSION_BITS: u32 = 53;

/// The door for agents.
#[derive(Clone, Debug)]
pub(crate) struct AgentDoor {
    pub(crate) lead: Arc<Lead>,
    pub(crate) tasks: TaskTracker,
    pub(crate) shutdown: CancellationToken,
}

type Sender = mpsc::Sender<Result<ToAgent, Status>>;

#[tonic::async_trait]
impl LeadDoor for AgentDoor {
    type FollowStream = ReceiverStream<Result<ToAgent, Status>>;

    async fn follow(
        &self,
        request: Request<Streaming<FromAgent>>,
    ) -> Result<Response<Self::FollowStream>, Status> {
        let cluster = cluster_of(request.extensions().get::<Identity>())?;
        let shown = request.extensions().get::<Arc<Shown>>();
        let certificate_ends_ms = shown.map(|shown| shown.expires_ms);
        let inbound = request.into_inner();
        let (outbound, messages) = mpsc::channel(QUEUE);
        let (lead, shutdown) = (self.lead.clone(), self.shutdown.clone());
        self.tasks.spawn(async move {
            let ended = tokio::select! {
                ended = session(&lead, &cluster, certificate_ends_ms, inbound, outbound.clone()) => ended,
                () = shutdown.cancelled() => Err(Status::unavailable("the lead is stopping")),
                () = lead.out_of_touch() => Err(Status::unavailable(
                    "this lead is out of touch with the others: another may not be",
                )),
            };
            if let Err(status) = ended {
                tracing::info!(%cluster, reason = status.message(), "an agent's stream ended");
                // The agent may be gone already.
                let _ = outbound.try_send(Err(status));
            }
        });
        Ok(Response::new(ReceiverStream::new(messages)))
    }
}

pub(crate) fn cluster_of(identity: Option<&Identity>) -> Result<Name, Status> {
    match identity.map(|identity| &identity.role) {
        Some(Role::Agent { cluster }) => {
            cluster
                .parse()
                .map_err(|error: control_core::name::NameError| {
                    Status::permission_denied(error.to_string())
                })
        }
        _ => Err(Status::permission_denied("only an agent may follow")),
    }
}

pub(crate) fn unavailable(error: AskError) -> Status {
    match error {
        AskError::SessionOver { .. } => Status::aborted(error.to_string()),
        AskError::Propose(ProposeError::NoRoom(_)) => Status::resource_exhausted(error.to_string()),
        _ => Status::unavailable(error.to_string()),
    }
}

fn refused(refusal: Refusal) -> Status {
    match refusal {
        Refusal::StaleSession { .. } | Refusal::ClusterLost(_) | Refusal::UnknownCluster(_) => {
            Status::aborted(refusal.to_string())
        }
        _ => Status::failed_precondition(refusal.to_string()),
    }
}

/// One agent's stream, until it ends.
async fn session(
    lead: &Lead,
    cluster: &Name,
    certificate_ends_ms: Option<u64>,
    mut inbound: Streaming<FromAgent>,
    outbound: Sender,
) -> Result<(), Status> {
    let first = timeout(HELLO, inbound.message());
    let first = first
        .await
        .map_err(|_| Status::deadline_exceeded("no hello"))?;
    let Some(FromAgent::Hello(hello)) = first? else {
        return Err(Status::invalid_argument(
            "the first message must be a hello",
        ));
    };
    if hello.cluster != cluster.as_str() {
        return Err(Status::permission_denied(format!(
            "the certificate is of cluster {cluster}, the hello of {:?}",
            hello.cluster
        )));
    }
    let welcome = register(lead, cluster, hello).await?;
    let session = welcome.session;
    tracing::info!(%cluster, session, "an agent is connected");
    send(&outbound, ToAgent::Welcome(welcome)).await?;
    if let Some(ends_ms) = certificate_ends_ms {
        note_certificate(lead, cluster, ends_ms).await;
    }
    let (reports, newest_report) = watch::channel(None);
    let (alive, newest_alive) = watch::channel(None);
    let (conditions, newest_conditions) = watch::channel(Conditions::default());
    let (concerned, concern) = watch::channel(Concern::default());
    let heard = Heard {
        reports,
        alive,
        conditions,
    };
    let exchange = Exchange {
        lead,
        cluster,
        session,
        concern,
    };
    tokio::select! {
        ended = listen(inbound, heard) => ended,
        ended = exchange.run(newest_conditions, &outbound) => ended,
        ended = report(lead, cluster, session, newest_report) => ended,
        ended = renew(lead, cluster, session, newest_alive, &outbound) => ended,
        ended = push(lead, cluster, &outbound, &concerned) => ended,
    }
}

async fn send(outbound: &Sender, message: ToAgent) -> Result<(), Status> {
    let gone = |_| Status::cancelled("the agent is gone");
    outbound.send(Ok(message)).await.map_err(gone)
}

/// Continues the session that the agent had, or begins a new one.
async fn register(lead: &Lead, cluster: &Name, hello: Hello) -> Result<Welcome, Status> {
    lead.catch_up().await.map_err(unavailable)?;
    let now_ms = lead.clock.now_ms();
    let admits = |base: &KnowledgeBase| base.admits(cluster, hello.session, now_ms);
    if !lead.replica.read(admits) {
        return Err(Status::unavailable(format!(
            "cluster {cluster} has an agent, which is not this one: where it is no more, wait until its lease is over; an \
             agent that is started again goes on at once with its --state"
        )));
    }
    let continued = lead.replica.read(|base| {
        let known = base.clusters.get(cluster)?;
        let same = hello.session == Some(known.session)
            && known.state == ClusterState::Ready
            && known.facts == hello.facts;
        same.then_some(known.session)
    });
    let session = match continued {
        Some(session) => session,
        None => {
            let session = new_session();
            let command = Command::RegisterCluster {
                cluster: cluster.clone(),
                session,
                facts: Box::new(hello.facts),
            };
            let index = commit(lead, command).await?;
            // What follows reads this lead's own replica.
            lead.replica.reach(index, HELLO).await;
            session
        }
    };
    let ask = Ask::Renew {
        cluster: cluster.clone(),
        session,
    };
    lead.ask(ask).await.map_err(unavailable)?;
    let lease_ms = lead
        .replica
        .read(|base| base.mesh.as_ref().map_or(0, |mesh| mesh.lease_ms));
    Ok(Welcome { session, lease_ms })
}

/// Lets everybody see when the certificate ends that an agent has shown.
async fn note_certificate(lead: &Lead, cluster: &Name, ends_ms: u64) {
    let is_new = lead.replica.read(|base| {
        let known = base.clusters.get(cluster);
        base.level >= joins::LEVEL
            && known.is_some_and(|known| known.certificate_ends_ms != Some(ends_ms))
    });
    if !is_new {
        return;
    }
    let command = Command::NoteCertificate {
        cluster: cluster.clone(),
        ends_ms,
    };
    if let Err(status) = commit(lead, command).await {
        // The next stream says it again.
        tracing::debug!(%cluster, reason = status.message(), "the end of a certificate is not noted");
    }
}

/// A number that no session had. Who shows it shows a certificate, too, so nobody gains by guessing it.
fn new_session() -> u64 {
    RandomState::new().hash_one(0) >> (u64::BITS - SESSION_BITS)
}

/// Commits one command; its index.
async fn commit(lead: &Lead, command: Command) -> Result<u64, Status> {
    let done = lead.propose(vec![command]).await.map_err(unavailable)?;
    let refusal = done.outcomes.into_iter().find_map(Outcome::err);
    match refusal {
        None => Ok(done.index),
        Some(refusal) => Err(refused(refusal)),
    }
}

/// The newest of each kind.
struct Heard {
    reports: watch::Sender<Option<Report>>,
    alive: watch::Sender<Option<u64>>,
    conditions: watch::Sender<Conditions>,
}

/// Reads the agent's messages; the newest of each kind counts.
async fn listen(mut inbound: Streaming<FromAgent>, heard: Heard) -> Result<(), Status> {
    while let Some(message) = inbound.message().await? {
        match message {
            FromAgent::Hello(_) => {
                return Err(Status::invalid_argument("a second hello on one stream"));
            }
            FromAgent::Report(report) => {
                heard.reports.send_replace(Some(report));
            }
            FromAgent::Alive { sequence } => {
                heard.alive.send_replace(Some(sequence));
            }
            FromAgent::Conditions(conditions) => {
                heard.conditions.send_replace(conditions);
            }
        }
    }
    Ok(())
}

/// Brings the newest report into the log.
async fn report(
    lead: &Lead,
    cluster: &Name,
    session: u64,
    mut newest: watch::Receiver<Option<Report>>,
) -> Result<(), Status> {
    let mut last: Option<(Report, Instant)> = None;
    while newest.changed().await.is_ok() {
        let Some(said) = newest.borrow_and_update().clone() else {
            continue;
        };
        let known = last
            .as_ref()
            .is_some_and(|(last, at)| *last == said && at.elapsed() < REFRESH);
        if known {
            continue;
        }
        let mut report = said.clone();
        if report.nodes.len() > claims::NODES {
            return Err(Status::invalid_argument(format!(
                "{} nodes: a cluster has at most {}",
                report.nodes.len(),
                claims::NODES
            )));
        }
        let confined = |base: &KnowledgeBase| claims::confine(base, cluster, &mut report);
        let claims = lead.replica.read(confined);
        for claim in claims.iter().take(CLAIMS) {
            tracing::warn!(%cluster, claim, "refused a claim");
        }
        if claims.len() > CLAIMS {
            let more = claims.len() - CLAIMS;
            tracing::warn!(%cluster, more, "refused more claims of the same report");
        }
        let command = Command::Report {
            cluster: cluster.clone(),
            session,
            report: Box::new(report),
        };
        match commit(lead, command).await {
            Ok(_) => last = Some((said, Instant::now())),
            Err(status) if status.code() == tonic::Code::Unavailable => {
                tracing::warn!(%cluster, reason = status.message(), "a report waits");
                newest.mark_changed();
            }
            // The agent stays, and its lease with it: it need not come back when there is room.
            Err(status) if status.code() == tonic::Code::ResourceExhausted => {
                tracing::debug!(%cluster, reason = status.message(), "a report waits");
                tokio::time::sleep(NO_ROOM).await;
                newest.mark_changed();
            }
            Err(status) => return Err(status),
        }
    }
    Ok(())
}

/// Brings the newest sign of life to the leader.
async fn renew(
    lead: &Lead,
    cluster: &Name,
    session: u64,
    mut newest: watch::Receiver<Option<u64>>,
    outbound: &Sender,
) -> Result<(), Status> {
    while newest.changed().await.is_ok() {
        let Some(sequence) = *newest.borrow_and_update() else {
            continue;
        };
        let ask = Ask::Renew {
            cluster: cluster.clone(),
            session,
        };
        match lead.ask(ask).await {
            Ok(Answer::Renewed) => send(outbound, ToAgent::Renewed { sequence }).await?,
            Err(error @ AskError::SessionOver { .. }) => return Err(unavailable(error)),
            // The agent sees that nobody answers; its next Alive is tried again.
            Ok(_) => {}
            Err(error) => tracing::warn!(%cluster, %error, "a renewal was not counted"),
        }
    }
    Ok(())
}

/// Brings an agent's conditions to the leader's board, and what stands there to the agent.
struct Exchange<'a> {
    lead: &'a Lead,
    cluster: &'a Name,
    session: u64,
    /// What the cluster's tables name.
    concern: watch::Receiver<Concern>,
}

impl Exchange<'_> {
    async fn run(
        self,
        mut newest: watch::Receiver<Conditions>,
        outbound: &Sender,
    ) -> Result<(), Status> {
        while newest.changed().await.is_ok() {
            let conditions = newest.borrow_and_update().clone();
            let ask = Ask::Exchange {
                cluster: self.cluster.clone(),
                session: self.session,
                conditions,
            };
            match self.lead.ask(ask).await {
                Ok(Answer::Conditions(all)) => {
                    let concerning = all.of(&self.concern.borrow());
                    send(outbound, ToAgent::Conditions(concerning)).await?;
                }
                Err(error @ AskError::SessionOver { .. }) => return Err(unavailable(error)),
                // The agent repeats itself; meanwhile its nodes go on with what they have.
                Ok(_) => {}
                Err(error) => {
                    tracing::debug!(cluster = %self.cluster, %error, "no conditions");
                }
            }
        }
        Ok(())
    }
}

/// Sends what is new, whenever the replica changes.
async fn push(
    lead: &Lead,
    cluster: &Name,
    outbound: &Sender,
    concerned: &watch::Sender<Concern>,
) -> Result<(), Status> {
    let mut applied = lead.replica.watch();
    let mut sent = Sent::default();
    loop {
        applied.mark_unchanged();
        let messages = lead.replica.read(|base| news(base, cluster, &mut sent));
        if messages.iter().any(|it| matches!(it, ToAgent::Tables(_))) {
            concerned.send_replace(sent.concern());
        }
        for message in messages {
            send(outbound, message).await?;
        }
        let ended = |_| Status::unavailable("the lead is stopping");
        applied.changed().await.map_err(ended)?;
        tokio::time::sleep(COALESCE).await;
    }
}
