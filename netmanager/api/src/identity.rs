//! Who a certificate says its holder is, and the TLS of every door.
//!
//! A certificate names exactly one identity, as a URI in its subject alternative names:
//!
//! ```text
//!  weft://<mesh>/lead/<name>    weft://<mesh>/agent/<cluster>
//!  weft://<mesh>/node/<cluster>/<node>    weft://<mesh>/user/<name>[/<access>]
//! ```
//!
//! Both sides of every door show one, signed by the mesh's CA (an agent's and a node's also by a lead that the CA lets
//! sign), and each door says which roles it opens for.
//! Names of hosts mean nothing here: what is checked is the chain, the mesh and the role, so that an address
//! may change without a new certificate. No session is resumed: that would spare the check of the certificate. This
//! module does *not* issue certificates.

mod access;
pub mod files;
mod held;
mod revoked;
mod shown;
mod verify;

use std::{collections::BTreeSet, fmt, fs, io, path::Path, str::FromStr, sync::Arc};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::{Resumption, WebPkiServerVerifier, danger::ServerCertVerifier},
    server::NoServerSessionStorage,
};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

pub use self::{
    access::Access,
    revoked::{Revoked, RevokedList},
    shown::{BACKDATED, Guarded, Shown},
};
use self::{
    held::{Held, Introducing},
    verify::{Chain, ClientCheck, PinCheck, ServerCheck},
};

/// What the holder of a certificate may be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// A member of the Raft group.
    Lead {
        /// The lead's name.
        name: String,
    },
    /// A cluster's agent.
    Agent {
        /// The cluster's name.
        cluster: String,
    },
    /// A node of a cluster.
    Node {
        /// The cluster's name.
        cluster: String,
        /// The node's name.
        node: String,
    },
    /// A person or a tool at the control API.
    User {
        /// The user's name.
        name: String,
        /// What they may do there.
        access: Access,
    },
}

/// A role in a mesh.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    /// The mesh's name.
    pub mesh: String,
    /// What the holder may be.
    pub role: Role,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mesh = &self.mesh;
        match &self.role {
            Role::Lead { name } => write!(f, "weft://{mesh}/lead/{name}"),
            Role::Agent { cluster } => write!(f, "weft://{mesh}/agent/{cluster}"),
            Role::Node { cluster, node } => write!(f, "weft://{mesh}/node/{cluster}/{node}"),
            Role::User { name, access } => {
                write!(f, "weft://{mesh}/user/{name}")?;
                match access {
                    Access::Admin => Ok(()),
                    access => write!(f, "/{access}"),
                }
            }
        }
    }
}

