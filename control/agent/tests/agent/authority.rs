//! A mesh's certificate authority for one test, in a directory that goes with it.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

use netmanager_api::identity::{Credentials, SERVER_NAME};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};

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
        let mut params = CertificateParams::new(vec![SERVER_NAME.to_owned()]).expect("a DNS name");
        let uri = format!("weft://m/{who}");
        let uri = uri.as_str().try_into().expect("an ASCII name");
        params.subject_alt_names.push(SanType::URI(uri));
        spoil(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).expect("a signature");
        let key_path = dir.join("tls.key");
        fs::write(dir.join("tls.crt"), certificate.pem()).expect("a file");
        fs::write(dir.join("ca.crt"), &self.certificate).expect("a file");
        fs::write(&key_path, key.serialize_pem()).expect("a file");
        fs::set_permissions(key_path, fs::Permissions::from_mode(0o600)).expect("a mode");
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
