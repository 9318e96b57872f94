//! The leads of the group: who they are, one more, one less, another leader.

use axum::{
    Json,
    extract::{Path, State, rejection::JsonRejection},
};
use control_api::http::{
    Changed, Drained, Lead as Shown, LeadAdded, LeadDisk, LeadRequest, LeadState, LeadTimers, List,
    Problem,
};
use netmanager_api::identity::is_label;

use super::{Answer, Freshness, Read, Shared, bad_query};
use crate::{
    door::caller::Asking,
    lead::{self, Ask, AskError, Lead},
    once::note,
    problem::Refusal,
    raft::{
        Paced,
        checkpoint::Checkpoints,
        members::{About, MemberError, Seat},
    },
    room::Room,
};

fn show(seat: &Seat, all: &[Seat]) -> Shown {
    let role = match (seat.leads, seat.is_voter) {
        (true, _) => "leader",
        (false, true) => "voter",
        (false, false) => "learner",
    };
    Shown {
        name: seat.member.name.clone(),
        id: seat.id,
        address: seat.member.address,
        role: role.to_owned(),
        answers: seat.about.is_some(),
        log_index: seat.matched,
        applied_index: seat.about.as_ref().map(|about| about.applied),
        version: seat.about.as_ref().map(|about| about.version.clone()),
        disk: seat.about.as_ref().and_then(|about| about.room).map(disk),
        timers: seat.about.as_ref().and_then(|about| about.pace).map(timers),
        issuer_ends_ms: seat.about.as_ref().and_then(|about| about.issuer_ends_ms),
        state: seat.about.as_ref().and_then(|about| state(about, all)),
        authorities: seat
            .about
            .as_ref()
            .map(|about| about.authorities.clone())
            .unwrap_or_default(),
        replaces: seat.member.replaces,
    }
}

/// Its state at its last checkpoint, beside what the others have there.
fn state(about: &About, all: &[Seat]) -> Option<LeadState> {
    let own = about.checkpoints.as_ref()?;
    let last = own.last.last()?;
    let others = all.iter().filter_map(|seat| seat.about.as_ref());
    let mut others = others.filter_map(|it| it.checkpoints.as_ref());
    let differs = |it: &Checkpoints| {
        it.shape == own.shape && it.at(last.index).is_some_and(|hash| hash != last.hash)
    };
    Some(LeadState {
        index: last.index,
        hash: last.hash.clone(),
        differs: others.any(differs),
    })
}

fn timers(pace: Paced) -> LeadTimers {
    LeadTimers {
        rtt_us: pace.rtt_us,
        heartbeat_ms: pace.heartbeat_ms,
        election_ms: pace.lease_ms,
    }
}

fn disk(room: Room) -> LeadDisk {
    LeadDisk {
        free_bytes: room.free,
        reserve_bytes: room.reserve,
        is_short: room.is_short,
    }
}

fn unexpected(_: lead::Answer) -> Refusal {
    AskError::Lagging.into()
}

/// The leads of the group.
#[utoipa::path(get, path = "/v1/leads", params(control_api::http::ReadQuery),
    responses((status = 200, body = List<Shown>), (status = 503, body = Problem)))]
pub(super) async fn list(State(lead): Shared, query: Read) -> Answer<List<Shown>> {
    let query = query.map_err(|error| bad_query(&error))?;
    let seats = if query.consistent {
        match lead.ask(Ask::Seats).await? {
            lead::Answer::Seats(seats) => seats,
            other => return Err(unexpected(other)),
        }
    } else {
        lead.seats().await
    };
    let fresh = match query.consistent {
        true => Freshness {
            stale: false,
            age_ms: Some(0),
        },
        false => Freshness::stale(&lead).await,
    };
    Ok(Json(List {
        items: seats.iter().map(|seat| show(seat, &seats)).collect(),
        index: lead.replica.applied(),
        stale: fresh.stale,
        age_ms: fresh.age_ms,
    }))
}

