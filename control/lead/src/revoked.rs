//! What is revoked, from the Knowledge Base to the doors.

use std::{sync::Arc, time::Duration};

use control_core::{base::KnowledgeBase, name::Name};
use netmanager_api::identity::{Revoked, RevokedList};

use crate::{lead::Lead, replica::Replica};

/// Changes within this time are looked at together: the log may be busy with other things.
const COALESCE: Duration = Duration::from_millis(250);

/// Everything that is revoked.
pub(crate) fn all(base: &KnowledgeBase) -> Revoked {
    Revoked {
        holders: base.security.holders.clone(),
        certificates: base.security.certificates.clone(),
    }
}

/// What an agent must know: of the leads that it dials, and of the nodes that dial it.
pub(crate) fn concerning(base: &KnowledgeBase, cluster: &Name) -> Revoked {
    let mesh = base.mesh.as_ref().map_or("", |mesh| &mesh.name);
    let leads = format!("weft://{mesh}/lead/");
    let nodes = format!("weft://{mesh}/node/{cluster}/");
    let concerns = |holder: &str| holder.starts_with(&leads) || holder.starts_with(&nodes);
    let holders = base.security.holders.iter();
    let certificates = base.security.certificates.iter();
    Revoked {
        holders: holders
            .filter(|(holder, _)| concerns(holder))
            .map(|(holder, until)| (holder.clone(), *until))
            .collect(),
        certificates: certificates
            .filter(|(_, holder)| concerns(holder))
            .map(|(certificate, holder)| (certificate.clone(), holder.clone()))
            .collect(),
    }
}

/// Makes `list` what the replica says.
pub(crate) fn show(replica: &Replica, list: &RevokedList) {
    list.set(replica.read(all));
}

/// Keeps `list` what the lead's replica says.
pub(crate) async fn follow(lead: Arc<Lead>, list: RevokedList) {
    let mut applied = lead.replica.watch();
    loop {
        applied.mark_unchanged();
        show(&lead.replica, &list);
        if applied.changed().await.is_err() {
            return;
        }
        tokio::time::sleep(COALESCE).await;
    }
}
