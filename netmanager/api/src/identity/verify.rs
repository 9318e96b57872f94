//! What both sides of a door check of each other's certificate, within the TLS handshake.
//!
//! ```text
//!  the chain leads to the mesh's CA, it has not expired --> it names one identity, of this mesh
//!      --> it is not revoked --> (who knocks) the role is the one that should be there
//! ```
//!
//! What is refused is logged with who the certificate says that it is: of a foreign CA's that is a claim only.

use std::{fmt, sync::Arc};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::{RevokedList, Role, Shown, held::Held};

/// What is checked after the chain.
struct Check {
    /// `None`: whichever the CA is of.
    mesh: Option<String>,
    revoked: RevokedList,
}

impl Check {
    fn shown(&self, certificate: &CertificateDer<'_>) -> Result<Shown, Error> {
        let shown = Shown::of_certificate(certificate)
            .map_err(|error| Error::General(error.to_string()))?;
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
        let chain = self
            .held
            .current()
            .clients
            .verify_client_cert(end_entity, intermediates, now);
        let verified = chain.and_then(|verified| {
            self.check.shown(end_entity)?;
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
        let verified = self.chain.now().verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        )?;
        let identity = self.check.shown(end_entity)?.identity;
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
