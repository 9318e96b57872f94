//! The files that a holder has, and how others take their place.
//!
//! ```text
//!  DIR/tls.crt  own certificate, then whoever signed it for the authority
//!  DIR/tls.key  mode 0600
//!  DIR/ca.crt   the authorities that count, the one that signs first
//! ```
//!
//! What takes the place of others is on the disk before the first of them goes. The certificate goes first and the key
//! last: a crash between the two leaves the key beside its place, and [`mend`] puts it there.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject};

use super::{IdentityError, Shown, check_key_mode, file_error, held::Current, provider};

const CHAIN: &str = "tls.crt";
const KEY: &str = "tls.key";
const AUTHORITIES: &str = "ca.crt";

/// A holder's files, PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct Files {
    /// Its certificate, and what leads from it to an authority.
    pub chain: Vec<u8>,
    /// Its key.
    pub key: Vec<u8>,
    /// The authorities that count for it.
    pub authorities: Vec<u8>,
}

impl std::fmt::Debug for Files {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Files").finish_non_exhaustive()
    }
}

impl Files {
    pub(super) fn read(dir: &Path) -> Result<Self, IdentityError> {
        let read = |name: &str| {
            let path = dir.join(name);
            fs::read(&path).map_err(|error| file_error(&path, pem::Error::Io(error)))
        };
        let chain = read(CHAIN)?;
        check_key_mode(&dir.join(KEY))?;
        Ok(Self {
            chain,
            key: read(KEY)?,
            authorities: read(AUTHORITIES)?,
        })
    }

    /// What their certificate says, if the key is its own and the authorities among them vouch for it.
    ///
    /// # Errors
    /// When they do not serve.
    pub fn check(&self) -> Result<Shown, IdentityError> {
        let current = Current::of(self.clone(), Path::new(""))?;
        current.check().cloned()
    }

    /// Writes them into `dir`, which is made where it is missing; none of them may exist.
    ///
    /// # Errors
    /// When one exists or cannot be written.
    pub fn create(&self, dir: &Path) -> Result<(), IdentityError> {
        fs::create_dir_all(dir).map_err(|error| unwritten(dir, error))?;
        let new = |(name, content, mode): (&str, &[u8], u32)| {
            let path = dir.join(name);
            write_new(&path, content, mode).map_err(|error| unwritten(&path, error))
        };
        self.each().into_iter().try_for_each(new)
    }

    /// Puts them in the place of those in `dir`.
    ///
    /// # Errors
    /// When one cannot be written: none has been replaced then.
    pub fn replace(&self, dir: &Path) -> Result<(), IdentityError> {
        let mut written = Vec::new();
        for (name, content, mode) in self.each() {
            let path = dir.join(name);
            match write_beside(path.clone(), content, mode) {
                Ok(fresh) => written.push(fresh),
                Err(error) => {
                    written.into_iter().for_each(Fresh::discard);
                    return Err(unwritten(&path, error));
                }
            }
        }
        written.into_iter().try_for_each(|fresh| {
            let path = fresh.path.clone();
            fresh.put().map_err(|error| unwritten(&path, error))
        })
    }

    /// In the order in which they take their places.
    fn each(&self) -> [(&str, &[u8], u32); 3] {
        [
            (AUTHORITIES, &self.authorities, 0o644),
            (CHAIN, &self.chain, 0o644),
            (KEY, &self.key, 0o600),
        ]
    }
}

/// The files of a holder in `dir`, none of which may exist yet; the first that does.
#[must_use]
pub fn existing(dir: &Path) -> Option<PathBuf> {
    let paths = [CHAIN, KEY, AUTHORITIES].map(|name| dir.join(name));
    paths.into_iter().find(|path| path.exists())
}

/// Goes on where a crash has ended [`Files::replace`] between the certificate and its key.
pub(super) fn mend(dir: &Path) -> Result<(), IdentityError> {
    let (key, beside) = (dir.join(KEY), beside(&dir.join(KEY)));
    if !beside.exists() || fits(dir, &key) || !fits(dir, &beside) {
        return Ok(());
    }
    check_key_mode(&beside)?;
    let fresh = Fresh {
        written: beside,
        path: key.clone(),
    };
    fresh.put().map_err(|error| unwritten(&key, error))
}

