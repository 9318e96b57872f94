//! Who may ask for what: the one place that says so.
//!
//! ```text
//!  a certificate's role --admit--> one area of the door: leads, agents, or the control API
//!  in the control API   --authorise--> (access, method, route, namespace) --> allowed, or what it takes
//! ```
//!
//! | access | reads | changes in its namespaces | everything else |
//! |---|---|---|---|
//! | viewer | yes | no | no |
//! | deployer | yes | yes | no |
//! | admin | yes | yes, in all | yes |
//!
//! A route that is not named here opens for nobody.

use axum::http::Method;
use netmanager_api::identity::{Access, Role};

/// Whether a holder of `role` may ask for `path`; else which role may.
///
/// That an agent speaks only for its own cluster is checked by the stream's first message.
pub(crate) fn admit(role: &Role, path: &str) -> Result<(), &'static str> {
    let area = path.split('/').nth(1).unwrap_or_default();
    match (area, role) {
        ("v1" | "openapi.json", Role::User { .. })
        | ("weft.agent.v1.LeadDoor" | "weft.agent.v1.RenewDoor", Role::Agent { .. })
        | ("raft", Role::Lead { .. }) => Ok(()),
        ("v1" | "openapi.json", _) => Err("user"),
        ("weft.agent.v1.LeadDoor" | "weft.agent.v1.RenewDoor", _) => Err("agent"),
        ("raft", _) => Err("lead"),
        _ => Err("nobody"),
    }
}

/// What a route of the control API takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Takes {
    /// To be let in at all.
    Reading,
    /// To deploy in the namespace that the path names.
    Deploying,
    /// To deploy in every namespace that the body names: its handler asks for each of them.
    DeployingByBody,
    /// To be an admin.
    Administration,
}

fn takes(method: &Method, route: &str) -> Option<Takes> {
    match (method.as_str(), route) {
        (
            "GET",
            "/openapi.json"
            | "/v1/applications"
            | "/v1/services"
            | "/v1/bindings"
            | "/v1/clusters"
            | "/v1/nodes"
            | "/v1/migrations"
            | "/v1/explain/{namespace}/{application}/{service}"
            | "/v1/status"
            | "/v1/leads"
            | "/v1/quotas",
        ) => Some(Takes::Reading),
        ("POST", "/v1/applications" | "/v1/migrations") => Some(Takes::DeployingByBody),
        ("DELETE", "/v1/applications/{namespace}/{name}") => Some(Takes::Deploying),
        ("GET", "/v1/backup" | "/v1/tokens" | "/v1/revocations" | "/v1/audit")
        | (
            "POST",
            "/v1/restore"
            | "/v1/leads"
            | "/v1/leads/drain"
            | "/v1/leads/{name}/drain"
            | "/v1/clusters/{name}/drain"
            | "/v1/clusters/{name}/invitation"
            | "/v1/clusters/{name}/leave"
            | "/v1/tokens"
            | "/v1/quotas/{namespace}"
            | "/v1/revocations",
        )
        | (
            "DELETE",
            "/v1/leads/{name}"
            | "/v1/clusters/{name}"
            | "/v1/clusters/{name}/drain"
            | "/v1/clusters/{name}/invitation"
            | "/v1/tokens/{name}"
            | "/v1/quotas/{namespace}",
        ) => Some(Takes::Administration),
        _ => None,
    }
}

