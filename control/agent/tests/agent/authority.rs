//! A mesh's certificate authority for one test, in a directory that goes with it.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

use netmanager_api::identity::{Credentials, SERVER_NAME, files::Files};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, PublicKeyData, SanType,
};

/// A certificate authority.
pub(crate) struct Authority {
    dir: tempfile::TempDir,
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).expect("a certificate").pem();
        Self {
            dir: tempfile::tempdir().expect("a directory"),
            certificate,
            issuer: Issuer::new(params, key),
        }
    }

    /// Credentials for `weft://m/{who}`.
    pub(crate) fn issue(&self, who: &str) -> Credentials {
        let dir = self.forge(who, &who.replace('/', "-"), |_| {});
        Credentials::load(&dir).expect("credentials")
    }

    /// The files of a certificate for `weft://m/{who}` that `spoil` made another.
    pub(crate) fn forge(
        &self,
        who: &str,
        out: &str,
        spoil: impl FnOnce(&mut CertificateParams),
    ) -> PathBuf {
        let dir = self.dir.path().join(out);
        fs::create_dir_all(&dir).expect("a directory");
        let key = KeyPair::generate().expect("a key");
        let mut params = named(who);
        spoil(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).expect("a signature");
        let key_path = dir.join("tls.key");
        fs::write(dir.join("tls.crt"), certificate.pem()).expect("a file");
        fs::write(dir.join("ca.crt"), &self.certificate).expect("a file");
        fs::write(&key_path, key.serialize_pem()).expect("a file");
        fs::set_permissions(key_path, fs::Permissions::from_mode(0o600)).expect("a mode");
        dir
    }

    /// A lead that this authority lets sign.
    pub(crate) fn delegate(&self, lead: &str) -> Signer {
        let key = KeyPair::generate().expect("a key");
        let mut params = named(&format!("lead/{lead}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params
            .distinguished_name
            .push(DnType::CommonName, format!("{lead} signs"));
        let certificate = params.signed_by(&key, &self.issuer).expect("a signature");
        Signer {
            certificate: certificate.pem(),
            issuer: Issuer::new(params, key),
        }
    }

    /// The files of `weft://m/{who}`, signed by a lead.
    pub(crate) fn keep(&self, who: &str, chain: &str, key: &KeyPair) -> PathBuf {
        let files = Files {
            chain: chain.into(),
            key: key.serialize_pem().into(),
            authorities: self.certificate.clone().into(),
        };
        let dir = self.dir.path().join(who.replace('/', "-"));
        files.create(&dir).expect("files");
        dir
    }

    /// The certificate that is trusted.
    pub(crate) fn root(&self) -> &str {
        &self.certificate
    }

    /// A directory for an agent's state.
    pub(crate) fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }
}

/// Who signs for an authority.
pub(crate) struct Signer {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Signer {
    /// A chain for `weft://m/{who}` and this key, which `spoil` made another.
    pub(crate) fn sign(
        &self,
        who: &str,
        key: &impl PublicKeyData,
        spoil: impl FnOnce(&mut CertificateParams),
    ) -> String {
        let mut params = named(who);
        spoil(&mut params);
        let own = params.signed_by(key, &self.issuer).expect("a signature");
        format!("{}{}", own.pem(), self.certificate)
    }
}

fn named(who: &str) -> CertificateParams {
    let mut params = CertificateParams::new(vec![SERVER_NAME.to_owned()]).expect("a DNS name");
    let uri = format!("weft://m/{who}");
    let uri = uri.as_str().try_into().expect("an ASCII name");
    params.subject_alt_names.push(SanType::URI(uri));
    params
}
