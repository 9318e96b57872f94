//! What both sides of a door check of each other's certificate, within the TLS handshake.
//!
//! ```text
//!  the chain leads to the mesh's CA, it has not expired --> it names one identity, of this mesh
//!      --> it is not revoked --> (who knocks) the role is the one that should be there
//! ```
//!
//! The chain is the authority's signature, or that of one lead that it lets sign: such a lead vouches for agents and nodes
//! only. Otherwise whoever has a lead's key could make a lead or an admin of themselves.
//!
//! What is refused is logged with who the certificate says that it is: of a foreign CA's that is a claim only.

use std::{collections::BTreeSet, fmt, sync::Arc};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{verify_tls12_signature, verify_tls13_signature},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::{RevokedList, Role, Shown, fingerprint, held::Held, provider};

/// What `by` says of a certificate that came with `others`: an authority's own signature is good for every role, one of
/// a lead that the authority lets sign for agents and nodes.
pub(super) fn vouched<T>(
    certificate: &CertificateDer<'_>,
    others: &[CertificateDer<'_>],
    by: impl Fn(&[CertificateDer<'_>]) -> Result<T, Error>,
) -> Result<T, Error> {
    match by(&[]) {
        Err(_) if !others.is_empty() => {
            let verified = by(others)?;
            check_signer(certificate, others)?;
            Ok(verified)
        }
        direct => direct,
    }
}

/// Whether who signed for the authority may sign this.
fn check_signer(
    certificate: &CertificateDer<'_>,
    others: &[CertificateDer<'_>],
) -> Result<(), Error> {
    let shown = |certificate| {
        Shown::of_certificate(certificate).map_err(|error| Error::General(error.to_string()))
    };
    let [signer] = others else {
        let count = others.len();
        let error = format!("{count} certificates stand between it and an authority: one may");
        return Err(Error::General(error));
    };
    let (identity, signer) = (shown(certificate)?.identity, shown(signer)?.identity);
    let may = matches!(signer.role, Role::Lead { .. })
        && signer.mesh == identity.mesh
        && matches!(identity.role, Role::Agent { .. } | Role::Node { .. });
    if may {
        return Ok(());
    }
    let error = format!("{signer} may not vouch for {identity}: only for agents and nodes");
    Err(Error::General(error))
}

/// What is checked after the chain.
struct Check {
    /// `None`: whichever the CA is of.
    mesh: Option<String>,
    revoked: RevokedList,
}

impl Check {
    fn shown(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
    ) -> Result<Shown, Error> {
        let chain: Vec<_> = [certificate].into_iter().chain(others).cloned().collect();
        let shown = Shown::of_chain(&chain).map_err(|error| Error::General(error.to_string()))?;
        let identity = &shown.identity;
        if let Some(own) = &self.mesh
            && identity.mesh != *own
        {
            let other = &identity.mesh;
            let error = format!("{identity} is of mesh {other:?}, this is {own:?}");
            return Err(Error::General(error));
        }
        if self.revoked.holds(&shown) {
            return Err(Error::InvalidCertificate(CertificateError::Revoked));
        }
        Ok(shown)
    }
}

fn refused(certificate: &CertificateDer<'_>, error: &Error) {
    let claims = match Shown::of_certificate(certificate) {
        Ok(shown) => shown.identity.to_string(),
        Err(error) => error.to_string(),
    };
    tracing::warn!(claims, %error, "refused a certificate");
}

/// Accepts a client whose certificate is of this mesh's CA, names one identity of this mesh and is not revoked.
pub(super) struct ClientCheck {
    held: Arc<Held>,
    check: Check,
}

impl ClientCheck {
    pub(super) fn new(held: Arc<Held>, mesh: String, revoked: RevokedList) -> Self {
        let mesh = Some(mesh);
        Self {
            held,
            check: Check { mesh, revoked },
        }
    }
}

impl fmt::Debug for ClientCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientCheck")
            .field("mesh", &self.check.mesh)
            .finish_non_exhaustive()
    }
}

impl ClientCertVerifier for ClientCheck {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Whoever knocks has one certificate; which authorities count may change at any time.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let clients = self.held.current().clients.clone();
        let by =
            |others: &[CertificateDer<'_>]| clients.verify_client_cert(end_entity, others, now);
        let verified = vouched(end_entity, intermediates, by).and_then(|verified| {
            self.check.shown(end_entity, intermediates)?;
            Ok(verified)
        });
        verified.inspect_err(|error| refused(end_entity, error))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.held
            .current()
            .clients
            .verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.held
            .current()
            .clients
            .verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.held.current().clients.supported_verify_schemes()
    }
}

/// By which authorities a server is known.
pub(super) enum Chain {
    /// Those that the process holds now.
    Held(Arc<Held>),
    /// These.
    Fixed(Arc<WebPkiServerVerifier>),
}

impl Chain {
    fn now(&self) -> Arc<WebPkiServerVerifier> {
        match self {
            Self::Held(held) => held.current().servers.clone(),
            Self::Fixed(chain) => chain.clone(),
        }
    }
}

/// Accepts a server whose chain leads to the mesh's CA, whose certificate is for
/// [`SERVER_NAME`](super::SERVER_NAME), is not revoked, and whose role the caller accepts.
pub(super) struct ServerCheck {
    chain: Chain,
    check: Check,
    accept: Box<dyn Fn(&Role) -> bool + Send + Sync>,
}

impl ServerCheck {
    pub(super) fn new(
        chain: Chain,
        mesh: Option<String>,
        revoked: RevokedList,
        accept: Box<dyn Fn(&Role) -> bool + Send + Sync>,
    ) -> Self {
        Self {
            chain,
            check: Check { mesh, revoked },
            accept,
        }
    }
}

impl fmt::Debug for ServerCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerCheck")
            .field("mesh", &self.check.mesh)
            .finish_non_exhaustive()
    }
}