/// Whether the key in a file is that of the certificate in `dir`.
fn fits(dir: &Path, key: &Path) -> bool {
    let chain = CertificateDer::pem_file_iter(dir.join(CHAIN)).and_then(Iterator::collect);
    let (Ok(chain), Ok(key)) = (chain, PrivateKeyDer::from_pem_file(key)) else {
        return false;
    };
    CertifiedKey::from_der(chain, key, &provider()).is_ok()
}

fn unwritten(path: &Path, source: io::Error) -> IdentityError {
    IdentityError::Write {
        path: path.display().to_string(),
        source,
    }
}

/// Writes a file that must not exist.
///
/// # Errors
/// When it exists or cannot be written.
pub fn write_new(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(mode);
    let mut file = options.open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

/// A file that is written and has not taken its place.
#[derive(Debug)]
pub struct Fresh {
    written: PathBuf,
    path: PathBuf,
}

impl Fresh {
    /// Takes its place: whoever reads sees the one or the other.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn put(self) -> io::Result<()> {
        let Self { written, path } = self;
        fs::rename(&written, &path)?;
        let dir = path.parent();
        dir.map_or(Ok(()), |dir| File::open(dir)?.sync_all())
    }

    /// Is not wanted any more.
    fn discard(self) {
        // What stays is replaced by the next try.
        let _ = fs::remove_file(self.written);
    }
}

fn beside(path: &Path) -> PathBuf {
    let mut written = path.as_os_str().to_owned();
    written.push(".new");
    PathBuf::from(written)
}

/// Writes what is to take the place of `path`, on the same disk.
///
/// # Errors
/// When it cannot be written.
pub fn write_beside(path: PathBuf, content: &[u8], mode: u32) -> io::Result<Fresh> {
    let written = beside(&path);
    // What a crash has left may have another mode.
    match fs::remove_file(&written) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    write_new(&written, content, mode)?;
    Ok(Fresh { written, path })
}

#[cfg(test)]
mod tests {
    use super::{super::held::tests::Authority, *};
    use crate::identity::Credentials;

    fn files(authority: &Authority) -> Files {
        let (chain, key) = authority.issue("agent/edge");
        Files {
            chain: chain.into(),
            key: key.into(),
            authorities: authority.certificate.clone().into(),
        }
    }

    #[test]
    fn a_crash_between_the_certificate_and_its_key_is_mended() {
        let (authority, dir) = (Authority::new(), tempfile::tempdir().unwrap());
        let dir = dir.path();
        files(&authority).create(dir).unwrap();
        let next = files(&authority);
        // As after a crash: the certificate has taken its place, the key lies beside.
        let _key = write_beside(dir.join(KEY), &next.key, 0o600).unwrap();
        fs::write(dir.join(CHAIN), &next.chain).unwrap();
        Credentials::load(dir).unwrap();
        assert!(Files::read(dir).unwrap() == next);
        // One that fits nothing stays beside, and one that is not needed, too.
        let _key = write_beside(dir.join(KEY), &files(&authority).key, 0o600).unwrap();
        Credentials::load(dir).unwrap();
        assert!(Files::read(dir).unwrap() == next);
    }

    #[test]
    fn files_are_made_once_and_only_their_owner_reads_the_key() {
        use std::os::unix::fs::PermissionsExt;
        let (authority, dir) = (Authority::new(), tempfile::tempdir().unwrap());
        let dir = dir.path().join("edge");
        let made = files(&authority);
        assert_eq!(existing(&dir), None);
        made.create(&dir).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir.join(KEY)), 0o600);
        assert!(existing(&dir).is_some());
        let again = files(&authority).create(&dir);
        assert!(matches!(again, Err(IdentityError::Write { .. })));
        assert!(Files::read(&dir).unwrap() == made);
    }
}
