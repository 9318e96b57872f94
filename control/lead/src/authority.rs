//! The mesh's certificate authority, as files: what `weft init` and `weft cert` do.
//!
//! ```text
//!  DIR/ca.crt  DIR/ca.key (0600)  DIR/mesh.json          by init
//!  OUT/ca.crt  OUT/tls.crt  OUT/tls.key (0600)           by cert; replaced by renew
//!  OUT/issuer.crt  OUT/issuer.key (0600)                 by cert --issuer; replaced by renew
//! ```
//!
//! The CA's key stays where it was made: it is never sent and never in the log. Nothing here overwrites a file; what
//! replaces some is [`rotation`].

mod error;
pub(crate) mod issuer;
pub mod rotation;

use std::{
    fs, io,
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

use ipnet::{Ipv4Net, Ipv6Net};
use netmanager_api::identity::{
    BACKDATED, Identity, Role, SERVER_NAME,
    files::{self, Files},
    is_label,
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use serde::{Deserialize, Serialize};
use time::{Duration, OffsetDateTime};

pub use self::{error::AuthorityError, issuer::delegate};

/// How long the CA's certificate lasts.
const CA_DAYS: i64 = 3650;
/// How long a certificate lasts.
const LEAF_DAYS: i64 = 365;
/// The IPv4 space of a mesh unless its operator says otherwise.
pub const DEFAULT_PREFIX4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 16, 0, 0), 12);

/// A mesh as `weft init` made it: the first command of its log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeshFile {
    /// Its name, in every certificate.
    pub name: String,
    /// Its ULA /48.
    pub prefix6: Ipv6Net,
    /// Its IPv4 space; `None` where it has none.
    pub prefix4: Option<Ipv4Net>,
    /// Seed of the flow hash.
    pub seed: u64,
}

/// What `weft init` is asked.
#[derive(Clone, Debug)]
pub struct Wish {
    /// The mesh's name.
    pub name: String,
    /// Its IPv4 space; `None` for none.
    pub prefix4: Option<Ipv4Net>,
    /// Its IPv6 prefix; `None` for a random one.
    pub prefix6: Option<Ipv6Net>,
}

impl MeshFile {
    /// Reads a mesh file.
    ///
    /// # Errors
    /// When it cannot be read or is not a mesh file.
    pub fn load(path: &Path) -> Result<Self, AuthorityError> {
        let text = read(path)?;
        serde_json::from_str(&text).map_err(|source| AuthorityError::Mesh {
            path: path.to_owned(),
            source,
        })
    }
}

/// Makes the CA and the mesh file in `dir`.
///
/// # Errors
/// When the wish is not a mesh, or one of the files exists or cannot be written.
pub fn init(dir: &Path, wish: &Wish) -> Result<MeshFile, AuthorityError> {
    let mesh = mesh(wish)?;
    let paths = ["ca.crt", "ca.key", "mesh.json"].map(|name| dir.join(name));
    refuse_existing(&paths)?;
    let failed = |source| AuthorityError::Certificate {
        dir: dir.to_owned(),
        source,
    };
    let key = KeyPair::generate().map_err(failed)?;
    let certificate = authority_params(&mesh.name)
        .self_signed(&key)
        .map_err(failed)?;
    make_dir(dir)?;
    let [ca, ca_key, mesh_file] = &paths;
    write_new(ca_key, key.serialize_pem().as_bytes(), 0o600)?;
    write_new(ca, certificate.pem().as_bytes(), 0o644)?;
    let text = serde_json::to_string_pretty(&mesh).expect("a mesh file is plain data");
    write_new(mesh_file, format!("{text}\n").as_bytes(), 0o644)?;
    Ok(mesh)
}

/// Issues a certificate for `role` with the authority in `ca`, into `out`.
///
/// # Errors
/// When the role's names are no labels, the authority cannot be read, or a file exists or cannot be written.
pub fn issue(ca: &Path, role: Role, out: &Path) -> Result<Identity, AuthorityError> {
    check_role(&role)?;
    let mesh = MeshFile::load(&ca.join("mesh.json"))?.name;
    let identity = Identity { mesh, role };
    if let Some(path) = files::existing(out) {
        return Err(AuthorityError::Exists { path });
    }
    sign(ca, &identity)?.create(out)?;
    Ok(identity)
}

/// What a holder gets: a certificate for `identity` with a key of its own, and every authority that counts.
fn sign(ca: &Path, identity: &Identity) -> Result<Files, AuthorityError> {
    let params = leaf_params(identity, Validity::days(LEAF_DAYS));
    let (certificate, key) = sign_as(ca, params)?;
    Ok(Files {
        chain: certificate.into(),
        key: key.into(),
        authorities: read(&ca.join("ca.crt"))?.into(),
    })
}

