use std::{fs, os::unix::fs::PermissionsExt};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};

use super::*;
use crate::identity::SERVER_NAME;

pub(crate) struct Authority {
    pub(crate) certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap().pem();
        Self {
            certificate,
            issuer: Issuer::new(params, key),
        }
    }

    /// A certificate of `weft://m/{who}` that may sign.
    fn delegate(&self, who: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let uri = format!("weft://m/{who}");
        let name = rcgen::DnValue::from(uri.as_str());
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, name);
        let uri = SanType::URI(uri.as_str().try_into().unwrap());
        params.subject_alt_names.push(uri);
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        Self {
            certificate,
            issuer: Issuer::new(params, key),
        }
    }

    /// The certificate and the key of `weft://m/{who}`.
    pub(crate) fn issue(&self, who: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![SERVER_NAME.to_owned()]).unwrap();
        let uri = format!("weft://m/{who}");
        let uri = SanType::URI(uri.as_str().try_into().unwrap());
        params.subject_alt_names.push(uri);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new((certificate, key): &(String, String), authorities: &[&Authority]) -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        folder.write("tls.crt", certificate);
        folder.write("tls.key", key);
        folder.trust(authorities);
        folder
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.0.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn trust(&self, authorities: &[&Authority]) {
        let all: String = authorities
            .iter()
            .map(|it| it.certificate.as_str())
            .collect();
        self.write("ca.crt", &all);
    }
}

fn shown((certificate, _): &(String, String)) -> Shown {
    let der = CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
    Shown::of_chain(&[der]).unwrap()
}

fn is_own(held: &Held, (certificate, _): &(String, String)) -> bool {
    let der = CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
    held.current().own.cert == [der]
}

#[test]
fn what_is_new_is_taken_when_it_was_the_same_twice_and_half_of_it_is_not() {
    let ca = Authority::new();
    let (old, new) = (ca.issue("lead/a"), ca.issue("lead/a"));
    let folder = Folder::new(&old, &[&ca]);
    let held = Held::load(folder.0.path()).unwrap();
    let mut seen = Seen::default();
    assert!(matches!(held.look(&mut seen), Look::Wait));

    folder.write("tls.crt", &new.0);
    assert!(matches!(held.look(&mut seen), Look::Wait));
    // The key is not there yet: refused, and said once.
    assert!(matches!(
        held.look(&mut seen),
        Look::Refused(IdentityError::Tls(_))
    ));
    assert!(matches!(held.look(&mut seen), Look::Wait));
    assert!(is_own(&held, &old));

    folder.write("tls.key", &new.1);
    assert!(matches!(held.look(&mut seen), Look::Wait));
    assert!(is_own(&held, &old));
    assert!(matches!(held.look(&mut seen), Look::Taken));
    assert!(is_own(&held, &new));
    assert!(matches!(held.look(&mut seen), Look::Wait));
}

