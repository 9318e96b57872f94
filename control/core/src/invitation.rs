//! How a cluster comes into the mesh by a token, and how its agent's certificates are kept track of.
//!
//! ```text
//!  Invite{cluster, hash} --> invited --Join{cluster, hash, certificate}--> used, by one request
//!                               '-- expires, is withdrawn, or another takes its place
//! ```
//!
//! A token is good for one request: the same one gets the same certificate again, another is refused. Who joins is the
//! cluster from then on: what its name was issued before counts no more, so that an agent that was away never comes back
//! beside the new one. A cluster that is connected is nobody else's to join. No secret is here, only the token's hash.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{
    base::{ClusterState, KnowledgeBase},
    command::{Applied, Outcome, Refusal},
    name::Name,
    security::{check_hash, check_length},
};

/// How many clusters may be invited at once.
const INVITATIONS: usize = 1_000;
/// How long a token is known after its end, so that who comes late is told that, milliseconds.
const KNOWN_MS: u64 = 86_400_000;
/// The longest chain, bytes: two certificates of an elliptic curve have less than three KiB.
const CHAIN: usize = 16_384;

/// Whether a cluster is invited, and who came.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invitation {
    /// SHA-256 of the token's secret, in hexadecimal digits.
    pub hash: String,
    /// When it ends, log time.
    pub expires_ms: u64,
    /// The request that it was used for.
    #[serde(default)]
    pub used: Option<Used>,
}

/// What a token was used for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Used {
    /// SHA-256 of the request, in hexadecimal digits.
    pub request: String,
    /// The answer: the certificate and who signed it, PEM.
    pub chain: String,
    /// Log time.
    pub at_ms: u64,
}

/// A certificate that a lead signed for who shows a token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Join {
    /// The cluster.
    pub cluster: Name,
    /// SHA-256 of the secret that was shown.
    pub hash: String,
    /// SHA-256 of the request.
    pub request: String,
    /// The certificate and who signed it, PEM.
    pub chain: String,
    /// When it was issued, as it says; milliseconds since the Unix epoch.
    pub issued_ms: u64,
}

/// A certificate that a lead signed for an agent that has one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewal {
    /// The cluster.
    pub cluster: Name,
    /// SHA-256 of the certificate that the agent has shown.
    pub shown: String,
    /// When that one was issued, as it says; milliseconds since the Unix epoch.
    pub shown_issued_ms: u64,
    /// When the new one ends; milliseconds since the Unix epoch.
    pub ends_ms: u64,
}

fn not_invited(cluster: &Name, why: impl Into<String>) -> Refusal {
    Refusal::NotInvited {
        cluster: cluster.clone(),
        why: why.into(),
    }
}

impl KnowledgeBase {
    /// The holder of a cluster's agent's certificates.
    #[must_use]
    pub fn agent(&self, cluster: &Name) -> String {
        let mesh = self.mesh.as_ref().map_or("", |mesh| &mesh.name);
        format!("weft://{mesh}/agent/{cluster}")
    }

    /// Up to when what a holder was issued counts no more, milliseconds since the Unix epoch; 0 where nothing is revoked.
    #[must_use]
    pub fn revoked_until(&self, holder: &str) -> u64 {
        self.security.holders.get(holder).copied().unwrap_or(0)
    }

    /// What `request` got, if it was answered before; an error where the token is no good for it, by the clock `now_ms`.
    ///
    /// # Errors
    /// With the reason.
    pub fn may_join(
        &self,
        cluster: &Name,
        hash: &str,
        request: &str,
        now_ms: u64,
    ) -> Result<Option<&Used>, Refusal> {
        // Hashes are compared, of secrets nobody can guess: how long that takes says nothing. Who shows another secret is
        // not told whether there is a token for the cluster.
        let invitation = self.security.invitations.get(cluster);
        let Some(invitation) = invitation.filter(|it| it.hash == hash) else {
            let why = "the token is none, was taken back, or another was made after it";
            return Err(not_invited(cluster, why));
        };
        match &invitation.used {
            Some(used) if used.request == request => return Ok(Some(used)),
            Some(_) => {
                let why = "the token was used by somebody else: it is good for one agent";
                return Err(not_invited(cluster, why));
            }
            None => {}
        }
        if invitation.expires_ms <= now_ms.max(self.log_time_ms) {
            return Err(not_invited(cluster, "the token has expired"));
        }
        self.is_free(cluster)?;
        Ok(None)
    }

