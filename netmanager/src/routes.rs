//! Whether the mesh's prefixes are free on this node (DESIGN section 3).
//!
//! A route that covers a whole mesh prefix is harmless, because ours are more specific or come first by rule.
//! One that is equal or lies inside would take, or lose, traffic to addresses that somebody uses.

use std::fmt;

use ipnet::IpNet;

/// A route of the node that is not ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignRoute {
    /// Where it leads.
    pub prefix: IpNet,
    /// The device's name; empty for none.
    pub device: String,
    /// The routing table.
    pub table: u32,
}

/// A foreign route inside a mesh prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collision {
    /// The mesh's prefix.
    pub mesh: IpNet,
    /// The route.
    pub route: ForeignRoute,
}

impl fmt::Display for Collision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mesh, route } = self;
        write!(
            f,
            "the mesh prefix {mesh} collides with this node's route {}",
            route.prefix
        )?;
        if !route.device.is_empty() {
            write!(f, " on {}", route.device)?;
        }
        write!(
            f,
            " (table {}): give the mesh another prefix at init, or remove the route",
            route.table
        )
    }
}

impl std::error::Error for Collision {}

/// The first route that is equal to `mesh` or inside it.
#[must_use]
pub fn collision(mesh: IpNet, routes: &[ForeignRoute]) -> Option<Collision> {
    routes
        .iter()
        .find(|route| mesh.contains(&route.prefix))
        .map(|route| Collision {
            mesh,
            route: route.clone(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(prefix: &str) -> ForeignRoute {
        ForeignRoute {
            prefix: prefix.parse().unwrap(),
            device: "eth0".into(),
            table: 254,
        }
    }

    #[test]
    fn only_equal_and_more_specific_routes_collide() {
        let mesh4 = "10.16.0.0/12";
        let mesh6 = "fd12:3456:789a::/48";
        for (mesh, prefix, collides) in [
            (mesh4, "10.0.0.0/8", false),
            (mesh4, "0.0.0.0/0", false),
            (mesh4, "10.32.0.0/16", false),
            (mesh4, "10.16.0.0/12", true),
            (mesh4, "10.20.0.0/16", true),
            (mesh4, "10.31.255.255/32", true),
            (mesh6, "::/0", false),
            (mesh6, "fd12:3456:789a::/64", true),
            (mesh6, "10.20.0.0/16", false),
        ] {
            let found = collision(
                mesh.parse().unwrap(),
                &[route("192.0.2.0/24"), route(prefix)],
            );
            assert_eq!(found.is_some(), collides, "{mesh} {prefix}");
            if let Some(found) = found {
                let text = found.to_string();
                assert!(
                    text.contains(mesh) && text.contains(prefix) && text.contains("eth0"),
                    "{text}"
                );
            }
        }
    }
}