#[test]
fn another_holder_a_foreign_certificate_and_an_open_key_are_refused() {
    let (ca, foreign) = (Authority::new(), Authority::new());
    let own = ca.issue("lead/a");
    let folder = Folder::new(&own, &[&ca]);
    let held = Held::load(folder.0.path()).unwrap();
    let look_twice = |seen: &mut Seen| {
        let first = held.look(seen);
        match held.look(seen) {
            Look::Wait => first,
            second => second,
        }
    };
    let mut seen = Seen::default();
    for (files, part) in [
        (ca.issue("lead/b"), "weft://m/lead/b"),
        (foreign.issue("lead/a"), "own authorities"),
    ] {
        folder.write("tls.crt", &files.0);
        folder.write("tls.key", &files.1);
        let Look::Refused(error) = look_twice(&mut seen) else {
            panic!("{part}");
        };
        assert!(error.to_string().contains(part), "{error}");
    }
    let key = folder.0.path().join("tls.key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    let refused = look_twice(&mut seen);
    assert!(matches!(
        refused,
        Look::Refused(IdentityError::KeyMode { .. })
    ));
    fs::remove_file(key).unwrap();
    let refused = look_twice(&mut seen);
    assert!(matches!(refused, Look::Refused(IdentityError::File { .. })));
    assert!(is_own(&held, &own));
}

#[test]
fn an_authority_that_left_vouches_for_nobody_any_more() {
    let (old, new) = (Authority::new(), Authority::new());
    let folder = Folder::new(&old.issue("lead/a"), &[&old]);
    let held = Held::load(folder.0.path()).unwrap();
    let (stays, leaves) = (shown(&new.issue("lead/b")), shown(&old.issue("lead/c")));
    let mut seen = Seen::default();
    let mut take = || {
        assert!(matches!(held.look(&mut seen), Look::Wait));
        assert!(matches!(held.look(&mut seen), Look::Taken));
    };
    let [mut b, mut c] = [0; 2];
    folder.trust(&[&old, &new]);
    take();
    assert!(held.vouches_for(&stays, &mut b) && held.vouches_for(&leaves, &mut c));
    // The own certificate is still of the old one.
    folder.trust(&[&new]);
    let mut early = Seen::default();
    held.look(&mut early);
    assert!(matches!(
        held.look(&mut early),
        Look::Refused(IdentityError::Own(_))
    ));
    let own = new.issue("lead/a");
    folder.write("tls.crt", &own.0);
    folder.write("tls.key", &own.1);
    take();
    assert!(held.vouches_for(&stays, &mut b));
    assert!(!held.vouches_for(&leaves, &mut c));
}

#[test]
fn a_lead_that_may_sign_vouches_for_agents_and_nodes_and_for_nobody_else() {
    let ca = Authority::new();
    let folder = Folder::new(&ca.issue("lead/b"), &[&ca]);
    let held = Held::load(folder.0.path()).unwrap();
    let chain = |who: &str, signers: &[&Authority]| {
        let own = signers.first().unwrap_or(&&ca).issue(who).0;
        let others: String = signers.iter().map(|it| it.certificate.as_str()).collect();
        CertificateDer::pem_slice_iter(format!("{own}{others}").as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .unwrap()
    };
    let refused = |who: &str, signers: &[&Authority], why: &str| {
        let error = held.current().vouch_for(&chain(who, signers)).unwrap_err();
        assert!(error.to_string().contains(why), "{who}: {error}");
    };
    let lead = ca.delegate("lead/a");
    for who in ["agent/edge", "node/edge/n1"] {
        held.current().vouch_for(&chain(who, &[&lead])).unwrap();
    }
    for who in ["user/eve", "user/eve/viewer", "lead/a", "lead/b"] {
        refused(who, &[&lead], "only for agents and nodes");
    }
    // What else may sign does not; neither does what may not, nor one behind another.
    for who in ["agent/fog", "user/ann", "node/fog/n1"] {
        refused("agent/edge", &[&ca.delegate(who)], "may not vouch");
    }
    let further = lead.delegate("lead/c");
    refused("agent/edge", &[&further, &lead], "");
    let foreign = Authority::new().delegate("lead/a");
    refused("agent/edge", &[&foreign], "");
    let two = [chain("agent/edge", &[&lead]), chain("lead/c", &[])].concat();
    let error = held.current().vouch_for(&two).unwrap_err();
    assert!(error.to_string().contains("one may"), "{error}");
    // What lies beside an authority's own signature changes nothing.
    let own = [chain("user/ann", &[]), chain("agent/x", &[&lead])].concat();
    held.current().vouch_for(&own).unwrap();
}

#[test]
fn a_certificate_ends_with_who_signed_it() {
    let ca = Authority::new();
    let lead = ca.delegate("lead/a");
    let chain = format!("{}{}", lead.issue("agent/edge").0, lead.certificate);
    let chain: Vec<_> = CertificateDer::pem_slice_iter(chain.as_bytes())
        .map(Result::unwrap)
        .collect();
    let shown = Shown::of_chain(&chain).unwrap();
    assert_eq!(shown.signers.len(), 1);
    assert_eq!(shown.signers[0].identity.to_string(), "weft://m/lead/a");
    let ends = |it: &CertificateDer<'_>| Shown::of_certificate(it).unwrap().expires_ms;
    assert_eq!(shown.expires_ms, ends(&chain[0]).min(ends(&chain[1])));
}