/// Adds a lead, which catches up and becomes a voter then; with `replaces`, that one leaves afterwards.
#[utoipa::path(post, path = "/v1/leads", request_body = LeadRequest,
    responses((status = 200, body = LeadAdded), (status = 400, body = Problem),
        (status = 404, body = Problem), (status = 409, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn add(
    State(lead): Shared,
    asking: Asking,
    request: Result<Json<LeadRequest>, JsonRejection>,
) -> Answer<LeadAdded> {
    let Json(request) = request.map_err(|error| Refusal::field("body", "", error.body_text()))?;
    if !is_label(&request.name) {
        let rule = "a name is 1 to 63 of a-z, 0-9 and '-', first and last a letter or digit";
        return Err(Refusal::field("name", &request.name, rule));
    }
    let address = request.address;
    if address.port() == 0 || address.ip().is_unspecified() {
        let rule = "the other leads cannot reach it there: name an address and a port";
        return Err(Refusal::field("address", &address.to_string(), rule));
    }
    let what = match &request.replaces {
        None => format!("ask to add lead {} at {address}", request.name),
        Some(old) => format!(
            "ask to replace lead {old} with {} at {address}",
            request.name
        ),
    };
    note(&lead, &asking.caller.name, what).await?;
    let ask = Ask::Admit {
        name: request.name,
        address,
        replaces: request.replaces,
    };
    let (id, member) = match lead.ask(ask).await? {
        lead::Answer::Seat(Some(seat)) => seat,
        other => return Err(unexpected(other)),
    };
    Ok(Json(LeadAdded {
        name: member.name,
        id,
        address: member.address,
        join: join(&lead, member.replaces.unwrap_or(id), id),
    }))
}

/// Where a new lead finds the group: at the members beside itself and the one that leaves.
fn join(lead: &Lead, leaving: u64, own: u64) -> Vec<String> {
    let members = lead.members_by_id().into_iter();
    members
        .filter(|(id, _)| *id != leaving && *id != own)
        .map(|(_, member)| format!("{}={}", member.name, member.address))
        .collect()
}

/// Removes a lead; a leader hands over first.
#[utoipa::path(delete, path = "/v1/leads/{name}", params(("name" = String, Path)),
    responses((status = 200, body = Changed), (status = 404, body = Problem),
        (status = 409, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn remove(
    State(lead): Shared,
    asking: Asking,
    Path(name): Path<String>,
) -> Answer<Changed> {
    let what = format!("ask to remove lead {name}");
    // As of now: this lead may have heard of no member yet.
    lead.catch_up().await?;
    let was_member = lead.members().iter().any(|member| member.name == name);
    note(&lead, &asking.caller.name, what).await?;
    match lead.ask(Ask::Dismiss { name }).await {
        // A leader that removed it fell before it said so, and the next one knows it no more.
        Err(AskError::Member(MemberError::Unknown(_))) if was_member => {}
        answer => drop(answer?),
    }
    Ok(Json(Changed {
        changed: true,
        index: lead.replica.applied(),
    }))
}

/// Lets another lead, if this one does.
#[utoipa::path(post, path = "/v1/leads/{name}/drain", params(("name" = String, Path)),
    responses((status = 200, body = Drained), (status = 404, body = Problem),
        (status = 409, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn drain(
    State(lead): Shared,
    asking: Asking,
    Path(name): Path<String>,
) -> Answer<Drained> {
    hand_over(&lead, &asking, Some(name)).await
}

/// Lets another lead than whoever does.
#[utoipa::path(post, path = "/v1/leads/drain",
    responses((status = 200, body = Drained), (status = 409, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn drain_any(State(lead): Shared, asking: Asking) -> Answer<Drained> {
    hand_over(&lead, &asking, None).await
}

async fn hand_over(lead: &Lead, asking: &Asking, name: Option<String>) -> Answer<Drained> {
    let what = match &name {
        Some(name) => format!("ask lead {name} to let another lead"),
        None => "ask the leader to let another lead".to_owned(),
    };
    // Noting it may take until another leads.
    let wish = lead.wish(name);
    note(lead, &asking.caller.name, what).await?;
    match lead.fulfil(wish).await? {
        lead::Answer::Leader(leader) => Ok(Json(Drained { leader })),
        other => Err(unexpected(other)),
    }
}
