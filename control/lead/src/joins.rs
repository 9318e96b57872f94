//! Clusters that join by a token, and agents whose certificates are renewed.
//!
//! ```text
//!  JoinRequest{cluster, secret, request} --> the token counts? --> sign --> Join in the log --> what stands there is the answer
//!  RenewRequest{request}, by certificate ----------------------> sign --> Renew in the log -> the answer
//! ```
//!
//! A certificate is given away when the log has it, and not before: of two requests with one token one wins, and what the
//! log refuses nobody ever sees.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use control_api::join::{
    Certificate, JoinRequest, Joined, RenewRequest, join_door_server::JoinDoor,
    renew_door_server::RenewDoor,
};
use control_core::{
    command::{Command, Outcome, Refusal},
    invitation::{Join, Renewal},
    name::Name,
};
use netmanager_api::identity::{Identity, Role, Shown, fingerprint};
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use crate::{
    agents::{cluster_of, unavailable},
    authority::issuer::{IssueError, Issued, Issuer, request_print},
    door::Peer,
    lead::Lead,
    once,
};

/// The feature level that knows joins.
pub(crate) const LEVEL: u32 = 4;
/// How long what was proposed may take to be seen here.
const FOLLOW: Duration = Duration::from_secs(5);
/// How often a cluster's certificate is renewed at most, by one lead.
const RENEWS: Duration = Duration::from_secs(10);

/// What is asked by who has no certificate.
#[derive(Clone, Debug)]
pub(crate) struct Joins(pub(crate) Arc<Lead>);

#[tonic::async_trait]
impl JoinDoor for Joins {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<Joined>, Status> {
        let peer = request.extensions().get::<Peer>().copied();
        let said = request.into_inner();
        let joined = join(&self.0, &said).await;
        match &joined {
            Ok(_) => tracing::info!(?peer, cluster = said.cluster, "a cluster joins"),
            Err(status) => {
                let why = status.message();
                tracing::warn!(?peer, cluster = ?said.cluster, why, "refused to let a cluster join");
            }
        }
        joined.map(Response::new)
    }
}

async fn join(lead: &Lead, said: &JoinRequest) -> Result<Joined, Status> {
    let cluster: Name = said
        .cluster
        .parse()
        .map_err(|error: control_core::name::NameError| {
            Status::invalid_argument(error.to_string())
        })?;
    check_level(lead)?;
    let (hash, request) = (
        fingerprint(said.secret.as_bytes()),
        request_print(&said.request),
    );
    let answered = || {
        let now_ms = lead.clock.now_ms();
        lead.replica.read(|base| {
            let used = base.may_join(&cluster, &hash, &request, now_ms)?;
            Ok::<_, Refusal>(used.map(|used| used.chain.clone()))
        })
    };
    let known = match answered() {
        Ok(known) => known,
        // It may have been made, used or freed a moment ago.
        Err(_) => {
            lead.catch_up().await.map_err(unavailable)?;
            answered().map_err(refused)?
        }
    };
    let issuer = issuer(lead)?;
    let chain = match known {
        Some(chain) => chain,
        None => {
            let issued = issue(lead, issuer, &cluster, &said.request)?;
            let join = Join {
                cluster: cluster.clone(),
                hash: hash.clone(),
                request: request.clone(),
                chain: issued.chain,
                issued_ms: issued.shown.issued_ms,
            };
            commit(lead, &cluster, Command::Join(Box::new(join))).await?;
            let recorded = answered().map_err(refused)?;
            recorded.ok_or_else(|| Status::unavailable("this lead lags behind the leader"))?
        }
    };
    let authorities = issuer.authorities().map_err(unsigned)?;
    Ok(Joined { chain, authorities })
}

/// What is asked by agents, with the certificate that ends.
#[derive(Clone, Debug)]
pub(crate) struct Renewals {
    lead: Arc<Lead>,
    /// When each cluster's was renewed last.
    last: Arc<Mutex<BTreeMap<Name, Instant>>>,
}

impl Renewals {
    pub(crate) fn new(lead: Arc<Lead>) -> Self {
        Self {
            lead,
            last: Arc::default(),
        }
    }