/// A certificate of the authority's, and its key, PEM.
fn sign_as(
    ca: &Path,
    params: Result<CertificateParams, rcgen::Error>,
) -> Result<(String, String), AuthorityError> {
    let failed = |source| AuthorityError::Certificate {
        dir: ca.to_owned(),
        source,
    };
    let signer = rotation::signer(ca)?;
    let ca_key = KeyPair::from_pem(&read(&ca.join("ca.key"))?).map_err(failed)?;
    let issuer = Issuer::from_ca_cert_pem(&signer, ca_key).map_err(failed)?;
    let key = KeyPair::generate().map_err(failed)?;
    let certificate = params
        .and_then(|params| params.signed_by(&key, &issuer))
        .map_err(failed)?;
    Ok((certificate.pem(), key.serialize_pem()))
}

fn mesh(wish: &Wish) -> Result<MeshFile, AuthorityError> {
    check_label("mesh", &wish.name)?;
    if let Some(prefix4) = wish.prefix4 {
        check_prefix4(prefix4)?;
    }
    let prefix6 = match wish.prefix6 {
        Some(prefix6) => check_prefix6(prefix6)?,
        None => random_prefix6()?,
    };
    Ok(MeshFile {
        name: wish.name.clone(),
        prefix6,
        prefix4: wish.prefix4,
        seed: u64::from_be_bytes(random()?),
    })
}

/// RFC 4193, section 3.2: fd, then 40 random bits.
fn random_prefix6() -> Result<Ipv6Net, AuthorityError> {
    let [a, b, c, d, e] = random()?;
    let mut octets = [0; 16];
    octets[..6].copy_from_slice(&[0xfd, a, b, c, d, e]);
    Ok(Ipv6Net::new_assert(Ipv6Addr::from(octets), 48))
}

/// Random bytes of the operating system's.
///
/// # Errors
/// When it gives none.
pub fn random<const N: usize>() -> Result<[u8; N], AuthorityError> {
    let mut bytes = [0; N];
    rustls::crypto::ring::default_provider()
        .secure_random
        .fill(&mut bytes)
        .map_err(|_| AuthorityError::Random)?;
    Ok(bytes)
}

fn check_prefix6(prefix: Ipv6Net) -> Result<Ipv6Net, AuthorityError> {
    let refuse = |problem| AuthorityError::Prefix {
        field: "prefix6",
        value: prefix.to_string(),
        problem,
    };
    if prefix.addr().octets()[0] != 0xfd {
        return Err(refuse(
            "is not a ULA prefix: take one in fd00::/8 (RFC 4193)",
        ));
    }
    if prefix.prefix_len() != 48 || prefix.trunc() != prefix {
        return Err(refuse("is not a /48: the last 80 bits must be 0"));
    }
    Ok(prefix)
}

fn check_prefix4(prefix: Ipv4Net) -> Result<(), AuthorityError> {
    let refuse = |problem| AuthorityError::Prefix {
        field: "prefix4",
        value: prefix.to_string(),
        problem,
    };
    if !(12..=16).contains(&prefix.prefix_len()) {
        return Err(refuse("is not a /12 to /16: take one like 10.16.0.0/12"));
    }
    if prefix.trunc() != prefix {
        return Err(refuse("has bits set behind its length"));
    }
    Ok(())
}

fn check_role(role: &Role) -> Result<(), AuthorityError> {
    match role {
        Role::Lead { name } | Role::User { name, .. } => check_label("name", name),
        Role::Agent { cluster } => check_label("cluster", cluster),
        Role::Node { cluster, node } => {
            check_label("cluster", cluster).and_then(|()| check_label("name", node))
        }
    }
}

fn check_label(field: &'static str, value: &str) -> Result<(), AuthorityError> {
    if is_label(value) {
        Ok(())
    } else {
        Err(AuthorityError::Name {
            field,
            value: value.to_owned(),
        })
    }
}

