//! Another authority in the place of the mesh's, in three steps, at no moment of which two certificates do not meet.
//!
//! ```text
//!            ca.crt (who counts)   ca.key (who signs)
//!  before    old                   old
//!  prepare   old, new              old                  next.key, next.crt are made
//!            every ca.crt is replaced, in any order
//!  switch    new, old              new                  the old key is deleted
//!            every certificate is issued anew, in any order
//!  retire    new                   new
//!            every ca.crt is replaced, in any order
//! ```
//!
//! Each step may be repeated, and goes on where a crash has ended it. The first certificate in `ca.crt` is the signer's.

use std::{fs, io, path::Path};

use netmanager_api::identity::{Identity, Shown, files};
use rcgen::KeyPair;
use rustls::{crypto::ring, sign::CertifiedKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

use super::{
    AuthorityError, MeshFile, authority_params, check_role, issuer, read, sign, write_new,
};

const END: &str = "-----END CERTIFICATE-----\n";

/// Makes the next authority, which counts from now on and does not sign yet.
///
/// # Errors
/// When a rotation is under way, or a file cannot be read or written.
pub fn prepare(ca: &Path) -> Result<(), AuthorityError> {
    let known = certificates(ca)?;
    let (key_path, path) = (ca.join("next.key"), ca.join("next.crt"));
    if known.len() > 1 && !path.exists() {
        return Err(order(
            ca,
            "has two authorities already",
            "weft authority retire",
        ));
    }
    let mesh = MeshFile::load(&ca.join("mesh.json"))?;
    let failed = failed(ca);
    let key = if key_path.exists() {
        KeyPair::from_pem(&read(&key_path)?).map_err(&failed)?
    } else {
        let key = KeyPair::generate().map_err(&failed)?;
        write_new(&key_path, key.serialize_pem().as_bytes(), 0o600)?;
        key
    };
    if !path.exists() {
        let made = authority_params(&mesh.name).self_signed(&key);
        replace(&path, &made.map_err(&failed)?.pem(), 0o644)?;
    }
    let next = read(&path)?;
    if known.contains(&next) {
        return Ok(());
    }
    replace(&ca.join("ca.crt"), &(known.concat() + &next), 0o644)
}

/// From now on the next authority signs; the key of the one before is deleted.
///
/// # Errors
/// When none was prepared, or a file cannot be read or written.
pub fn switch(ca: &Path) -> Result<(), AuthorityError> {
    let (key_path, path) = (ca.join("next.key"), ca.join("next.crt"));
    if !path.exists() {
        return Err(order(ca, "has no next authority", "weft authority prepare"));
    }
    let next = read(&path)?;
    let mut known = certificates(ca)?;
    let place = known.iter().position(|it| *it == next);
    let place = place.ok_or_else(|| {
        order(
            ca,
            "does not count the next authority yet",
            "weft authority prepare",
        )
    })?;
    known.swap(0, place);
    replace(&ca.join("ca.crt"), &known.concat(), 0o644)?;
    if key_path.exists() {
        fs::rename(&key_path, ca.join("ca.key")).map_err(|source| AuthorityError::File {
            action: "rename",
            path: key_path.clone(),
            source,
        })?;
    }
    signer(ca)?;
    fs::remove_file(&path).map_err(|source| AuthorityError::File {
        action: "remove",
        path,
        source,
    })
}

/// From now on only the authority that signs counts.
///
/// # Errors
/// When there is no other, the next one does not sign yet, or a file cannot be read or written.
pub fn retire(ca: &Path) -> Result<(), AuthorityError> {
    if ca.join("next.crt").exists() || ca.join("next.key").exists() {
        return Err(order(
            ca,
            "has an authority that does not sign yet",
            "weft authority switch",
        ));
    }
    signer(ca)?;
    match &certificates(ca)?[..] {
        [signer, _, ..] => replace(&ca.join("ca.crt"), signer, 0o644),
        _ => Err(order(
            ca,
            "has one authority only",
            "weft authority prepare",
        )),
    }
}

/// Issues another certificate to the holder of the one in `dir`, with another key, in its place; with what it signs with,
/// if it has that.
///
/// # Errors
/// When there is none of this mesh, or a file cannot be read or written.
pub fn renew(ca: &Path, dir: &Path) -> Result<Identity, AuthorityError> {
    let identity = holder(ca, dir)?;
    check_role(&identity.role)?;
    let signed = sign(ca, &identity)?;
    // All are written before the first takes its place: a full disk leaves the old ones.
    let issuer = issuer::renewed(ca, &identity, dir)?;
    signed.replace(dir)?;
    issuer.into_iter().try_for_each(|fresh| {
        fresh
            .put()
            .map_err(|source| not_replaced(&dir.join("issuer.crt"), source))
    })?;
    Ok(identity)
}

/// Whom the certificate in `dir` names, of this authority's mesh.
pub(super) fn holder(ca: &Path, dir: &Path) -> Result<Identity, AuthorityError> {
    let path = dir.join("tls.crt");
    let shown = Shown::of_file(&path).map_err(|source| AuthorityError::Holder {
        path: path.clone(),
        source,
    })?;
    let mesh = MeshFile::load(&ca.join("mesh.json"))?.name;
    let identity = shown.identity;
    if identity.mesh != mesh {
        return Err(AuthorityError::OtherMesh {
            path,
            identity: identity.to_string(),
            mesh,
        });
    }
    Ok(identity)
}

/// The signer's certificate, whose key `ca.key` is.
pub(super) fn signer(ca: &Path) -> Result<String, AuthorityError> {
    let mut known = certificates(ca)?.into_iter();
    let signer = known.next().ok_or_else(|| AuthorityError::Empty {
        path: ca.join("ca.crt"),
    })?;
    let key_path = ca.join("ca.key");
    let pem = |path: &Path, source: rustls_pki_types::pem::Error| AuthorityError::File {
        action: "read",
        path: path.to_owned(),
        source: io::Error::new(io::ErrorKind::InvalidData, source),
    };
    let certificate = CertificateDer::from_pem_slice(signer.as_bytes())
        .map_err(|source| pem(&ca.join("ca.crt"), source))?;
    let key = PrivateKeyDer::from_pem_slice(read(&key_path)?.as_bytes())
        .map_err(|source| pem(&key_path, source))?;
    CertifiedKey::from_der(vec![certificate], key, &ring::default_provider()).map_err(|_| {
        order(
            ca,
            "holds a ca.key that is not of the first certificate in ca.crt: a switch was interrupted",
            "weft authority switch",
        )
    })?;
    Ok(signer)
}

/// The certificates in `ca.crt`, PEM, one text each.
fn certificates(ca: &Path) -> Result<Vec<String>, AuthorityError> {
    let text = read(&ca.join("ca.crt"))?;
    let pieces = text.split_inclusive(END).map(str::to_owned);
    Ok(pieces.filter(|piece| piece.ends_with(END)).collect())
}

fn failed(ca: &Path) -> impl Fn(rcgen::Error) -> AuthorityError {
    move |source| AuthorityError::Certificate {
        dir: ca.to_owned(),
        source,
    }
}

fn order(ca: &Path, problem: &'static str, first: &'static str) -> AuthorityError {
    AuthorityError::Order {
        dir: ca.to_owned(),
        problem,
        first,
    }
}

/// Writes a file in the place of another: whoever reads sees the one or the other.
fn replace(path: &Path, content: &str, mode: u32) -> Result<(), AuthorityError> {
    files::write_beside(path.to_owned(), content.as_bytes(), mode)
        .and_then(files::Fresh::put)
        .map_err(|source| not_replaced(path, source))
}

pub(super) fn not_replaced(path: &Path, source: io::Error) -> AuthorityError {
    AuthorityError::File {
        action: "replace",
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use netmanager_api::identity::{Access, Credentials, Role};

    use super::{super::*, *};

    fn new_mesh() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let wish = Wish {
            name: "demo".to_owned(),
            prefix4: None,
            prefix6: None,
        };
        init(&dir.path().join("ca"), &wish).unwrap();
        dir
    }

    fn ann() -> Role {
        Role::User {
            name: "ann".to_owned(),
            access: Access::Viewer,
        }
    }

    #[test]
    fn an_authority_takes_the_place_of_another_in_three_steps() {
        let dir = new_mesh();
        let (ca, out) = (&dir.path().join("ca"), &dir.path().join("ann"));
        issue(ca, ann(), out).unwrap();
        let old = certificates(ca).unwrap().remove(0);

        prepare(ca).unwrap();
        let both = certificates(ca).unwrap();
        assert_eq!((both.len(), &both[0]), (2, &old));
        let before = fs::read(out.join("tls.crt")).unwrap();
        switch(ca).unwrap();
        assert_eq!(certificates(ca).unwrap(), [both[1].clone(), old]);
        assert!(!ca.join("next.key").exists() && !ca.join("next.crt").exists());

        let identity = renew(ca, out).unwrap();
        assert_eq!(identity.to_string(), "weft://demo/user/ann/viewer");
        assert_ne!(fs::read(out.join("tls.crt")).unwrap(), before);
        Credentials::load(out).unwrap();
        retire(ca).unwrap();
        assert_eq!(certificates(ca).unwrap(), [both[1].clone()]);
        let files = fs::read_dir(ca).unwrap().count();
        assert_eq!(files, 3, "ca.crt, ca.key, mesh.json");
    }

    #[test]
    fn a_step_out_of_order_is_refused_with_the_one_before_and_one_repeated_is_not() {
        let dir = new_mesh();
        let ca = &dir.path().join("ca");
        let refused = |result: Result<(), AuthorityError>, first: &str| {
            let error = result.unwrap_err().to_string();
            assert!(error.ends_with(first), "{error}");
        };
        refused(switch(ca), "weft authority prepare");
        refused(retire(ca), "weft authority prepare");
        prepare(ca).unwrap();
        prepare(ca).unwrap();
        assert_eq!(certificates(ca).unwrap().len(), 2);
        refused(retire(ca), "weft authority switch");
        switch(ca).unwrap();
        refused(prepare(ca), "weft authority retire");
        refused(switch(ca), "weft authority prepare");
        retire(ca).unwrap();
    }

    #[test]
    fn a_step_that_was_interrupted_goes_on_and_nothing_is_issued_in_between() {
        let dir = new_mesh();
        let ca = &dir.path().join("ca");
        prepare(ca).unwrap();
        // As after a crash behind each file: prepare without ca.crt, then without next.crt.
        let both = certificates(ca).unwrap();
        replace(&ca.join("ca.crt"), &both[0], 0o644).unwrap();
        prepare(ca).unwrap();
        assert_eq!(certificates(ca).unwrap(), both);
        replace(&ca.join("ca.crt"), &both[0], 0o644).unwrap();
        fs::remove_file(ca.join("next.crt")).unwrap();
        prepare(ca).unwrap();
        let [old, new] = &certificates(ca).unwrap()[..] else {
            panic!("two authorities");
        };
        // Switch without the key, then without the end.
        replace(&ca.join("ca.crt"), &format!("{new}{old}"), 0o644).unwrap();
        let error = issue(ca, ann(), &dir.path().join("ann")).unwrap_err();
        assert!(
            error.to_string().contains("weft authority switch"),
            "{error}"
        );
        assert!(!dir.path().join("ann").exists());
        fs::rename(ca.join("next.key"), ca.join("ca.key")).unwrap();
        switch(ca).unwrap();
        issue(ca, ann(), &dir.path().join("ann")).unwrap();
        retire(ca).unwrap();
        assert_eq!(certificates(ca).unwrap(), std::slice::from_ref(new));
    }

    #[test]
    fn a_renewal_that_cannot_write_every_file_replaces_none() {
        let dir = new_mesh();
        let (ca, out) = (&dir.path().join("ca"), &dir.path().join("ann"));
        issue(ca, ann(), out).unwrap();
        let files = || ["tls.key", "tls.crt", "ca.crt"].map(|it| fs::read(out.join(it)).unwrap());
        let before = files();
        for name in ["tls.crt", "ca.crt"] {
            // Nothing can be written there, as where the disk is full.
            let in_the_way = out.join(format!("{name}.new"));
            fs::create_dir(&in_the_way).unwrap();
            let error = renew(ca, out).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
            assert_eq!(files(), before, "{name}");
            fs::remove_dir(in_the_way).unwrap();
        }
        renew(ca, out).unwrap();
        Credentials::load(out).unwrap();
        assert_ne!(files(), before);
    }

    #[test]
    fn only_a_certificate_of_this_mesh_is_renewed() {
        let dir = new_mesh();
        let (ca, other) = (&dir.path().join("ca"), &dir.path().join("other"));
        let error = renew(ca, dir.path()).unwrap_err();
        assert!(error.to_string().contains("tls.crt"), "{error}");
        let wish = Wish {
            name: "else".to_owned(),
            prefix4: None,
            prefix6: None,
        };
        init(other, &wish).unwrap();
        let out = dir.path().join("ann");
        issue(other, ann(), &out).unwrap();
        let before = fs::read(out.join("tls.crt")).unwrap();
        let error = renew(ca, &out).unwrap_err().to_string();
        assert!(error.contains("weft://else/user/ann/viewer"), "{error}");
        assert_eq!(fs::read(out.join("tls.crt")).unwrap(), before);
    }
}
