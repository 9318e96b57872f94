//! Whether the mesh's prefixes are free here, and how the node goes on where one is not.

use std::sync::Arc;

use ipnet::IpNet;
use netmanager_api::table::Table;

use super::node::{Node, ReconcileError};
use crate::routes::collision;

impl Node {
    /// The table as this node may forward by it: refused where the IPv6 prefix collides, without IPv4 where
    /// that one does.
    pub(super) async fn check_prefixes(
        &self,
        received: &Arc<Table>,
    ) -> Result<Arc<Table>, ReconcileError> {
        let mut own: Vec<u32> = self.planner.have().endpoints.keys().copied().collect();
        own.extend(self.parts.tunnel.devices());
        let (name, peer) = &self.parts.settings.endpoint_names;
        for link in [name, peer] {
            own.extend(
                self.parts
                    .links
                    .by_name(link)
                    .await?
                    .map(|link| link.ifindex),
            );
        }
        let foreign = self.parts.links.foreign_routes(&own).await?;
        let mesh = &received.mesh;
        if let Some(collision) = collision(IpNet::V6(mesh.prefix6), &foreign) {
            return Err(collision.into());
        }
        match mesh
            .prefix4
            .and_then(|prefix| collision(IpNet::V4(prefix), &foreign))
        {
            None => Ok(received.clone()),
            Some(collision) => {
                let is_known = self
                    .table
                    .as_ref()
                    .is_some_and(|table| table.mesh.prefix4.is_none());
                if !is_known {
                    tracing::error!(%collision, "this node goes on without IPv4");
                }
                Ok(Arc::new(without_ipv4(received)))
            }
        }
    }
}

/// The table as a node without IPv4 has it.
pub(super) fn without_ipv4(table: &Table) -> Table {
    let mut table = table.clone();
    table.mesh.prefix4 = None;
    for service in &mut table.services {
        for vip in &mut service.vips {
            vip.addr4 = None;
        }
        for backend in &mut service.backends {
            backend.addr4 = None;
        }
    }
    table
}
