//! Certificates that count no more, though they have not expired.
//!
//! ```text
//!  leads' state --> RevokedList of every lead --> TLS of its door and of its calls
//!       '--> with the assignments --> RevokedList of every agent --> TLS of its node door and of its calls
//! ```
//!
//! Either every certificate of a holder that was issued up to a moment, so that who lost one gets another under the
//! same name; or one certificate by its fingerprint.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
};

use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use super::{IdentityError, Shown, held::Held};

/// What is revoked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revoked {
    /// Holders ([`Identity::holder`](super::Identity::holder)), whose certificates issued up to this time count no
    /// more, milliseconds since the Unix epoch.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub holders: BTreeMap<String, u64>,
    /// Certificates by fingerprint, with their holder.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub certificates: BTreeMap<String, String>,
}

impl Revoked {
    /// Whether this certificate is revoked, or one of who signed it.
    #[must_use]
    pub fn holds(&self, shown: &Shown) -> bool {
        // The usual case, asked whenever something is read.
        if self.is_empty() {
            return false;
        }
        self.names(shown) || shown.signers.iter().any(|signer| self.names(signer))
    }

    fn names(&self, shown: &Shown) -> bool {
        let until = self.holders.get(&shown.identity.holder());
        until.is_some_and(|until| shown.issued_ms <= *until)
            || self.certificates.contains_key(&shown.fingerprint)
    }

    /// Whether nothing is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.holders.is_empty() && self.certificates.is_empty()
    }
}

/// What is revoked, as the doors of one process look it up; clones are the same list.
#[derive(Clone, Debug, Default)]
pub struct RevokedList {
    revoked: Arc<RwLock<Revoked>>,
    /// The authorities that count; `None` where nobody holds any.
    held: Option<Arc<Held>>,
}

impl RevokedList {
    pub(super) fn of(held: Arc<Held>) -> Self {
        Self {
            revoked: Arc::default(),
            held: Some(held),
        }
    }

    /// False when the authorities have changed since `asked`, and none vouches for who has shown this.
    pub(super) fn has_an_authority_for(&self, shown: &Shown, asked: &mut u64) -> bool {
        let held = self.held.as_ref();
        held.is_none_or(|held| held.vouches_for(shown, asked))
    }

    /// The fingerprints of the authorities that count, the one that signs first; none where nobody holds any.
    #[must_use]
    pub fn authorities(&self) -> Vec<String> {
        let held = self.held.as_ref();
        held.map(|held| held.current().authorities.clone())
            .unwrap_or_default()
    }

    /// What a chain says, if these doors would take it now: an authority vouches for it, and it is not revoked.
    ///
    /// # Errors
    /// With the reason why they would not.
    pub fn accept(&self, chain: &[CertificateDer<'_>]) -> Result<Shown, IdentityError> {
        let held = self.held.as_ref();
        let held = held.ok_or_else(|| IdentityError::Authority("there is none".to_owned()))?;
        held.current()
            .vouch_for(chain)
            .map_err(IdentityError::Own)?;
        let shown = Shown::of_chain(chain)?;
        if self.holds(&shown) {
            let revoked = rustls::CertificateError::Revoked.into();
            return Err(IdentityError::Own(revoked));
        }
        Ok(shown)
    }

    /// From now on this is revoked, and nothing else.
    pub fn set(&self, revoked: Revoked) {
        *self.revoked.write().unwrap_or_else(PoisonError::into_inner) = revoked;
    }

    /// Whether this certificate is revoked.
    #[must_use]
    pub fn holds(&self, shown: &Shown) -> bool {
        self.revoked
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .holds(shown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(identity: &str, issued_ms: u64) -> Shown {
        Shown {
            identity: identity.parse().unwrap(),
            fingerprint: format!("{issued_ms:064x}"),
            issued_ms,
            expires_ms: u64::MAX,
            chain: Vec::new(),
            signers: Vec::new(),
        }
    }

    #[test]
    fn a_holder_s_older_certificates_are_revoked_and_a_new_one_is_not() {
        let revoked = Revoked {
            holders: BTreeMap::from([("weft://m/user/ann".to_owned(), 1_000)]),
            certificates: BTreeMap::new(),
        };
        let list = RevokedList::default();
        list.set(revoked);
        for (identity, issued_ms, want) in [
            ("weft://m/user/ann", 999, true),
            ("weft://m/user/ann", 1_000, true),
            ("weft://m/user/ann", 1_001, false),
            // Whatever she may do.
            ("weft://m/user/ann/deployer/shop", 5, true),
            ("weft://m/user/bob", 5, false),
            ("weft://m/lead/ann", 5, false),
            ("weft://n/user/ann", 5, false),
        ] {
            let shown = shown(identity, issued_ms);
            assert_eq!(list.holds(&shown), want, "{identity} of {issued_ms}");
        }
    }

    #[test]
    fn what_a_revoked_one_has_signed_is_revoked_with_it() {
        let signer = shown("weft://m/lead/a", 5);
        let signed = Shown {
            signers: vec![signer.clone()],
            ..shown("weft://m/agent/edge", 9)
        };
        let by_holder = BTreeMap::from([(signer.identity.holder(), 5)]);
        let by_print = BTreeMap::from([(signer.fingerprint, signer.identity.holder())]);
        for (holders, certificates) in [(by_holder, BTreeMap::new()), (BTreeMap::new(), by_print)] {
            let revoked = Revoked {
                holders,
                certificates,
            };
            assert!(revoked.holds(&signed), "{revoked:?}");
            assert!(!revoked.holds(&shown("weft://m/agent/edge", 9)));
        }
    }

    #[test]
    fn one_certificate_is_revoked_and_its_holder_s_others_are_not() {
        let stolen = shown("weft://m/node/edge/n1", 5);
        let revoked = Revoked {
            holders: BTreeMap::new(),
            certificates: BTreeMap::from([(stolen.fingerprint.clone(), stolen.identity.holder())]),
        };
        assert!(revoked.holds(&stolen));
        assert!(!revoked.holds(&shown("weft://m/node/edge/n1", 4)));
    }
}
