//! The clusters: which there are, emptying one, using it again, and taking it out of the mesh.

use axum::extract::{Path, Query, State, rejection::QueryRejection};
use control_api::http::{Changed, Cluster, ForgetQuery, List, Problem, ReadQuery};
use control_core::{command::Command, name::Name};

use super::{Answer, Read, Shared, bad_query, change, check_level, list, show};
use crate::{lead::Lead, once::Key, problem::Refusal};

/// The feature level that knows drained clusters.
const DRAINS: u32 = 3;

/// What came with it.
const WHAT: &str = "draining and forgetting clusters";

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
    ask(&lead, key, &cluster, |cluster| Command::DrainCluster {
        cluster,
    })
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
    ask(&lead, key, &cluster, |cluster| Command::UndrainCluster {
        cluster,
    })
    .await
}

/// Asks for a change of a cluster.
async fn ask(
    lead: &Lead,
    key: Key,
    cluster: &str,
    command: impl FnOnce(Name) -> Command,
) -> Answer<Changed> {
    check_level(lead, WHAT, DRAINS)?;
    let cluster = cluster
        .parse()
        .map_err(|error| Refusal::name("cluster", cluster, &error))?;
    change(lead, &key.request(lead, b""), command(cluster)).await
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
    ask(&lead, key, &cluster, command).await
}
