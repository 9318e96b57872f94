//! What is revoked, from the Knowledge Base to the doors.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use control_core::{base::KnowledgeBase, name::Name};
use netmanager_api::identity::{Revoked, RevokedList};

use crate::{lead::Lead, replica::Replica};

/// Changes within this time are looked at together: the log may be busy with other things.
const COALESCE: Duration = Duration::from_millis(250);

/// Everything that is revoked, shared with the Knowledge Base.
#[derive(Clone, Debug)]
struct Known {
    holders: Arc<BTreeMap<String, u64>>,
    certificates: Arc<BTreeMap<String, String>>,
}

impl Known {
    fn of(base: &KnowledgeBase) -> Self {
        Self {
            holders: base.security.holders.clone(),
            certificates: base.security.certificates.clone(),
        }
    }

    /// Whether nothing was revoked between the two.
    fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.holders, &other.holders)
            && Arc::ptr_eq(&self.certificates, &other.certificates)
    }

    fn where_holder(&self, concerns: impl Fn(&str) -> bool) -> Revoked {
        let holders = self.holders.iter();
        let certificates = self.certificates.iter();
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
}

/// What an agent must know: of the leads that it dials, and of the nodes that dial it. Looked for again only when
/// something was revoked.
#[derive(Debug, Default)]
pub(crate) struct Concerning {
    looked_at: Option<Known>,
    found: Revoked,
}

impl Concerning {
    /// What concerns `cluster` now.
    pub(crate) fn look(&mut self, base: &KnowledgeBase, cluster: &Name) -> &Revoked {
        let known = Known::of(base);
        if self.looked_at.as_ref().is_none_or(|last| !last.is(&known)) {
            let mesh = base.mesh.as_ref().map_or("", |mesh| &mesh.name);
            let leads = format!("weft://{mesh}/lead/");
            let nodes = format!("weft://{mesh}/node/{cluster}/");
            let concerns = |holder: &str| holder.starts_with(&leads) || holder.starts_with(&nodes);
            self.found = known.where_holder(concerns);
            self.looked_at = Some(known);
        }
        &self.found
    }
}

/// Makes `list` what the replica says.
pub(crate) fn show(replica: &Replica, list: &RevokedList) {
    let known = replica.read(Known::of);
    list.set(known.where_holder(|_| true));
}

/// Keeps `list` what the lead's replica says.
pub(crate) async fn follow(lead: Arc<Lead>, list: RevokedList) {
    let mut applied = lead.replica.watch();
    let mut shown: Option<Known> = None;
    loop {
        applied.mark_unchanged();
        let known = lead.replica.read(Known::of);
        if shown.as_ref().is_none_or(|shown| !shown.is(&known)) {
            list.set(known.where_holder(|_| true));
            shown = Some(known);
        }
        if applied.changed().await.is_err() {
            return;
        }
        tokio::time::sleep(COALESCE).await;
    }
}

#[cfg(test)]
mod tests {
    use control_core::command::{Batch, Command};

    use super::*;
    use crate::tables::tests::{base, edge};

    fn revoke(base: &mut KnowledgeBase, holder: &str) {
        let command = Command::RevokeCertificate {
            holder: holder.to_owned(),
            certificate: None,
        };
        let batch = Batch {
            log_time_ms: base.log_time_ms + 1,
            commands: vec![command],
        };
        assert!(base.apply(base.index + 1, &batch)[0].is_ok());
    }

    #[test]
    fn what_concerns_a_cluster_is_looked_for_when_something_was_revoked_and_only_then() {
        let (mut base, mut concerning) = (base(), Concerning::default());
        let mut look = |base: &KnowledgeBase| {
            let found = concerning.look(base, &edge());
            found.holders.keys().cloned().collect::<Vec<_>>()
        };
        assert_eq!(look(&base), Vec::<String>::new());
        for holder in ["lead/a", "node/edge/n1", "node/edge-2/n1", "user/ann"] {
            revoke(&mut base, &format!("weft://demo/{holder}"));
        }
        let want = ["weft://demo/lead/a", "weft://demo/node/edge/n1"];
        assert_eq!(look(&base), want);
        // The same list: it is not looked through for a cluster that nothing new concerns.
        let fog = "fog".parse().unwrap();
        assert_eq!(concerning.look(&base, &fog).holders.len(), 2);
        revoke(&mut base, "weft://demo/user/bob");
        assert_eq!(concerning.look(&base, &fog).holders.len(), 1);
    }
}
