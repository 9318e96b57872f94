//! The door's part for the other leads: openraft's messages, and asks for the leader.

use std::sync::Arc;

use axum::{
    Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State},
    http::StatusCode,
    routing::post,
};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    lead::Lead,
    raft::{decode, election, encode},
};

/// The largest message of a lead, bytes.
const LIMIT: usize = 64 << 20;

type Reply = Result<Vec<u8>, (StatusCode, String)>;

pub(crate) fn routes(lead: Arc<Lead>) -> Router {
    Router::new()
        .route("/raft/v1/append", post(append))
        .route(election::PATH, post(canvass))
        .route("/raft/v1/vote", post(vote))
        .route("/raft/v1/snapshot", post(snapshot))
        .route("/raft/v1/ask", post(ask))
        .layer(DefaultBodyLimit::max(LIMIT))
        .with_state(lead)
}

fn read<T: DeserializeOwned>(body: &Bytes) -> Result<T, (StatusCode, String)> {
    decode(body).map_err(|error| (StatusCode::BAD_REQUEST, error.to_string()))
}

fn write<T: Serialize>(answer: &T) -> Reply {
    encode(answer).map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
}

async fn append(State(lead): State<Arc<Lead>>, body: Bytes) -> Reply {
    write(&lead.raft.append_entries(read(&body)?).await)
}

async fn canvass(State(lead): State<Arc<Lead>>, body: Bytes) -> Reply {
    write(&lead.election.answer(read(&body)?).await)
}

async fn vote(State(lead): State<Arc<Lead>>, body: Bytes) -> Reply {
    write(&lead.raft.vote(read(&body)?).await)
}

async fn snapshot(State(lead): State<Arc<Lead>>, body: Bytes) -> Reply {
    write(&lead.raft.install_snapshot(read(&body)?).await)
}

async fn ask(State(lead): State<Arc<Lead>>, body: Bytes) -> Reply {
    write(&lead.answer(read(&body)?).await)
}
