//! The door's part for the other leads: openraft's messages, and asks for the leader.

use std::{sync::Arc, time::Duration};

use axum::{
    Extension, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, Request, State},
    http::{HeaderMap, StatusCode},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::post,
};
use netmanager_api::identity::{Identity, Role};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    lead::{Answer, Ask, AskError, Lead, SeatOf},
    members,
    raft::{
        APPEND, PULSE, SEAT, STAND, Stand, decode, election, encode,
        network::{LEASE, TO},
    },
};

/// The largest message of a lead, bytes.
const LIMIT: usize = 64 << 20;

type Reply = Result<Vec<u8>, (StatusCode, String)>;

pub(crate) fn routes(lead: Arc<Lead>) -> Router {
    Router::new()
        .route(APPEND, post(append))
        .route(election::PATH, post(canvass))
        .route("/raft/v1/vote", post(vote))
        .route("/raft/v1/snapshot", post(snapshot))
        .route(STAND, post(stand))
        .layer(from_fn_with_state(lead.clone(), meant))
        .route("/raft/v1/ask", post(ask))
        .route(SEAT, post(seat))
        .route(members::ABOUT, post(about))
        .route(PULSE, post(pulse))
        .layer(DefaultBodyLimit::max(LIMIT))
        .with_state(lead)
}

/// Lets a message pass that is for this member, or for whoever is here.
async fn meant(State(lead): State<Arc<Lead>>, request: Request, next: Next) -> Response {
    let query = request.uri().query().unwrap_or_default();
    let to = query.strip_prefix(TO).and_then(|it| it.strip_prefix('='));
    match to {
        Some(to) if to != lead.id.to_string() => {
            let who = format!("this is member {}, not {to}", lead.id);
            (StatusCode::MISDIRECTED_REQUEST, who).into_response()
        }
        _ => next.run(request).await,
    }
}

fn read<T: DeserializeOwned>(body: &Bytes) -> Result<T, (StatusCode, String)> {
    decode(body).map_err(|error| (StatusCode::BAD_REQUEST, error.to_string()))
}

fn write<T: Serialize>(answer: &T) -> Reply {
    encode(answer).map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
}

async fn append(State(lead): State<Arc<Lead>>, headers: HeaderMap, body: Bytes) -> Reply {
    let answer = lead.election.voter.append(read(&body)?, lease(&headers));
    match answer.await {
        Ok(answer) => write(&answer),
        Err(error) => Err((StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
    }
}

/// The lease that a leader asks for; an older one does not say.
fn lease(headers: &HeaderMap) -> Option<Duration> {
    let ms = headers.get(LEASE)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_millis(ms))
}

async fn canvass(State(lead): State<Arc<Lead>>, body: Bytes) -> Reply {
    write(&lead.election.answer(read(&body)?).await)
}

async fn vote(State(lead): State<Arc<Lead>>, body: Bytes) -> Reply {
    write(&lead.election.voter.vote(read(&body)?).await)
}

async fn snapshot(State(lead): State<Arc<Lead>>, body: Bytes) -> Reply {
    write(&lead.incoming.take(&lead.raft, read(&body)?).await)
}

/// What a lead asks of the leader may change the Knowledge Base: who is no member asks only whether it is one.
async fn ask(
    State(lead): State<Arc<Lead>>,
    Extension(identity): Extension<Identity>,
    body: Bytes,
) -> Reply {
    let ask = read(&body);
    let is_member = lead
        .members()
        .iter()
        .any(|member| matches!(&identity.role, Role::Lead { name } if *name == member.name));
    if !is_member && !matches!(ask, Ok(Ask::Seat(_))) {
        tracing::warn!(%identity, "refused: no member of the group");
        let error = format!("{identity} is no member of this group");
        return Err((StatusCode::FORBIDDEN, error));
    }
    write(&lead.answer(ask?).await)
}

async fn stand(State(lead): State<Arc<Lead>>, body: Bytes) -> Reply {
    // An older lead says nothing.
    let stand: Option<Stand> = read(&body)?;
    write(&lead.election.stand(stand.unwrap_or_default()).await)
}

async fn seat(State(lead): State<Arc<Lead>>, body: Bytes) -> Reply {
    let answer = match lead.ask(Ask::Seat(SeatOf::Name(read(&body)?))).await {
        Ok(Answer::Seat(seat)) => Ok(seat),
        Ok(_) => Err(AskError::Lagging),
        Err(error) => Err(error),
    };
    write(&answer)
}

async fn pulse(State(lead): State<Arc<Lead>>) -> Reply {
    write(&lead.pace.pulse(lead.id))
}

async fn about(State(lead): State<Arc<Lead>>) -> Reply {
    write(&lead.about())
}
