//! Who may ask for what: the one place that says so.

use netmanager_api::identity::Role;

/// Whether a holder of `role` may ask for `path`; else which role may.
///
/// That an agent speaks only for its own cluster is checked by the stream's first message.
pub(crate) fn admit(role: &Role, path: &str) -> Result<(), &'static str> {
    let area = path.split('/').nth(1).unwrap_or_default();
    match (area, role) {
        ("v1" | "openapi.json", Role::User { .. })
        | ("weft.agent.v1.LeadDoor", Role::Agent { .. })
        | ("raft", Role::Lead { .. }) => Ok(()),
        ("v1" | "openapi.json", _) => Err("user"),
        ("weft.agent.v1.LeadDoor", _) => Err("agent"),
        ("raft", _) => Err("lead"),
        _ => Err("nobody"),
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
            ("user", Role::User { name: name() }),
        ];
        let doors = [
            ("/v1/applications", "user"),
            ("/v1/status", "user"),
            ("/openapi.json", "user"),
            ("/weft.agent.v1.LeadDoor/Follow", "agent"),
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
}