/// Why an identity or a door could not be made of what there is.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Not one of the four forms.
    #[error(
        "{0:?} is not an identity: expected weft://MESH/(lead|agent|user)/NAME or weft://MESH/node/CLUSTER/NODE"
    )]
    Form(String),
    /// Not what a user may do.
    #[error("{0:?} is no access: expected viewer, deployer/NAMESPACE[/NAMESPACE...] or admin")]
    Access(String),
    /// The certificate names no identity, or several.
    #[error(
        "the certificate names {0} identities: expected exactly one weft:// URI in its subject alternative names"
    )]
    Count(usize),
    /// The certificate cannot be read.
    #[error("the certificate cannot be read: {0}")]
    Certificate(String),
    /// A file cannot be read as PEM.
    #[error("failed to read {path}")]
    File {
        /// Which file.
        path: String,
        /// Why.
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    /// A file cannot be written.
    #[error("failed to write {path}")]
    Write {
        /// Which file.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A private key that others may read.
    #[error("{path} is readable by others (mode {mode:o}): chmod 600 {path}")]
    KeyMode {
        /// Which file.
        path: String,
        /// Its permission bits.
        mode: u32,
    },
    /// TLS refuses the key or the certificates.
    #[error("the key and certificates do not serve for TLS")]
    Tls(#[source] rustls::Error),
    /// New credentials of another holder.
    #[error(
        "the new certificate is {is}, this is {was}: start another process for another identity"
    )]
    Changed {
        /// Who this process is.
        was: String,
        /// Whom the new certificate names.
        is: String,
    },
    /// New credentials that nobody with the same authorities would accept.
    #[error("the own authorities (ca.crt) do not vouch for the new certificate")]
    Own(#[source] rustls::Error),
    /// The certificate authority does not serve.
    #[error("the certificate authority does not serve: {0}")]
    Authority(String),
}

/// Whether `name` may stand in an identity: an RFC 1123 label, 1 to 63 of `a-z 0-9 -`, no hyphen at the ends.
#[must_use]
pub fn is_label(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && !name.starts_with('-')
        && !name.ends_with('-')
        && name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let form = || IdentityError::Form(text.to_owned());
        let rest = text.strip_prefix("weft://").ok_or_else(form)?;
        let parts: Vec<&str> = rest.split('/').collect();
        if !parts.iter().all(|part| is_label(part)) {
            return Err(form());
        }
        let (mesh, role) = match parts[..] {
            [mesh, "lead", name] => (mesh, Role::Lead { name: name.into() }),
            [mesh, "agent", cluster] => (
                mesh,
                Role::Agent {
                    cluster: cluster.into(),
                },
            ),
            [mesh, "user", name, ref access @ ..] => {
                let access = match access.join("/").as_str() {
                    "" => Access::Admin,
                    // One text for each: an admin's is without.
                    "admin" => return Err(form()),
                    access => access.parse()?,
                };
                (
                    mesh,
                    Role::User {
                        name: name.into(),
                        access,
                    },
                )
            }
            [mesh, "node", cluster, node] => (
                mesh,
                Role::Node {
                    cluster: cluster.into(),
                    node: node.into(),
                },
            ),
            _ => return Err(form()),
        };
        Ok(Self {
            mesh: mesh.to_owned(),
            role,
        })
    }
}

impl Identity {
    /// Who it is, whatever they may do: a user's without the access.
    #[must_use]
    pub fn holder(&self) -> String {
        match &self.role {
            Role::User { name, .. } => format!("weft://{}/user/{name}", self.mesh),
            _ => self.to_string(),
        }
    }

    /// The identity that a certificate names.
    ///
    /// # Errors
    /// When the certificate cannot be parsed, or does not name exactly one identity.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let (_, parsed) = X509Certificate::from_der(certificate)
            .map_err(|error| IdentityError::Certificate(error.to_string()))?;
        let names = parsed
            .subject_alternative_name()
            .map_err(|error| IdentityError::Certificate(error.to_string()))?;
        let uris: Vec<&str> = names
            .iter()
            .flat_map(|names| &names.value.general_names)
            .filter_map(|name| match name {
                GeneralName::URI(uri) if uri.starts_with("weft://") => Some(*uri),
                _ => None,
            })
            .collect();
        match uris[..] {
            [uri] => uri.parse(),
            _ => Err(IdentityError::Count(uris.len())),
        }
    }
}

/// A key, its certificate chain and the mesh's authorities: what a process needs to knock and to open.
#[derive(Debug)]
pub struct Credentials {
    /// Who this process is.
    pub identity: Identity,
    held: Arc<Held>,
    revoked: RevokedList,
}

impl Credentials {
    /// Reads `tls.crt` (own certificate first), `tls.key` (mode 0600) and `ca.crt` from `dir`.
    ///
    /// # Errors
    /// When a file is missing, not PEM, or the key is readable by others, or not the certificate's.
    pub fn load(dir: &Path) -> Result<Self, IdentityError> {
        let held = Arc::new(Held::load(dir)?);
        Ok(Self {
            identity: held.identity(),
            revoked: RevokedList::of(held.clone()),
            held,
        })
    }

