//! The node's key pair: the private half lives in one file of the state directory and nowhere else.
//!
//! The file holds the base64 form that `wg genkey` writes, mode 0600. It is made once; a node that loses it
//! is a new node to its peers until their tables say so.

use std::{
    fmt,
    fs::{self, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    str::FromStr,
};

use wireguard_control::Key;

/// Who may read the private key: its owner.
const MODE: u32 = 0o600;

/// A WireGuard public key; in text it is base64.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; 32]);

impl FromStr for PublicKey {
    type Err = BadKey;

    fn from_str(text: &str) -> Result<Self, BadKey> {
        match Key::from_base64(text) {
            Ok(key) if key != Key::zero() => Ok(Self(key.0)),
            _ => Err(BadKey(text.to_owned())),
        }
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&Key(self.0).to_base64())
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

/// A text that is no WireGuard public key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("public key {0:?} is not 32 bytes of base64 with a value other than zero")]
pub struct BadKey(pub String);

/// Why the private key cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file system refused.
    #[error("failed to {action} the private key {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others than the owner may read it.
    #[error("private key {} has mode {mode:o}: set it to 600", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Its content is no key.
    #[error("private key {} is not 32 bytes of base64: remove the file to be given a new key", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
    },
}

/// A private key; it has no text form, so that no log can hold it.
#[derive(Clone)]
pub struct PrivateKey(Key);

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

impl PrivateKey {
    /// Reads the key in `path`.
    ///
    /// # Errors
    /// When the file is not there, is readable by others, or holds no key.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        let io = |action| {
            move |source| KeyError::Io {
                action,
                path: path.to_owned(),
                source,
            }
        };
        let mut file = fs::File::open(path).map_err(io("open"))?;
        let mode = file.metadata().map_err(io("look at"))?.mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Exposed {
                path: path.to_owned(),
                mode,
            });
        }
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(io("read"))?;
        match Key::from_base64(text.trim()) {
            Ok(key) if key != Key::zero() => Ok(Self(key)),
            _ => Err(KeyError::Malformed {
                path: path.to_owned(),
            }),
        }
    }

    /// Reads the key in `path`, which is first made if there is none.
    ///
    /// # Errors
    /// As [`PrivateKey::load`], and when the file cannot be made.
    pub fn load_or_create(path: &Path) -> Result<Self, KeyError> {
        match Self::load(path) {
            Err(KeyError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Self::create(path)
            }
            loaded => loaded,
        }
    }

    /// Writes a new key beside `path` and renames it, so that no reader ever sees half a key.
    fn create(path: &Path) -> Result<Self, KeyError> {
        let io = |action| {
            move |source| KeyError::Io {
                action,
                path: path.to_owned(),
                source,
            }
        };
        let key = Key::generate_private();
        let draft = path.with_extension("new");
        let _ = fs::remove_file(&draft);
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(MODE)
            .open(&draft)
            .map_err(io("create"))?;
        writeln!(file, "{}", key.to_base64()).map_err(io("write"))?;
        file.sync_all().map_err(io("write"))?;
        fs::rename(&draft, path).map_err(io("rename"))?;
        Ok(Self(key))
    }

    /// The public half.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.get_public().0)
    }

    /// The form that configures a kernel device.
    pub(crate) fn key(&self) -> Key {
        self.0.clone()
    }

    /// The raw key.
    pub(crate) fn bytes(&self) -> [u8; 32] {
        self.0.0
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_only_its_owner_may_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tunnel.key");
        let made = PrivateKey::load_or_create(&path).unwrap();
        let again = PrivateKey::load_or_create(&path).unwrap();
        assert_eq!(made.public(), again.public());
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(format!("{made:?}"), "PrivateKey(..)");
    }

    #[test]
    fn a_key_that_others_can_read_is_refused_with_the_way_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tunnel.key");
        PrivateKey::load_or_create(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = PrivateKey::load_or_create(&path).unwrap_err().to_string();
        assert!(
            error.ends_with("tunnel.key has mode 640: set it to 600"),
            "{error}"
        );
    }

    #[test]
    fn a_file_that_holds_no_key_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tunnel.key");
        for content in ["", "short", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="] {
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            let error = PrivateKey::load_or_create(&path).unwrap_err();
            assert!(matches!(error, KeyError::Malformed { .. }), "{content:?}");
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
        }
    }

    #[test]
    fn a_public_key_survives_its_text_and_a_wrong_one_is_named() {
        let text = "DD5yKRfzExcV5+kDnTroDgCU15latdMjiQ59j1hEuk8=";
        assert_eq!(text.parse::<PublicKey>().unwrap().to_string(), text);
        for wrong in ["", "abc", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="] {
            assert_eq!(wrong.parse::<PublicKey>(), Err(BadKey(wrong.to_owned())));
        }
    }
}