/// Whether somebody with this access may ask for this; else which access may.
///
/// `namespace` is the one that the path names. For the routes whose body names it, it is `None` at first, which lets
/// every deployer pass to where the body is read, and the handler asks again for each namespace there. A route that
/// must name it in its path and does not opens for admins only.
///
/// # Errors
/// With the access that it takes, for people.
pub(crate) fn authorise(
    access: &Access,
    method: &Method,
    route: &str,
    namespace: Option<&str>,
) -> Result<(), String> {
    let admin = || Access::Admin.to_string();
    let deployer = || {
        let namespace = namespace.unwrap_or("NAMESPACE");
        format!("deployer/{namespace} or admin")
    };
    match (takes(method, route), access) {
        (None, _) => Err("nobody".to_owned()),
        (Some(_), Access::Admin) | (Some(Takes::Reading), _) => Ok(()),
        (Some(Takes::Administration), _) => Err(admin()),
        (Some(Takes::Deploying | Takes::DeployingByBody), Access::Viewer) => Err(deployer()),
        (Some(by), Access::Deployer { namespaces }) => match namespace {
            Some(namespace) if namespaces.contains(namespace) => Ok(()),
            None if by == Takes::DeployingByBody => Ok(()),
            _ => Err(deployer()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_door_opens_for_one_role_only() {
        let name = || "x".to_owned();
        let roles = [
            ("lead", Role::Lead { name: name() }),
            ("agent", Role::Agent { cluster: name() }),
            (
                "node",
                Role::Node {
                    cluster: name(),
                    node: name(),
                },
            ),
            (
                "user",
                Role::User {
                    name: name(),
                    access: Access::Viewer,
                },
            ),
        ];
        let doors = [
            ("/v1/applications", "user"),
            ("/v1/status", "user"),
            ("/openapi.json", "user"),
            ("/weft.agent.v1.LeadDoor/Follow", "agent"),
            ("/weft.agent.v1.RenewDoor/Renew", "agent"),
            // It is behind another handshake.
            ("/weft.join.v1.JoinDoor/Join", "nobody"),
            ("/raft/v1/append", "lead"),
            ("/raft/v1/ask", "lead"),
            ("/", "nobody"),
            ("", "nobody"),
            ("/metrics", "nobody"),
            ("/v1x/applications", "nobody"),
            ("//v1/applications", "nobody"),
            ("/../v1/status", "nobody"),
        ];
        for (path, opens_for) in doors {
            for (name, role) in &roles {
                let want = if *name == opens_for {
                    Ok(())
                } else {
                    Err(opens_for)
                };
                assert_eq!(admit(role, path), want, "{name} at {path:?}");
            }
        }
    }

    /// Who may: a viewer, a deployer of the namespace, a deployer of another one, an admin.
    const EVERYBODY: [bool; 4] = [true; 4];
    const DEPLOYERS: [bool; 4] = [false, true, false, true];
    const ADMINS: [bool; 4] = [false, false, false, true];

    /// Every route of the API: a new one must be named here, and in [`takes`].
    const TABLE: &[(&str, &str, [bool; 4])] = &[
        ("GET", "/openapi.json", EVERYBODY),
        ("GET", "/v1/applications", EVERYBODY),
        ("POST", "/v1/applications", DEPLOYERS),
        ("DELETE", "/v1/applications/{namespace}/{name}", DEPLOYERS),
        ("GET", "/v1/services", EVERYBODY),
        ("GET", "/v1/bindings", EVERYBODY),
        ("GET", "/v1/clusters", EVERYBODY),
        ("DELETE", "/v1/clusters/{name}", ADMINS),
        ("POST", "/v1/clusters/{name}/drain", ADMINS),
        ("DELETE", "/v1/clusters/{name}/drain", ADMINS),
        ("POST", "/v1/clusters/{name}/invitation", ADMINS),
        ("DELETE", "/v1/clusters/{name}/invitation", ADMINS),
        ("POST", "/v1/clusters/{name}/leave", ADMINS),
        ("GET", "/v1/quotas", EVERYBODY),
        ("POST", "/v1/quotas/{namespace}", ADMINS),
        ("DELETE", "/v1/quotas/{namespace}", ADMINS),
        ("GET", "/v1/nodes", EVERYBODY),
        ("GET", "/v1/migrations", EVERYBODY),
        ("POST", "/v1/migrations", DEPLOYERS),
        (
            "GET",
            "/v1/explain/{namespace}/{application}/{service}",
            EVERYBODY,
        ),
        ("GET", "/v1/status", EVERYBODY),
        ("GET", "/v1/leads", EVERYBODY),
        ("POST", "/v1/leads", ADMINS),
        ("POST", "/v1/leads/drain", ADMINS),
        ("DELETE", "/v1/leads/{name}", ADMINS),
        ("POST", "/v1/leads/{name}/drain", ADMINS),
        ("GET", "/v1/backup", ADMINS),
        ("POST", "/v1/restore", ADMINS),
        ("GET", "/v1/tokens", ADMINS),
        ("POST", "/v1/tokens", ADMINS),
        ("DELETE", "/v1/tokens/{name}", ADMINS),
        ("GET", "/v1/revocations", ADMINS),
        ("POST", "/v1/revocations", ADMINS),
        ("GET", "/v1/audit", ADMINS),
    ];

    #[test]
    fn every_route_and_every_access_is_decided() {
        let access = |text: &str| text.parse::<Access>().unwrap();
        let who = ["viewer", "deployer/shop", "deployer/bank/mail", "admin"].map(access);
        for (method, route, may) in TABLE {
            let method = Method::from_bytes(method.as_bytes()).unwrap();
            for (access, may) in who.iter().zip(may) {
                let answer = authorise(access, &method, route, Some("shop"));
                assert_eq!(
                    answer.is_ok(),
                    *may,
                    "{access}: {method} {route}: {answer:?}"
                );
            }
        }
    }

    #[test]
    fn every_route_of_the_api_is_in_the_table_and_every_other_is_closed() {
        let listed: std::collections::BTreeSet<_> = crate::api::listed().into_iter().collect();
        let tabled = TABLE
            .iter()
            .map(|(method, route, _)| ((*method).to_owned(), *route))
            .collect();
        assert_eq!(listed, tabled);
        for (method, route) in [
            ("PUT", "/v1/applications"),
            ("GET", "/v1/secrets"),
            ("GET", ""),
        ] {
            let method = Method::from_bytes(method.as_bytes()).unwrap();
            let answer = authorise(&Access::Admin, &method, route, None);
            assert_eq!(answer, Err("nobody".to_owned()), "{method} {route}");
        }
    }

    #[test]
    fn a_refusal_says_what_it_takes() {
        let ask = |access: &str, method, route, namespace| {
            authorise(&access.parse().unwrap(), &method, route, namespace).unwrap_err()
        };
        let apply = "/v1/applications";
        let of_shop = ask("deployer/bank", Method::POST, apply, Some("shop"));
        assert_eq!(of_shop, "deployer/shop or admin");
        let unnamed = ask(
            "deployer/shop",
            Method::DELETE,
            "/v1/applications/{namespace}/{name}",
            None,
        );
        assert_eq!(unnamed, "deployer/NAMESPACE or admin");
        let any = ask("viewer", Method::POST, apply, None);
        assert_eq!(any, "deployer/NAMESPACE or admin");
        let admin = ask("deployer/shop", Method::POST, "/v1/restore", None);
        assert_eq!(admin, "admin");
    }
}