    /// Takes what is new in the folder, for the same identity, within seconds: for every handshake from then on of the
    /// TLS that was made of these credentials, and whoever an authority vouched for that is not there any more is
    /// disconnected. Runs until it is dropped.
    pub fn follow(&self) -> impl Future<Output = ()> + Send + 'static {
        let held = self.held.clone();
        async move { held.follow().await }
    }

    /// Counts how often something new was taken: a connection that was made before shows what is old.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.held.generation()
    }

    /// The own certificate, as it is held now.
    #[must_use]
    pub fn shown(&self) -> Shown {
        self.held.current().shown().clone()
    }

    /// Puts another certificate and key of the same holder in the place of those in the folder, from where
    /// [`Credentials::follow`] takes them; the authorities stay.
    ///
    /// # Errors
    /// When they do not serve, or a file cannot be written.
    pub fn replace(&self, chain: Vec<u8>, key: Vec<u8>) -> Result<(), IdentityError> {
        self.held.replace(chain, key)
    }

    /// Whether the authority that signs now, the first in `ca.crt`, vouches for the own certificate.
    #[must_use]
    pub fn is_of_who_signs(&self) -> bool {
        self.held.current().is_of_who_signs()
    }

    /// What these credentials' doors and calls take for revoked; empty until it is set.
    #[must_use]
    pub fn revoked(&self) -> RevokedList {
        self.revoked.clone()
    }

    /// TLS for a door: every client must show a certificate of this mesh's CA that names one identity of this mesh
    /// and is not revoked. Roles are the door's to check, by [`Shown::of_certificate`] on the peer's first certificate.
    ///
    /// # Errors
    /// When the key and the certificates do not belong together.
    pub fn server(&self, alpn: &[&[u8]]) -> Result<Arc<ServerConfig>, IdentityError> {
        let mesh = self.identity.mesh.clone();
        let verifier = ClientCheck::new(self.held.clone(), mesh, self.revoked.clone());
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(IdentityError::Tls)?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(self.held.clone());
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        Ok(Arc::new(config))
    }

    /// TLS for a door whose callers show no certificate: who they are is the door's to find out.
    ///
    /// # Errors
    /// When the key and the certificates do not belong together.
    pub fn server_for_all(&self, alpn: &[&[u8]]) -> Result<Arc<ServerConfig>, IdentityError> {
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(IdentityError::Tls)?
            .with_no_client_auth()
            .with_cert_resolver(self.held.clone());
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        Ok(Arc::new(config))
    }

    /// TLS for a door as [`Credentials::server_for_all`], which shows the authorities, too: for callers who know one by its
    /// fingerprint only.
    ///
    /// # Errors
    /// When the key and the certificates do not belong together.
    pub fn server_that_introduces(
        &self,
        alpn: &[&[u8]],
    ) -> Result<Arc<ServerConfig>, IdentityError> {
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(IdentityError::Tls)?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(Introducing(self.held.clone())));
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        Ok(Arc::new(config))
    }

    /// TLS for knocking at a door whose holder must satisfy `accept`.
    ///
    /// # Errors
    /// When the key and the certificates do not belong together.
    pub fn client(
        &self,
        alpn: &[&[u8]],
        accept: impl Fn(&Role) -> bool + Send + Sync + 'static,
    ) -> Result<Arc<ClientConfig>, IdentityError> {
        let chain = Chain::Held(self.held.clone());
        let mesh = self.identity.mesh.clone();
        let verifier = ServerCheck::new(chain, Some(mesh), self.revoked.clone(), Box::new(accept));
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(IdentityError::Tls)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(self.held.clone());
        config.resumption = Resumption::disabled();
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        Ok(Arc::new(config))
    }
}

/// TLS for knocking, without a certificate, at a door of the mesh whose CA is in the file `ca`, and whose holder must
/// satisfy `accept`.
///
/// # Errors
/// When the file is no CA's certificate.
pub fn client_without_certificate(
    ca: &Path,
    alpn: &[&[u8]],
    accept: impl Fn(&Role) -> bool + Send + Sync + 'static,
) -> Result<Arc<ClientConfig>, IdentityError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(ca)? {
        roots.add(certificate).map_err(IdentityError::Tls)?;
    }
    let chain = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(|error| IdentityError::Authority(error.to_string()))?;
    let chain = Chain::Fixed(chain);
    let verifier = ServerCheck::new(chain, None, RevokedList::default(), Box::new(accept));
    without_certificate(Arc::new(verifier), alpn)
}

