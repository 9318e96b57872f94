//! The seal of what is on disk: a CRC-32 over its table, its key and itself, behind it. A value under another's key, or of an
//! older write of the same page, is seen as well as one that changed.

use std::fmt;

use super::trouble::Flaw;

/// Bytes of a seal.
const SIZE: usize = 4;

/// Where a value lies.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place<'a> {
    /// In the log, by index.
    Entry(u64),
    /// Beside it, by name.
    Value(&'a str),
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Entry(index) => write!(f, "log entry {index}"),
            Self::Value(key) => f.write_str(key),
        }
    }
}

impl Place<'_> {
    fn crc(self, value: &[u8]) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        match self {
            Self::Entry(index) => {
                hasher.update(b"entry");
                hasher.update(&index.to_be_bytes());
            }
            Self::Value(key) => {
                hasher.update(b"value");
                hasher.update(key.as_bytes());
                hasher.update(&[0]);
            }
        }
        hasher.update(value);
        hasher.finalize()
    }

    /// `value` with its seal.
    pub(super) fn seal(self, mut value: Vec<u8>) -> Vec<u8> {
        let crc = self.crc(&value);
        value.extend_from_slice(&crc.to_le_bytes());
        value
    }

    /// What was sealed for this place.
    pub(super) fn open(self, sealed: &[u8]) -> Result<&[u8], Flaw> {
        let Some((value, seal)) = sealed.split_last_chunk::<SIZE>() else {
            let found = format!("{} bytes", sealed.len());
            return Err(Flaw::new(self, format!("at least {SIZE} bytes"), found));
        };
        let (expected, found) = (u32::from_le_bytes(*seal), self.crc(value));
        match expected == found {
            true => Ok(value),
            false => {
                let crc = |it: u32| format!("CRC {it:08x}");
                Err(Flaw::new(self, crc(expected), crc(found)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_opened_where_it_was_sealed_and_as_it_was() {
        let places = [
            Place::Entry(7),
            Place::Entry(8),
            Place::Value("vote"),
            Place::Value("vot"),
        ];
        for place in places {
            let sealed = place.seal(b"value".to_vec());
            for other in places {
                let is_same = other.to_string() == place.to_string();
                assert_eq!(other.open(&sealed).is_ok(), is_same, "{place} at {other}");
            }
            for bit in 0..8 * sealed.len() {
                let mut damaged = sealed.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                place.open(&damaged).unwrap_err();
            }
            place.open(&sealed[..SIZE - 1]).unwrap_err();
            assert_eq!(place.open(&sealed), Ok(&b"value"[..]));
        }
    }
}
