//! The clusters: which there are, inviting one, emptying one, using it again, and taking it out of the mesh.

use axum::{
    Json,
    extract::{
        Path, Query, State,
        rejection::{JsonRejection, QueryRejection},
    },
};
use control_api::http::{
    Changed, Cluster, ForgetQuery, InvitationRequest, List, Problem, ReadQuery,
};
use control_core::{command::Command, name::Name, security::check_hash};

use super::{Answer, Read, Shared, bad_query, change, check_level, list, show};
use crate::{
    joins,
    lead::Lead,
    once::{Key, Request},
    problem::Refusal,
};

/// The feature level that knows drained clusters.
const DRAINS: u32 = 3;

/// What came with it.
const WHAT: &str = "draining and forgetting clusters";

/// What came with [`joins::LEVEL`].
const JOINING: &str = "joining and leaving";

/// The longest life of an invitation, minutes.
const MINUTES: u64 = 24 * 60;

/// The clusters.
#[utoipa::path(get, path = "/v1/clusters", params(ReadQuery),
    responses((status = 200, body = List<Cluster>), (status = 503, body = Problem)))]
pub(super) async fn list_all(State(lead): Shared, query: Read) -> Answer<List<Cluster>> {
    list(&lead, query, show::clusters).await
}

/// Empties a cluster: it gets nothing new, and what runs there moves away.
#[utoipa::path(post, path = "/v1/clusters/{name}/drain", params(("name" = String, Path)),
    responses((status = 200, body = Changed), (status = 403, body = Problem), (status = 404, body = Problem),
        (status = 503, body = Problem)))]
pub(super) async fn drain(
    State(lead): Shared,
    key: Key,
    Path(cluster): Path<String>,
) -> Answer<Changed> {
    let command = |cluster| Command::DrainCluster { cluster };
    ask(
        &lead,
        key.request(&lead, b""),
        &cluster,
        (WHAT, DRAINS),
        command,
    )
    .await
}

/// Uses a cluster again that was emptied.
#[utoipa::path(delete, path = "/v1/clusters/{name}/drain", params(("name" = String, Path)),
    responses((status = 200, body = Changed), (status = 403, body = Problem), (status = 404, body = Problem),
        (status = 503, body = Problem)))]
pub(super) async fn undrain(
    State(lead): Shared,
    key: Key,
    Path(cluster): Path<String>,
) -> Answer<Changed> {
    let command = |cluster| Command::UndrainCluster { cluster };
    ask(
        &lead,
        key.request(&lead, b""),
        &cluster,
        (WHAT, DRAINS),
        command,
    )
    .await
}

/// Lets a cluster join, once, by who shows the secret of this hash.
#[utoipa::path(post, path = "/v1/clusters/{name}/invitation", params(("name" = String, Path)),
    request_body = InvitationRequest,
    responses((status = 200, body = Changed), (status = 400, body = Problem), (status = 403, body = Problem),
        (status = 409, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn invite(
    State(lead): Shared,
    key: Key,
    Path(cluster): Path<String>,
    wish: Result<Json<InvitationRequest>, JsonRejection>,
) -> Answer<Changed> {
    let Json(wish) = wish.map_err(|error| Refusal::field("body", "", error.body_text()))?;
    if !(1..=MINUTES).contains(&wish.minutes) {
        let rule = format!("an invitation lasts 1 to {MINUTES} minutes");
        return Err(Refusal::field("minutes", &wish.minutes.to_string(), rule));
    }
    check_hash("hash", &wish.hash)?;
    let request = key.request(&lead, format!("{wish:?}").as_bytes());
    let command = |cluster| Command::Invite {
        cluster,
        hash: wish.hash,
        lasts_ms: wish.minutes * 60_000,
    };
    ask(&lead, request, &cluster, (JOINING, joins::LEVEL), command).await
}

/// Takes an invitation back.
#[utoipa::path(delete, path = "/v1/clusters/{name}/invitation", params(("name" = String, Path)),
    responses((status = 200, body = Changed), (status = 403, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn withdraw(
    State(lead): Shared,
    key: Key,
    Path(cluster): Path<String>,
) -> Answer<Changed> {
    let command = |cluster| Command::Withdraw { cluster };
    let request = key.request(&lead, b"");
    ask(&lead, request, &cluster, (JOINING, joins::LEVEL), command).await
}

/// Notes that a cluster is to leave the mesh, and empties it.
#[utoipa::path(post, path = "/v1/clusters/{name}/leave", params(("name" = String, Path)),
    responses((status = 200, body = Changed), (status = 403, body = Problem), (status = 404, body = Problem),
        (status = 503, body = Problem)))]
pub(super) async fn leave(
    State(lead): Shared,
    key: Key,
    Path(cluster): Path<String>,
) -> Answer<Changed> {
    let command = |cluster| Command::LeaveCluster { cluster };
    let request = key.request(&lead, b"");
    ask(&lead, request, &cluster, (JOINING, joins::LEVEL), command).await
}

/// Asks for a change of a cluster, which came with a feature level.
async fn ask(
    lead: &Lead,
    request: Request,
    cluster: &str,
    (what, level): (&str, u32),
    command: impl FnOnce(Name) -> Command,
) -> Answer<Changed> {
    check_level(lead, what, level)?;
    let cluster = cluster
        .parse()
        .map_err(|error| Refusal::name("cluster", cluster, &error))?;
    change(lead, &request, command(cluster)).await
}

/// Takes a lost cluster, to which nothing is bound any more, out of the mesh.
#[utoipa::path(delete, path = "/v1/clusters/{name}", params(("name" = String, Path), ForgetQuery),
    responses((status = 200, body = Changed), (status = 403, body = Problem), (status = 404, body = Problem),
        (status = 409, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn forget(
    State(lead): Shared,
    key: Key,
    Path(cluster): Path<String>,
    query: Result<Query<ForgetQuery>, QueryRejection>,
) -> Answer<Changed> {
    let Query(ForgetQuery { abandon }) = query.map_err(|error| bad_query(&error))?;
    let command = |cluster| Command::ForgetCluster { cluster, abandon };
    ask(
        &lead,
        key.request(&lead, b""),
        &cluster,
        (WHAT, DRAINS),
        command,
    )
    .await
}
