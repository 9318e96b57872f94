//! The door for callers who show a token in the place of a certificate: the control API and nothing else.
//!
//! ```text
//!  TCP --> TLS (the lead shows its certificate) --> Authorization: Bearer NAME.SECRET
//!      --> the leads' state: the hash of the secret, not expired --> Caller --> roles::authorise
//! ```
//!
//! It is open only where the lead was told so, on a port of its own: the leads' and the agents' door never speaks to
//! who shows no certificate.

use std::sync::Arc;

use axum::{
    Extension, Router,
    extract::{Request, State},
    http::{HeaderMap, header::AUTHORIZATION},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
};
use control_core::name::Name;
use netmanager_api::identity::fingerprint;

use super::{Peer, caller::Caller, limits::Limits};
use crate::{api, lead::Lead, problem::Refusal};

/// The control API, for who shows a token.
pub(crate) fn routes(lead: &Arc<Lead>) -> Router {
    api::routes(lead.clone()).layer(from_fn_with_state(lead.clone(), admit))
}

async fn admit(
    State(lead): State<Arc<Lead>>,
    Extension(Peer(peer)): Extension<Peer>,
    mut request: Request,
    next: Next,
) -> Response {
    let shown = bearer(request.headers());
    let name = shown.map(|(name, _)| name).unwrap_or_default();
    let limits = request.extensions().get::<Arc<Limits>>().cloned();
    match caller(&lead, shown) {
        Ok(caller) => {
            if let Some(Err(refusal)) = limits.map(|limits| limits.ask(&caller.name)) {
                tracing::debug!(%caller, "refused: too many requests");
                return refusal.into_response();
            }
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(why) => {
            if let Some(Err(refusal)) = limits.map(|limits| limits.mistake(peer.ip())) {
                return refusal.into_response();
            }
            let path = request.uri().path();
            tracing::warn!(%peer, token = ?name, path, why, "refused");
            Refusal::token(why).into_response()
        }
    }
}

/// A token's name and secret.
fn bearer(headers: &HeaderMap) -> Option<(&str, &str)> {
    let text = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = text.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    token.trim().split_once('.')
}

fn caller(lead: &Lead, shown: Option<(&str, &str)>) -> Result<Caller, &'static str> {
    let (name, secret) = shown.ok_or("no token was shown")?;
    // One answer for every token that does not count: it tells nobody which names there are.
    let unknown = "the token does not count (any more)";
    let name: Name = name.parse().map_err(|_| unknown)?;
    let now = lead.clock.now_ms();
    let known = lead.replica.read(|base| {
        let token = base.security.tokens.get(&name)?;
        (token.expires_ms > now.max(base.log_time_ms)).then(|| token.clone())
    });
    let token = known.ok_or(unknown)?;
    // Hashes are compared, of secrets nobody can guess: how long that takes says nothing.
    if fingerprint(secret.as_bytes()) != token.hash {
        return Err(unknown);
    }
    Ok(Caller {
        name: format!("token:{name}"),
        access: token.access.parse().map_err(|_| unknown)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_a_name_and_a_secret_in_a_bearer_header() {
        for (text, want) in [
            ("Bearer ci.abc", Some(("ci", "abc"))),
            ("bearer ci.a.b", Some(("ci", "a.b"))),
            ("Bearer ci", None),
            ("Basic ci.abc", None),
            ("ci.abc", None),
            ("", None),
        ] {
            let headers = HeaderMap::from_iter([(AUTHORIZATION, text.parse().unwrap())]);
            assert_eq!(bearer(&headers), want, "{text:?}");
        }
        assert_eq!(bearer(&HeaderMap::new()), None);
    }
}
