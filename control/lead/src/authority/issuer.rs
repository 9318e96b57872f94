//! What a lead signs with for the authority, and what it signs: certificates of agents, for those who join by a token.
//!
//! ```text
//!  ca.key --weft cert --issuer--> LEAD/issuer.crt issuer.key (0600)     it may sign, and nothing below it may
//!            a request (CSR) --sign--> tls.crt: the agent's certificate, then issuer.crt
//! ```
//!
//! The issuer's certificate names the lead, so that what is revoked of the lead's is revoked of all that it signed. Who
//! checks a chain takes agents and nodes from it and nobody else (`netmanager_api::identity`).

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use netmanager_api::identity::{
    Identity, IdentityError, RevokedList, Role, Shown,
    files::{self, Fresh},
    fingerprint,
};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, IsCa, Issuer as Signer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519,
    SanType,
};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use time::OffsetDateTime;

use super::{
    AuthorityError, LEAF_DAYS, Validity, check_label, issue, leaf_params, named, read,
    refuse_existing, rotation, sign_as, write_new,
};

const CERTIFICATE: &str = "issuer.crt";
const KEY: &str = "issuer.key";

/// How long a certificate lasts that a lead signs: its holder renews it by itself.
const LASTS: Duration = Duration::from_secs(30 * 86_400);
/// The longest request, bytes: one for an elliptic curve has less than one KiB.
const LONGEST: usize = 4_096;

/// Lets the lead `name` sign: what it signs with goes into `out`, beside its own certificate, which is issued, too, where
/// there is none.
///
/// # Errors
/// When it may sign already, `out` is of somebody else, or a file cannot be written.
pub fn delegate(ca: &Path, name: &str, out: &Path) -> Result<Identity, AuthorityError> {
    check_label("name", name)?;
    let paths = [CERTIFICATE, KEY].map(|file| out.join(file));
    refuse_existing(&paths)?;
    let role = Role::Lead {
        name: name.to_owned(),
    };
    let identity = if files::existing(out).is_some() {
        rotation::holder(ca, out)?
    } else {
        issue(ca, role.clone(), out)?
    };
    if identity.role != role {
        return Err(AuthorityError::OtherHolder {
            path: out.join("tls.crt"),
            found: identity.to_string(),
            name: name.to_owned(),
        });
    }
    let (certificate, key) = sign_as(ca, params(&identity))?;
    let [certificate_path, key_path] = &paths;
    write_new(key_path, key.as_bytes(), 0o600)?;
    write_new(certificate_path, certificate.as_bytes(), 0o644)?;
    Ok(identity)
}

/// What takes the place of what the lead `identity` signs with, if `dir` holds that; written, and not yet in its place.
pub(super) fn renewed(
    ca: &Path,
    identity: &Identity,
    dir: &Path,
) -> Result<Vec<Fresh>, AuthorityError> {
    let (certificate_path, key_path) = (dir.join(CERTIFICATE), dir.join(KEY));
    if !certificate_path.exists() || !matches!(identity.role, Role::Lead { .. }) {
        return Ok(Vec::new());
    }
    let (certificate, key) = sign_as(ca, params(identity))?;
    let write = |path: PathBuf, text: String, mode| {
        files::write_beside(path.clone(), text.as_bytes(), mode)
            .map_err(|source| rotation::not_replaced(&path, source))
    };
    Ok(vec![
        write(certificate_path, certificate, 0o644)?,
        write(key_path, key, 0o600)?,
    ])
}

fn params(identity: &Identity) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = named(&format!("{identity} signs"));
    params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.use_authority_key_identifier_extension = true;
    Validity::days(LEAF_DAYS).put_into(&mut params);
    Ok(params)
}

/// Why a lead signs nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IssueError {
    /// It may not.
    #[error(
        "lead {0} signs no certificates: give it an issuer (weft cert --ca ca --role lead --name {0} --issuer --out \
         its credentials folder)"
    )]
    None(String),
    /// What was asked for.
    #[error("the request for a certificate does not serve: {0}")]
    Request(String),
    /// What it signs with.
    #[error("the issuer of lead {name} does not serve: {why}; weft renew makes another")]
    Issuer {
        /// Which lead.
        name: String,
        /// Why.
        why: String,
    },
}

