//! Backup and restore, while the group runs.

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use control_api::http::{Problem, Restored};
use control_core::{
    backup,
    command::{Command, Outcome},
};

use super::{Answer, FOLLOW, Shared, check_level};
use crate::{door::caller::Asking, once::sign, problem::Refusal};

/// The feature level that knows a restore.
const LEVEL: u32 = 1;

/// The Knowledge Base as it is now, as a file.
#[utoipa::path(get, path = "/v1/backup",
    responses((status = 200, body = String, content_type = "application/x-weft-backup"), (status = 503, body = Problem)))]
pub(super) async fn backup(State(lead): Shared) -> Result<Response, Refusal> {
    lead.catch_up().await?;
    let text = lead.replica.read(backup::write);
    let text = text.ok_or_else(|| Refusal::from(control_core::command::Refusal::NoMesh))?;
    let kind = [(header::CONTENT_TYPE, "application/x-weft-backup")];
    Ok((StatusCode::OK, kind, text).into_response())
}

/// Makes the mesh what a backup says, in another incarnation.
#[utoipa::path(post, path = "/v1/restore",
    request_body(content = String, content_type = "application/x-weft-backup"),
    responses((status = 200, body = Restored), (status = 400, body = Problem),
        (status = 409, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn restore(State(lead): Shared, asking: Asking, body: String) -> Answer<Restored> {
    let (header, base) =
        backup::read(&body).map_err(|error| Refusal::field("backup", "", error))?;
    lead.catch_up().await?;
    // A lead that does not know what is in it would drop that, and differ from the others for good.
    let needed = LEVEL.max(header.level);
    check_level(&lead, "a restore of this backup", needed)?;
    tracing::warn!(index = header.index, "restoring a backup");
    let command = sign(&lead, &asking.caller.name, Command::Restore(Box::new(base)));
    let done = lead.propose(vec![command]).await?;
    let refused = done.outcomes.into_iter().find_map(Outcome::err);
    if let Some(refusal) = refused {
        return Err(refusal.into());
    }
    lead.replica.reach(done.index, FOLLOW).await;
    let incarnation = lead
        .replica
        .read(|base| base.mesh.as_ref().map_or(0, |mesh| mesh.incarnation));
    Ok(Json(Restored {
        incarnation,
        backup_index: header.index,
        index: done.index,
    }))
}
