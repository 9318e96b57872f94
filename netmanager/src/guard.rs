//! Keeps packets of the mesh from leaving by a default route before the daemon runs.
//!
//! Guards are routes and rules: they outlive the daemon, not the machine. What a node guarded last is on disk, and is
//! put back by the daemon before it does anything else, or earlier in a boot by `weft-netmanager guard`, which needs
//! neither programs nor a network. A node that never had a table has nothing to guard.

use ipnet::IpNet;

use crate::{
    links::{Links, LinksError},
    store::{Store, StoreError},
};

/// The prefixes of the mesh that are guarded here.
const FILE: &str = "guards.json";

/// Why the guards could not be put back.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// What was guarded cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The host's network.
    #[error(transparent)]
    Links(#[from] LinksError),
}

/// What is guarded, by the disk.
///
/// # Errors
/// When the disk does not tell.
pub fn kept(store: &Store) -> Result<Vec<IpNet>, StoreError> {
    Ok(store.load(FILE)?.unwrap_or_default())
}

/// Notes what is guarded from now on.
///
/// # Errors
/// When the disk refuses.
pub fn keep(store: &Store, prefixes: &[IpNet]) -> Result<(), StoreError> {
    store.save(FILE, &prefixes)
}

/// Puts the guards back that the node had last.
///
/// # Errors
/// When the disk does not tell, or the kernel refuses.
pub async fn raise(store: &Store, links: &Links) -> Result<(), GuardError> {
    let prefixes = kept(store)?;
    if !prefixes.is_empty() {
        links.ensure_guards(&prefixes).await?;
        tracing::info!(?prefixes, "guarded what the node guarded last");
    }
    Ok(())
}