/// A certificate that was signed.
#[derive(Clone, Debug)]
pub(crate) struct Issued {
    /// With the issuer's, PEM.
    pub(crate) chain: String,
    /// What it says.
    pub(crate) shown: Shown,
}

/// Which request this is: its SHA-256.
pub(crate) fn request_print(request: &str) -> String {
    fingerprint(request.trim().as_bytes())
}

/// What a lead signs with, read whenever it signs: it may be renewed meanwhile.
#[derive(Debug)]
pub(crate) struct Issuer {
    /// Its credentials.
    pub(crate) dir: PathBuf,
    /// The lead's name.
    pub(crate) name: String,
    /// By which authorities its doors go: what they would not take is not given away.
    pub(crate) doors: RevokedList,
}

impl Issuer {
    /// When it ends, milliseconds since the Unix epoch; `None` where the lead may not sign.
    pub(crate) fn ends_ms(&self) -> Option<u64> {
        let shown = Shown::of_file(&self.dir.join(CERTIFICATE)).ok();
        shown.map(|shown| shown.expires_ms)
    }

    /// The authorities that count, PEM.
    pub(crate) fn authorities(&self) -> Result<String, IssueError> {
        self.read("ca.crt")
    }

    /// Answers `request` with a certificate for `identity` that was issued after `after_ms`, by this clock: what is
    /// revoked of the holder up to then does not concern it.
    pub(crate) fn sign(
        &self,
        identity: &Identity,
        request: &str,
        now_ms: u64,
        after_ms: u64,
    ) -> Result<Issued, IssueError> {
        let wish = parse(request)?;
        let (own, signer) = self.signer()?;
        let bad = |why: &dyn std::fmt::Display| self.bad(why);
        let ends = own.expires_ms.min(now_ms.saturating_add(millis(LASTS)));
        // Certificates say whole seconds: of this one, so that what is revoked from now on revokes it, too.
        let issued = (now_ms / 1_000).max(after_ms / 1_000 + u64::from(after_ms > 0));
        let moment = |seconds: u64| {
            let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
            OffsetDateTime::from_unix_timestamp(seconds).map_err(|error| bad(&error))
        };
        let validity = Validity {
            issued: moment(issued)?,
            ends: moment(ends / 1_000)?,
        };
        let signed = leaf_params(identity, validity)
            .and_then(|params| params.signed_by(&wish.public_key, &signer))
            .map_err(|error| bad(&error))?;
        let chain = format!("{}{}", signed.pem(), self.read(CERTIFICATE)?);
        let certificates: Result<Vec<_>, _> =
            CertificateDer::pem_slice_iter(chain.as_bytes()).collect();
        let certificates = certificates.map_err(|error| bad(&error))?;
        let shown = self
            .doors
            .accept(&certificates)
            .map_err(|error| match error {
                IdentityError::Own(why) => bad(&why),
                error => bad(&error),
            })?;
        Ok(Issued { chain, shown })
    }

    fn signer(&self) -> Result<(Shown, Signer<'static, KeyPair>), IssueError> {
        if !self.dir.join(CERTIFICATE).exists() {
            return Err(IssueError::None(self.name.clone()));
        }
        let key_path = self.dir.join(KEY);
        netmanager_api::identity::check_secret_mode(&key_path).map_err(|error| self.bad(&error))?;
        let key = KeyPair::from_pem(&self.read(KEY)?).map_err(|error| self.bad(&error))?;
        let text = self.read(CERTIFICATE)?;
        let signer = Signer::from_ca_cert_pem(&text, key).map_err(|error| self.bad(&error))?;
        let own = Shown::of_file(&self.dir.join(CERTIFICATE)).map_err(|error| self.bad(&error))?;
        Ok((own, signer))
    }

    fn read(&self, name: &str) -> Result<String, IssueError> {
        read(&self.dir.join(name)).map_err(|error| self.bad(&error))
    }