    /// Whether nobody is that cluster now.
    fn is_free(&self, cluster: &Name) -> Result<(), Refusal> {
        let known = self.clusters.get(cluster);
        match known.map(|known| known.state) {
            Some(ClusterState::Ready) => Err(Refusal::ClusterConnected(cluster.clone())),
            _ => Ok(()),
        }
    }

    pub(crate) fn invite(&mut self, cluster: &Name, hash: &str, lasts_ms: u64) -> Outcome {
        check_hash("hash", hash)?;
        self.is_free(cluster)?;
        let now = self.log_time_ms;
        let invitations = &mut self.security.invitations;
        invitations.retain(|_, it| it.expires_ms.saturating_add(KNOWN_MS) > now);
        if !invitations.contains_key(cluster) && invitations.len() >= INVITATIONS {
            invitations.retain(|_, it| it.expires_ms > now && it.used.is_none());
        }
        match invitations.get(cluster) {
            Some(known) if known.hash == hash => return Ok(Applied::Unchanged),
            None if invitations.len() >= INVITATIONS => {
                return Err(Refusal::Exhausted {
                    what: "invitations of clusters".to_owned(),
                    size: INVITATIONS as u64,
                });
            }
            _ => {}
        }
        let invitation = Invitation {
            hash: hash.to_owned(),
            expires_ms: now.saturating_add(lasts_ms),
            used: None,
        };
        invitations.insert(cluster.clone(), invitation);
        Ok(Applied::Changed)
    }

    pub(crate) fn withdraw(&mut self, cluster: &Name) -> Outcome {
        match self.security.invitations.remove(cluster) {
            Some(_) => Ok(Applied::Changed),
            None => Ok(Applied::Unchanged),
        }
    }

    pub(crate) fn join(&mut self, join: &Join) -> Outcome {
        let Join {
            cluster,
            hash,
            request,
            chain,
            issued_ms,
        } = join;
        check_hash("request", request)?;
        check_length("chain", chain, CHAIN)?;
        if self.may_join(cluster, hash, request, 0)?.is_some() {
            return Ok(Applied::Unchanged);
        }
        let holder = self.agent(cluster);
        if self.revoked_until(&holder) >= *issued_ms {
            return Err(Refusal::Revoked { holder });
        }
        // Whoever had a certificate of that name is not who comes now.
        self.revoke_until(&holder, issued_ms.saturating_sub(1))?;
        let used = Used {
            request: request.clone(),
            chain: chain.clone(),
            at_ms: self.log_time_ms,
        };
        if let Some(invitation) = self.security.invitations.get_mut(cluster) {
            invitation.used = Some(used);
        }
        Ok(Applied::Changed)
    }

    /// Notes that an agent gets another certificate, unless the one that it has shown is revoked.
    pub(crate) fn renewed(&mut self, renewal: &Renewal) -> Outcome {
        check_hash("shown", &renewal.shown)?;
        let holder = self.agent(&renewal.cluster);
        let is_revoked = self.revoked_until(&holder) >= renewal.shown_issued_ms
            || self.security.certificates.contains_key(&renewal.shown);
        if is_revoked {
            return Err(Refusal::Revoked { holder });
        }
        self.note_certificate(&renewal.cluster, renewal.ends_ms)
    }

    /// Notes when the certificate ends that a cluster's agent has.
    pub(crate) fn note_certificate(&mut self, cluster: &Name, ends_ms: u64) -> Outcome {
        let known = self
            .clusters
            .get_mut(cluster)
            .ok_or_else(|| Refusal::UnknownCluster(cluster.clone()))?;
        if known.certificate_ends_ms.replace(ends_ms) == Some(ends_ms) {
            Ok(Applied::Unchanged)
        } else {
            Ok(Applied::Changed)
        }
    }

    /// Ends what a holder was issued up to `until_ms`, and an invitation that was made before that.
    fn revoke_until(&mut self, holder: &str, until_ms: u64) -> Result<(), Refusal> {
        if !self.security.holders.contains_key(holder) {
            self.security.check_room()?;
        }
        let until = Arc::make_mut(&mut self.security.holders)
            .entry(holder.to_owned())
            .or_default();
        *until = (*until).max(until_ms);
        Ok(())
    }

    /// Takes an invitation back whose cluster's agent is `holder`: it would let in again who was just shut out.
    pub(crate) fn withdraw_of(&mut self, holder: &str) {
        let invited: Vec<Name> = self.security.invitations.keys().cloned().collect();
        for cluster in invited {
            if self.agent(&cluster) == holder {
                self.security.invitations.remove(&cluster);
            }
        }
    }
}

/// The invitations by cluster.
pub type Invitations = BTreeMap<Name, Invitation>;

#[cfg(test)]
mod tests;