/// TLS for knocking, without a certificate, at a door that shows its authority: one of these, by their fingerprints. Its
/// holder must satisfy `accept`, and the authority have signed for it itself.
///
/// # Errors
/// When TLS cannot be set up.
pub fn client_by_fingerprints(
    pins: BTreeSet<String>,
    alpn: &[&[u8]],
    accept: impl Fn(&Role) -> bool + Send + Sync + 'static,
) -> Result<Arc<ClientConfig>, IdentityError> {
    let verifier = PinCheck::new(pins, Box::new(accept));
    without_certificate(Arc::new(verifier), alpn)
}

fn without_certificate(
    verifier: Arc<dyn ServerCertVerifier>,
    alpn: &[&[u8]],
) -> Result<Arc<ClientConfig>, IdentityError> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(IdentityError::Tls)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Ok(Arc::new(config))
}

/// Reads a file with a secret, which only its owner may read.
///
/// # Errors
/// When others may read it.
pub fn check_secret_mode(path: &Path) -> Result<(), IdentityError> {
    check_key_mode(path)
}

/// The name that every certificate of a mesh carries and every client asks for; the role is what is checked.
pub const SERVER_NAME: &str = "weft.internal";

/// The SHA-256 of `bytes`, in hexadecimal digits: of a certificate its fingerprint, of a token what is kept of it.
#[must_use]
pub fn fingerprint(bytes: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    digest
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// The fingerprints of the certificates in a file, PEM, in their order.
///
/// # Errors
/// When it cannot be read, or holds none.
pub fn fingerprints_of_file(path: &Path) -> Result<Vec<String>, IdentityError> {
    let certificates = certificates(path)?;
    if certificates.is_empty() {
        return Err(IdentityError::Count(0));
    }
    Ok(certificates.iter().map(|it| fingerprint(it)).collect())
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn file_error(path: &Path, source: rustls_pki_types::pem::Error) -> IdentityError {
    IdentityError::File {
        path: path.display().to_string(),
        source,
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|source| file_error(path, source))
}

fn check_key_mode(path: &Path) -> Result<(), IdentityError> {
    use std::os::unix::fs::PermissionsExt;
    let Ok(metadata) = fs::metadata(path) else {
        return Ok(()); // The read that follows names the error.
    };
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 == 0 {
        Ok(())
    } else {
        Err(IdentityError::KeyMode {
            path: path.display().to_string(),
            mode,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_survives_its_text() {
        for text in [
            "weft://m/lead/a",
            "weft://m/agent/edge",
            "weft://m/node/edge/n-1",
            "weft://m/user/admin",
            "weft://m/user/ann/viewer",
            "weft://m/user/ann/deployer/bank/shop",
        ] {
            assert_eq!(text.parse::<Identity>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "weft://m/lead",
            "weft://m/lead/a/b",
            "weft://m/king/a",
            "weft://M/lead/a",
            "http://m/lead/a",
            "weft://m/user/ann/admin",
            "weft://m/user/ann/king",
            "weft://m/user/ann/deployer",
            "weft://m/agent/ann/viewer",
        ] {
            assert!(text.parse::<Identity>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_certificate_names_exactly_one_identity() {
        let certificate = |uris: &[&str]| {
            let mut params = rcgen::CertificateParams::default();
            params.subject_alt_names = uris
                .iter()
                .map(|uri| rcgen::SanType::URI((*uri).try_into().unwrap()))
                .collect();
            let key = rcgen::KeyPair::generate().unwrap();
            params.self_signed(&key).unwrap().der().clone()
        };
        let one = certificate(&["weft://m/agent/edge", "spiffe://other/x"]);
        assert_eq!(
            Identity::of_certificate(&one).unwrap().to_string(),
            "weft://m/agent/edge"
        );
        assert!(matches!(
            Identity::of_certificate(&certificate(&[])),
            Err(IdentityError::Count(0))
        ));
        let two = certificate(&["weft://m/agent/a", "weft://m/agent/b"]);
        assert!(matches!(
            Identity::of_certificate(&two),
            Err(IdentityError::Count(2))
        ));
    }
}
