//! Quotas: what the goals of a namespace may ask for together, and what they ask for now.

use axum::{
    Json,
    extract::{Path, State, rejection::JsonRejection},
};
use control_api::http::{Amounts, Changed, List, Problem, Quota, ReadQuery};
use control_core::{
    base::KnowledgeBase,
    command::Command,
    name::Name,
    quota::{self, LEVEL},
};

use super::{Answer, Read, Shared, change, check_level, list};
use crate::{once::Key, problem::Refusal};

/// What came with [`LEVEL`].
const WHAT: &str = "quotas";

fn namespace(text: &str) -> Result<Name, Refusal> {
    text.parse()
        .map_err(|error| Refusal::name("namespace", text, &error))
}

fn amount<T: std::str::FromStr<Err: ToString>>(
    field: &str,
    text: Option<&str>,
) -> Result<Option<T>, Refusal> {
    let read = |text: &str| {
        text.parse()
            .map_err(|error: T::Err| Refusal::field(field, text, error))
    };
    text.map(read).transpose()
}

/// The namespaces that have a quota.
#[utoipa::path(get, path = "/v1/quotas", params(ReadQuery),
    responses((status = 200, body = List<Quota>), (status = 503, body = Problem)))]
pub(super) async fn list_all(State(lead): Shared, query: Read) -> Answer<List<Quota>> {
    let show = |base: &KnowledgeBase| {
        let quotas = base.quotas.iter();
        let quotas = quotas.map(|(namespace, most)| {
            let used = base.usage(namespace, None);
            Quota {
                namespace: namespace.to_string(),
                most: Amounts {
                    applications: most.applications,
                    instances: most.instances,
                    cpu: most.cpu.map(|it| it.to_string()),
                    memory: most.memory.map(|it| it.to_string()),
                    gpus: most.gpus,
                },
                used: Amounts {
                    applications: Some(used.applications),
                    instances: Some(used.instances),
                    cpu: Some(used.cpu.to_string()),
                    memory: Some(used.memory.to_string()),
                    gpus: Some(used.gpus),
                },
            }
        });
        quotas.collect()
    };
    list(&lead, query, show).await
}

/// Bounds what the goals of a namespace may ask for; what is not named is not bounded.
#[utoipa::path(post, path = "/v1/quotas/{namespace}", params(("namespace" = String, Path)), request_body = Amounts,
    responses((status = 200, body = Changed), (status = 400, body = Problem), (status = 403, body = Problem),
        (status = 503, body = Problem)))]
pub(super) async fn set(
    State(lead): Shared,
    key: Key,
    Path(name): Path<String>,
    wish: Result<Json<Amounts>, JsonRejection>,
) -> Answer<Changed> {
    let Json(wish) = wish.map_err(|error| Refusal::field("body", "", error.body_text()))?;
    check_level(&lead, WHAT, LEVEL)?;
    let quota = quota::Quota {
        applications: wish.applications,
        instances: wish.instances,
        cpu: amount("cpu", wish.cpu.as_deref())?,
        memory: amount("memory", wish.memory.as_deref())?,
        gpus: wish.gpus,
    };
    let command = Command::SetQuota {
        namespace: namespace(&name)?,
        quota,
    };
    let request = key.request(&lead, format!("{wish:?}").as_bytes());
    change(&lead, &request, command).await
}

/// Lets the goals of a namespace ask for anything.
#[utoipa::path(delete, path = "/v1/quotas/{namespace}", params(("namespace" = String, Path)),
    responses((status = 200, body = Changed), (status = 403, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn remove(
    State(lead): Shared,
    key: Key,
    Path(name): Path<String>,
) -> Answer<Changed> {
    check_level(&lead, WHAT, LEVEL)?;
    let command = Command::RemoveQuota {
        namespace: namespace(&name)?,
    };
    let request = key.request(&lead, b"");
    change(&lead, &request, command).await
}
