//! Tokens, revocations and the audit log.

use axum::{
    Json,
    extract::{
        Path, Query, State,
        rejection::{JsonRejection, QueryRejection},
    },
};
use control_api::http::{
    AuditEntry, AuditQuery, Changed, List, Problem, ReadQuery, Revocation, RevocationRequest,
    Token, TokenRequest,
};
use control_core::{base::KnowledgeBase, command::Command, name::Name, security::check_hash};
use netmanager_api::identity::{Access, Identity, Role};

use super::{Answer, Read, Shared, bad_query, change, check_level, list};
use crate::{
    once::{Key, SIGNED},
    problem::Refusal,
};

/// The longest life of a token, days.
const DAYS: u64 = 365;
const DAY_MS: u64 = 86_400_000;

/// What came with [`SIGNED`].
const WHAT: &str = "tokens and revocations";

fn name(text: &str) -> Result<Name, Refusal> {
    text.parse()
        .map_err(|error| Refusal::name("name", text, &error))
}

/// The tokens that count.
#[utoipa::path(get, path = "/v1/tokens", params(ReadQuery),
    responses((status = 200, body = List<Token>), (status = 403, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn tokens(State(lead): Shared, query: Read) -> Answer<List<Token>> {
    let show = |base: &KnowledgeBase| {
        let tokens = base.security.tokens.iter();
        tokens
            .filter(|(_, token)| token.expires_ms > base.log_time_ms)
            .map(|(name, token)| Token {
                name: name.to_string(),
                access: token.access.clone(),
                created_ms: token.created_ms,
                expires_ms: token.expires_ms,
            })
            .collect()
    };
    list(&lead, query, show).await
}

/// Makes a token; its secret stays with who asks, only its hash is sent.
#[utoipa::path(post, path = "/v1/tokens", request_body = TokenRequest,
    responses((status = 200, body = Changed), (status = 400, body = Problem),
        (status = 403, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn create_token(
    State(lead): Shared,
    key: Key,
    wish: Result<Json<TokenRequest>, JsonRejection>,
) -> Answer<Changed> {
    let Json(wish) = wish.map_err(|error| Refusal::field("body", "", error.body_text()))?;
    let access: Access = wish
        .access
        .parse()
        .map_err(|error| Refusal::field("access", &wish.access, error))?;
    if !(1..=DAYS).contains(&wish.days) {
        let rule = format!("a token lasts 1 to {DAYS} days");
        return Err(Refusal::field("days", &wish.days.to_string(), rule));
    }
    check_hash("hash", &wish.hash)?;
    check_level(&lead, WHAT, SIGNED)?;
    let command = Command::CreateToken {
        name: name(&wish.name)?,
        hash: wish.hash.clone(),
        access: access.to_string(),
        lasts_ms: wish.days * DAY_MS,
    };
    let request = key.request(&lead, format!("{wish:?}").as_bytes());
    change(&lead, &request, command).await
}

/// Takes a token back.
#[utoipa::path(delete, path = "/v1/tokens/{name}", params(("name" = String, Path)),
    responses((status = 200, body = Changed), (status = 403, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn revoke_token(
    State(lead): Shared,
    key: Key,
    Path(token): Path<String>,
) -> Answer<Changed> {
    check_level(&lead, WHAT, SIGNED)?;
    let command = Command::RevokeToken {
        name: name(&token)?,
    };
    let request = key.request(&lead, b"");
    change(&lead, &request, command).await
}

/// What is revoked.
#[utoipa::path(get, path = "/v1/revocations", params(ReadQuery),
    responses((status = 200, body = List<Revocation>), (status = 403, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn revocations(State(lead): Shared, query: Read) -> Answer<List<Revocation>> {
    let show = |base: &KnowledgeBase| {
        let holders = base
            .security
            .holders
            .iter()
            .map(|(holder, until)| Revocation {
                holder: holder.clone(),
                issued_until_ms: Some(*until),
                certificate: None,
            });
        let certificates = base.security.certificates.iter();
        let certificates = certificates.map(|(certificate, holder)| Revocation {
            holder: holder.clone(),
            issued_until_ms: None,
            certificate: Some(certificate.clone()),
        });
        holders.chain(certificates).collect()
    };
    list(&lead, query, show).await
}

/// Revokes certificates: every one of a holder that was issued until now, or one.
#[utoipa::path(post, path = "/v1/revocations", request_body = RevocationRequest,
    responses((status = 200, body = Changed), (status = 400, body = Problem),
        (status = 403, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn revoke(
    State(lead): Shared,
    key: Key,
    wish: Result<Json<RevocationRequest>, JsonRejection>,
) -> Answer<Changed> {
    let Json(wish) = wish.map_err(|error| Refusal::field("body", "", error.body_text()))?;
    let holder: Identity = wish
        .holder
        .parse()
        .map_err(|error| Refusal::field("holder", &wish.holder, error))?;
    if let Some(certificate) = &wish.certificate {
        check_hash("certificate", certificate)?;
    }
    check_level(&lead, WHAT, SIGNED)?;
    let mesh = lead
        .replica
        .read(|base| base.mesh.as_ref().map(|mesh| mesh.name.clone()));
    if mesh.is_some_and(|mesh| mesh != holder.mesh) {
        let rule = "is of another mesh";
        return Err(Refusal::field("holder", &wish.holder, rule));
    }
    let is_member = |name: &str| lead.members().iter().any(|member| member.name == name);
    if let Role::Lead { name } = &holder.role
        && wish.certificate.is_none()
        && is_member(name)
    {
        let rule = format!(
            "{name} is a lead of the group, which would not hear it any more: remove it first (weft lead remove), or \
             give it a new certificate and revoke the old one by its file"
        );
        return Err(Refusal::field("holder", &wish.holder, rule));
    }
    let command = Command::RevokeCertificate {
        holder: holder.holder(),
        certificate: wish.certificate.clone(),
    };
    let request = key.request(&lead, format!("{wish:?}").as_bytes());
    change(&lead, &request, command).await
}

/// Who changed what: the last changes, newest first.
#[utoipa::path(get, path = "/v1/audit", params(AuditQuery),
    responses((status = 200, body = List<AuditEntry>), (status = 403, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn audit(
    State(lead): Shared,
    query: Result<Query<AuditQuery>, QueryRejection>,
) -> Answer<List<AuditEntry>> {
    let Query(AuditQuery { limit, consistent }) = query.map_err(|error| bad_query(&error))?;
    let show = |base: &KnowledgeBase| {
        let incarnation = base.mesh.as_ref().map_or(0, |mesh| mesh.incarnation);
        let newest = base.security.audit.iter().rev().take(limit);
        newest
            .map(|it| AuditEntry {
                revision: [incarnation, it.index],
                at_ms: it.at_ms,
                by: it.by.clone(),
                what: it.what.clone(),
            })
            .collect()
    };
    list(&lead, Ok(Query(ReadQuery { consistent })), show).await
}
