//! What an agent asks for when it wants a certificate: a key that never leaves its machine, and the request for it.

use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

/// A key and the request for its certificate, PEM.
#[derive(Clone)]
pub(crate) struct KeyRequest {
    pub(crate) key: String,
    pub(crate) request: String,
}

impl std::fmt::Debug for KeyRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeyRequest").finish_non_exhaustive()
    }
}

impl KeyRequest {
    /// A new key; the name is for people, whoever signs takes the key only.
    pub(crate) fn new(name: &str) -> Result<Self, rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        Ok(Self {
            request: params.serialize_request(&key)?.pem()?,
            key: key.serialize_pem(),
        })
    }
}