fn authority_params(mesh: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = named(&format!("weft {mesh} authority"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Validity::days(CA_DAYS).put_into(&mut params);
    params
}

fn leaf_params(identity: &Identity, validity: Validity) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = named(&identity.to_string());
    params.subject_alt_names = vec![
        SanType::URI(identity.to_string().try_into()?),
        SanType::DnsName(SERVER_NAME.try_into()?),
    ];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    validity.put_into(&mut params);
    Ok(params)
}

fn named(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}

/// From when to when a certificate counts.
#[derive(Clone, Copy, Debug)]
struct Validity {
    issued: OffsetDateTime,
    ends: OffsetDateTime,
}

impl Validity {
    /// From now on.
    fn days(days: i64) -> Self {
        let issued = OffsetDateTime::now_utc();
        Self {
            issued,
            ends: issued + Duration::days(days),
        }
    }

    fn put_into(self, params: &mut CertificateParams) {
        params.not_before = self.issued - BACKDATED;
        params.not_after = self.ends;
    }
}

fn refuse_existing(paths: &[PathBuf]) -> Result<(), AuthorityError> {
    match paths.iter().find(|path| path.exists()) {
        Some(path) => Err(AuthorityError::Exists { path: path.clone() }),
        None => Ok(()),
    }
}

fn make_dir(dir: &Path) -> Result<(), AuthorityError> {
    fs::create_dir_all(dir).map_err(|source| AuthorityError::File {
        action: "make",
        path: dir.to_owned(),
        source,
    })
}

fn read(path: &Path) -> Result<String, AuthorityError> {
    fs::read_to_string(path).map_err(|source| AuthorityError::File {
        action: "read",
        path: path.to_owned(),
        source,
    })
}

fn write_new(path: &Path, content: &[u8], mode: u32) -> Result<(), AuthorityError> {
    files::write_new(path, content, mode).map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => AuthorityError::Exists {
            path: path.to_owned(),
        },
        _ => AuthorityError::File {
            action: "write",
            path: path.to_owned(),
            source,
        },
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use netmanager_api::identity::{Access, Credentials};

    use super::*;

    fn wish(name: &str) -> Wish {
        Wish {
            name: name.to_owned(),
            prefix4: Some(DEFAULT_PREFIX4),
            prefix6: None,
        }
    }

    #[test]
    fn an_issued_certificate_is_its_role_and_serves_both_sides_of_tls() {
        let dir = tempfile::tempdir().unwrap();
        let ca = dir.path().join("ca");
        let mesh = init(&ca, &wish("demo")).unwrap();
        assert_eq!(MeshFile::load(&ca.join("mesh.json")).unwrap(), mesh);
        let out = dir.path().join("edge");
        let role = Role::Agent {
            cluster: "edge".to_owned(),
        };
        issue(&ca, role.clone(), &out).unwrap();
        let credentials = Credentials::load(&out).unwrap();
        assert_eq!(credentials.identity.to_string(), "weft://demo/agent/edge");
        credentials.server(&[b"h2"]).unwrap();
        credentials.client(&[b"h2"], |_| true).unwrap();
        let mode = fs::metadata(ca.join("ca.key"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn nothing_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), &wish("demo")).unwrap();
        let before = fs::read(dir.path().join("ca.key")).unwrap();
        assert!(matches!(
            init(dir.path(), &wish("demo")),
            Err(AuthorityError::Exists { .. })
        ));
        assert_eq!(fs::read(dir.path().join("ca.key")).unwrap(), before);
        let user = || Role::User {
            name: "ann".to_owned(),
            access: Access::Viewer,
        };
        let out = dir.path().join("ann");
        issue(dir.path(), user(), &out).unwrap();
        assert!(matches!(
            issue(dir.path(), user(), &out),
            Err(AuthorityError::Exists { .. })
        ));
    }

    #[test]
    fn two_meshes_differ_in_prefix_and_seed() {
        let [a, b] = [(); 2].map(|()| mesh(&wish("m")).unwrap());
        assert_ne!((a.prefix6, a.seed), (b.prefix6, b.seed));
        assert_eq!(a.prefix6.prefix_len(), 48);
        assert_eq!(a.prefix6.addr().octets()[0], 0xfd);
    }

    #[test]
    fn a_bad_wish_is_refused_with_its_field() {
        let cases: [(&str, Option<&str>, Option<&str>, &str); 6] = [
            ("Demo", None, None, "mesh: \"Demo\""),
            ("m", Some("10.16.0.0/20"), None, "prefix4: 10.16.0.0/20"),
            ("m", Some("10.17.0.0/12"), None, "prefix4: 10.17.0.0/12"),
            ("m", None, Some("2001:db8::/48"), "prefix6: 2001:db8::/48"),
            ("m", None, Some("fd00::/32"), "prefix6: fd00::/32"),
            ("m", None, Some("fd00::1/48"), "prefix6: fd00::1/48"),
        ];
        for (name, prefix4, prefix6, start) in cases {
            let wish = Wish {
                name: name.to_owned(),
                prefix4: prefix4.map(|text| text.parse().unwrap()),
                prefix6: prefix6.map(|text| text.parse().unwrap()),
            };
            let error = mesh(&wish).unwrap_err().to_string();
            assert!(error.starts_with(start), "{error}");
        }
    }
}