    fn bad(&self, why: &dyn std::fmt::Display) -> IssueError {
        IssueError::Issuer {
            name: self.name.clone(),
            why: why.to_string(),
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A request, of which only the key counts, and that its sender has it.
fn parse(request: &str) -> Result<CertificateSigningRequestParams, IssueError> {
    let bad = |why: String| IssueError::Request(why);
    if request.len() > LONGEST {
        return Err(bad(format!("it has more than {LONGEST} bytes")));
    }
    let wish = CertificateSigningRequestParams::from_pem(request)
        .map_err(|error| bad(error.to_string()))?;
    let good = [
        &PKCS_ECDSA_P256_SHA256,
        &PKCS_ECDSA_P384_SHA384,
        &PKCS_ED25519,
    ];
    if good.contains(&wish.public_key.algorithm()) {
        Ok(wish)
    } else {
        Err(bad(
            "its key is none of ECDSA P-256, P-384 and Ed25519".to_owned()
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use netmanager_api::identity::Credentials;

    use super::{
        super::{Wish, init, rotation},
        *,
    };

    struct Mesh {
        dir: tempfile::TempDir,
    }

    impl Mesh {
        /// A mesh with a lead that signs.
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let wish = Wish {
                name: "demo".to_owned(),
                prefix4: None,
                prefix6: None,
            };
            init(&dir.path().join("ca"), &wish).unwrap();
            let mesh = Self { dir };
            delegate(&mesh.path("ca"), "a", &mesh.path("a")).unwrap();
            mesh
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn issuer(&self) -> Issuer {
            Issuer {
                dir: self.path("a"),
                name: "a".to_owned(),
                doors: Credentials::load(&self.path("a")).unwrap().revoked(),
            }
        }
    }

    fn identity(text: &str) -> Identity {
        text.parse().unwrap()
    }

    /// For this key, with more in it than counts.
    fn request(key: &KeyPair) -> String {
        let mut params = CertificateParams::default();
        let uri = "weft://demo/user/eve".try_into().unwrap();
        params.subject_alt_names.push(SanType::URI(uri));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.serialize_request(key).unwrap().pem().unwrap()
    }

    fn now_ms() -> u64 {
        u64::try_from(OffsetDateTime::now_utc().unix_timestamp()).unwrap() * 1_000
    }

    #[test]
    fn of_a_request_only_the_key_counts_and_the_answer_serves() {
        let (mesh, key) = (Mesh::new(), KeyPair::generate().unwrap());
        let edge = identity("weft://demo/agent/edge");
        let (issuer, now_ms) = (mesh.issuer(), now_ms());
        let issued = issuer.sign(&edge, &request(&key), now_ms, 0).unwrap();
        assert_eq!(issued.shown.identity, edge);
        assert_eq!(issued.shown.issued_ms, now_ms);
        assert_eq!(issued.shown.expires_ms, now_ms + millis(LASTS));
        let files = files::Files {
            chain: issued.chain.into(),
            key: key.serialize_pem().into(),
            authorities: fs::read(mesh.path("ca/ca.crt")).unwrap(),
        };
        assert_eq!(files.check().unwrap().identity, edge);
        // What was revoked a moment ago does not concern it.
        let later = issuer
            .sign(&edge, &request(&key), now_ms, now_ms + 1_500)
            .unwrap();
        assert_eq!(later.shown.issued_ms, now_ms + 2_000);
    }

    #[test]
    fn an_issuer_signs_for_agents_and_nodes_and_for_nobody_else() {
        let (mesh, key) = (Mesh::new(), KeyPair::generate().unwrap());
        let (issuer, now_ms) = (mesh.issuer(), now_ms());
        let node = identity("weft://demo/node/edge/n1");
        issuer.sign(&node, &request(&key), now_ms, 0).unwrap();
        for who in ["user/eve", "lead/a", "lead/b", "user/eve/viewer"] {
            let who = identity(&format!("weft://demo/{who}"));
            let error = issuer.sign(&who, &request(&key), now_ms, 0).unwrap_err();
            let error = error.to_string();
            assert!(error.contains("only for agents and nodes"), "{error}");
        }
    }

    #[test]
    fn what_is_no_request_is_refused() {
        let mesh = Mesh::new();
        let edge = identity("weft://demo/agent/edge");
        let good = request(&KeyPair::generate().unwrap());
        let broken = good.replacen('A', "B", 40);
        for bad in ["", "-----BEGIN", &broken, &good.repeat(20)] {
            let error = mesh.issuer().sign(&edge, bad, now_ms(), 0).unwrap_err();
            assert!(matches!(error, IssueError::Request(_)), "{error}");
        }
    }

    #[test]
    fn a_lead_without_an_issuer_or_with_a_revoked_one_says_what_to_do() {
        let (mesh, key) = (Mesh::new(), KeyPair::generate().unwrap());
        let edge = identity("weft://demo/agent/edge");
        let sign = |issuer: &Issuer| issuer.sign(&edge, &request(&key), now_ms(), 0);
        let issuer = mesh.issuer();
        let revoked = netmanager_api::identity::Revoked {
            holders: [("weft://demo/lead/a".to_owned(), u64::MAX)].into(),
            ..Default::default()
        };
        issuer.doors.set(revoked);
        let error = sign(&issuer).unwrap_err().to_string();
        assert!(error.contains("Revoked"), "{error}");
        fs::remove_file(mesh.path("a").join(CERTIFICATE)).unwrap();
        let error = sign(&issuer).unwrap_err().to_string();
        assert!(
            error.contains("weft cert --ca ca --role lead --name a --issuer"),
            "{error}"
        );
        assert_eq!(issuer.ends_ms(), None);
    }

    #[test]
    fn an_issuer_goes_along_when_the_authority_is_replaced() {
        let (mesh, key) = (Mesh::new(), KeyPair::generate().unwrap());
        let edge = identity("weft://demo/agent/edge");
        let (ca, lead) = (&mesh.path("ca"), &mesh.path("a"));
        let sign = || mesh.issuer().sign(&edge, &request(&key), now_ms(), 0);
        let trust = || fs::copy(ca.join("ca.crt"), lead.join("ca.crt")).unwrap();
        let old = sign().unwrap();
        rotation::prepare(ca).unwrap();
        trust();
        sign().unwrap();
        rotation::switch(ca).unwrap();
        let before = fs::read(lead.join(KEY)).unwrap();
        rotation::renew(ca, lead).unwrap();
        assert_ne!(fs::read(lead.join(KEY)).unwrap(), before);
        let new = sign().unwrap();
        // Both count until the old authority does not.
        let doors = || Credentials::load(lead).unwrap().revoked();
        let chain = |issued: &Issued| {
            CertificateDer::pem_slice_iter(issued.chain.as_bytes())
                .map(Result::unwrap)
                .collect::<Vec<_>>()
        };
        doors().accept(&chain(&old)).unwrap();
        rotation::retire(ca).unwrap();
        trust();
        doors().accept(&chain(&new)).unwrap();
        assert!(doors().accept(&chain(&old)).is_err());
        sign().unwrap();
    }

    #[test]
    fn an_issuer_is_made_beside_its_lead_s_certificate_and_nowhere_else() {
        let mesh = Mesh::new();
        let (ca, lead) = (&mesh.path("ca"), &mesh.path("a"));
        let again = delegate(ca, "a", lead);
        assert!(matches!(again, Err(AuthorityError::Exists { .. })));
        let role = Role::Lead {
            name: "b".to_owned(),
        };
        issue(ca, role, &mesh.path("b")).unwrap();
        let own = fs::read(mesh.path("b/tls.crt")).unwrap();
        delegate(ca, "b", &mesh.path("b")).unwrap();
        assert_eq!(fs::read(mesh.path("b/tls.crt")).unwrap(), own);
        let role = Role::Lead {
            name: "c".to_owned(),
        };
        issue(ca, role, &mesh.path("c")).unwrap();
        let error = delegate(ca, "d", &mesh.path("c")).unwrap_err();
        assert!(
            matches!(error, AuthorityError::OtherHolder { .. }),
            "{error}"
        );
    }
}