    /// Whether a cluster may ask again already; counts as asked.
    fn may_ask(&self, cluster: &Name) -> bool {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.retain(|_, at| at.elapsed() < RENEWS);
        let is_first = !last.contains_key(cluster);
        last.entry(cluster.clone()).or_insert_with(Instant::now);
        is_first
    }
}

#[tonic::async_trait]
impl RenewDoor for Renewals {
    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<Certificate>, Status> {
        let cluster = cluster_of(request.extensions().get::<Identity>())?;
        let shown = request.extensions().get::<Arc<Shown>>().cloned();
        let shown = shown.ok_or_else(|| Status::permission_denied("no certificate was shown"))?;
        if !self.may_ask(&cluster) {
            return Err(Status::resource_exhausted(format!(
                "cluster {cluster} has asked a moment ago"
            )));
        }
        let renewed = renew(&self.lead, &cluster, &shown, &request.into_inner()).await;
        match &renewed {
            Ok(_) => tracing::info!(%cluster, "a certificate is renewed"),
            Err(status) => {
                let why = status.message();
                tracing::warn!(%cluster, why, "a certificate is not renewed");
            }
        }
        renewed.map(Response::new)
    }
}

async fn renew(
    lead: &Lead,
    cluster: &Name,
    shown: &Shown,
    said: &RenewRequest,
) -> Result<Certificate, Status> {
    check_level(lead)?;
    let issued = issue(lead, issuer(lead)?, cluster, &said.request)?;
    let renewal = Renewal {
        cluster: cluster.clone(),
        shown: shown.fingerprint.clone(),
        shown_issued_ms: shown.issued_ms,
        ends_ms: issued.shown.expires_ms,
    };
    commit(lead, cluster, Command::Renew(Box::new(renewal))).await?;
    let chain = issued.chain;
    Ok(Certificate { chain })
}

fn check_level(lead: &Lead) -> Result<(), Status> {
    let level = lead.replica.read(|base| base.level);
    if level >= LEVEL {
        return Ok(());
    }
    Err(Status::unavailable(format!(
        "joining waits for feature level {LEVEL}: the mesh is at {level}, every lead must answer and be upgraded"
    )))
}

fn issuer(lead: &Lead) -> Result<&Issuer, Status> {
    let none = || unsigned(IssueError::None(lead.name.clone()));
    lead.issuer.get().ok_or_else(none)
}

/// A certificate for a cluster's agent.
fn issue(lead: &Lead, issuer: &Issuer, cluster: &Name, request: &str) -> Result<Issued, Status> {
    let (mesh, until_ms) = lead.replica.read(|base| {
        let mesh = base.mesh.as_ref().map(|mesh| mesh.name.clone());
        (mesh, base.revoked_until(&base.agent(cluster)))
    });
    let identity = Identity {
        mesh: mesh.ok_or_else(|| Status::unavailable("there is no mesh yet"))?,
        role: Role::Agent {
            cluster: cluster.to_string(),
        },
    };
    issuer
        .sign(&identity, request, lead.clock.now_ms(), until_ms)
        .map_err(unsigned)
}

/// Brings a command into the log, in the cluster's own name, and waits until it is seen here.
async fn commit(lead: &Lead, cluster: &Name, command: Command) -> Result<(), Status> {
    let command = once::sign(lead, &format!("cluster:{cluster}"), command);
    let done = lead.propose(vec![command]).await.map_err(unavailable)?;
    if let Some(refusal) = done.outcomes.into_iter().find_map(Outcome::err) {
        return Err(refused(refusal));
    }
    lead.replica.reach(done.index, FOLLOW).await;
    Ok(())
}

/// What another lead would refuse, too.
fn refused(refusal: Refusal) -> Status {
    let text = refusal.to_string();
    match refusal {
        Refusal::NotInvited { .. } => Status::permission_denied(text),
        Refusal::Exhausted { .. } => Status::resource_exhausted(text),
        _ => Status::failed_precondition(text),
    }
}

/// What another lead may be able to do.
fn unsigned(error: IssueError) -> Status {
    match error {
        IssueError::Request(_) => Status::invalid_argument(error.to_string()),
        IssueError::None(_) | IssueError::Issuer { .. } => Status::unimplemented(error.to_string()),
    }
}
