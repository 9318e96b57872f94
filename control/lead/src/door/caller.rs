//! Who asks for something at the control API, and what they may.

use std::fmt;

use axum::{
    extract::{FromRequestParts, RawPathParams, Request},
    http::{Method, request::Parts},
    middleware::Next,
    response::{IntoResponse, Response},
};
use netmanager_api::identity::{Access, Identity, Role};

use super::roles;
use crate::problem::Refusal;

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    /// Their name: of a certificate as it is there, `token:NAME` of a token.
    pub(crate) name: String,
    /// What they may do.
    pub(crate) access: Access,
}

impl Caller {
    /// The caller behind a certificate, if it is a user's.
    pub(crate) fn of(identity: &Identity) -> Option<Self> {
        match &identity.role {
            Role::User { name, access } => Some(Self {
                name: name.clone(),
                access: access.clone(),
            }),
            _ => None,
        }
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.access)
    }
}

/// A route of the control API.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    pub(crate) method: Method,
    pub(crate) path: &'static str,
}

/// Who asks for which route: what a handler asks again with, once it knows the namespaces.
#[derive(Clone, Debug)]
pub(crate) struct Asking {
    pub(crate) caller: Caller,
    route: Route,
}

impl Asking {
    /// Whether the caller may do what the route does in `namespace`.
    pub(crate) fn within(&self, namespace: &str) -> Result<(), Refusal> {
        self.check(Some(namespace))
    }

    fn check(&self, namespace: Option<&str>) -> Result<(), Refusal> {
        let Route { method, path } = &self.route;
        let access = &self.caller.access;
        roles::authorise(access, method, path, namespace).map_err(|takes| {
            let caller = &self.caller;
            tracing::warn!(%caller, %method, path, namespace, takes, "refused");
            Refusal::access(caller, namespace, &takes)
        })
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Asking {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refusal> {
        let asking = parts.extensions.get::<Self>().cloned();
        asking.ok_or_else(Refusal::nobody)
    }
}

/// Lets a request pass whose caller may ask for this route, as far as the path says what for.
pub(crate) async fn guard(params: RawPathParams, mut request: Request, next: Next) -> Response {
    let extensions = request.extensions();
    let (Some(caller), Some(route)) = (extensions.get::<Caller>(), extensions.get::<Route>())
    else {
        return Refusal::nobody().into_response();
    };
    let asking = Asking {
        caller: caller.clone(),
        route: route.clone(),
    };
    let namespace = params.iter().find(|(name, _)| *name == "namespace");
    if let Err(refusal) = asking.check(namespace.map(|(_, value)| value)) {
        return refusal.into_response();
    }
    request.extensions_mut().insert(asking);
    next.run(request).await
}