impl ServerCertVerifier for ServerCheck {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let servers = self.chain.now();
        let by = |others: &[CertificateDer<'_>]| {
            servers.verify_server_cert(end_entity, others, server_name, ocsp_response, now)
        };
        let verified = vouched(end_entity, intermediates, by)?;
        let identity = self.check.shown(end_entity, intermediates)?.identity;
        if !(self.accept)(&identity.role) {
            return Err(Error::General(format!(
                "the peer is {identity}, which is not who should be there"
            )));
        }
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain
            .now()
            .verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain
            .now()
            .verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.now().supported_verify_schemes()
    }
}

/// Accepts a server that shows an authority of a known fingerprint, which has signed for it itself, and whose role the
/// caller accepts.
pub(super) struct PinCheck {
    pins: BTreeSet<String>,
    check: Check,
    accept: Box<dyn Fn(&Role) -> bool + Send + Sync>,
}

impl PinCheck {
    pub(super) fn new(
        pins: BTreeSet<String>,
        accept: Box<dyn Fn(&Role) -> bool + Send + Sync>,
    ) -> Self {
        let check = Check {
            mesh: None,
            revoked: RevokedList::default(),
        };
        Self {
            pins,
            check,
            accept,
        }
    }
}

impl fmt::Debug for PinCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PinCheck")
            .field("pins", &self.pins)
            .finish_non_exhaustive()
    }
}

impl ServerCertVerifier for PinCheck {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let mut roots = RootCertStore::empty();
        for authority in others {
            if self.pins.contains(&fingerprint(authority)) {
                roots.add(authority.clone().into_owned())?;
            }
        }
        if roots.is_empty() {
            let known: Vec<_> = self.pins.iter().map(String::as_str).collect();
            return Err(Error::General(format!(
                "it does not show the expected authority (SHA-256 {})",
                known.join(", ")
            )));
        }
        let chain = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
            .build()
            .map_err(|error| Error::General(error.to_string()))?;
        let verified =
            chain.verify_server_cert(end_entity, &[], server_name, ocsp_response, now)?;
        let identity = self.check.shown(end_entity, &[])?.identity;
        if (self.accept)(&identity.role) {
            return Ok(verified);
        }
        Err(Error::General(format!(
            "the peer is {identity}, which is not who should be there"
        )))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = provider().signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, &algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = provider().signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let algorithms = provider().signature_verification_algorithms;
        algorithms.supported_schemes()
    }
}
