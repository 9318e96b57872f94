//! Where the running kernel keeps a field of a struct, out of its BTF (`Documentation/bpf/btf.rst`).
//!
//! ```text
//!  header | types: name, kind and count, size; then the kind's own words | strings
//! ```
//!
//! The programs have no relocations for Rust types, so what they read of the kernel's structs is told to them.

use std::collections::HashMap;

/// Why an offset is not known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BtfError {
    /// The bytes are no BTF.
    #[error("it is not BTF, or cut off")]
    Malformed,
    /// There is no such struct or field.
    #[error("it has no {0}")]
    Missing(String),
}

/// `BTF_MAGIC`.
const MAGIC: u16 = 0xeb9f;
/// Bytes of `struct btf_type`, and of a member of a struct.
const WORDS: usize = 12;
const STRUCT: u32 = 4;
const UNION: u32 = 5;

/// The types of a kernel.
pub(super) struct Btf<'a> {
    strings: &'a [u8],
    types: &'a [u8],
    /// Where each type starts, by its number less one.
    starts: Vec<usize>,
    /// Structs by name.
    structs: HashMap<&'a [u8], u32>,
}

impl<'a> Btf<'a> {
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, BtfError> {
        let half = |at: usize| {
            bytes
                .get(at..at + 2)?
                .try_into()
                .ok()
                .map(u16::from_ne_bytes)
        };
        if half(0) != Some(MAGIC) {
            return Err(BtfError::Malformed);
        }
        let header = |at| word(bytes, at).map(|word| word as usize);
        let section = |offset: usize, length: usize| {
            let start = header(4)?.checked_add(header(offset)?)?;
            bytes.get(start..start.checked_add(header(length)?)?)
        };
        let types = section(8, 12).ok_or(BtfError::Malformed)?;
        let strings = section(16, 20).ok_or(BtfError::Malformed)?;
        let mut btf = Self {
            strings,
            types,
            starts: Vec::new(),
            structs: HashMap::new(),
        };
        btf.index().ok_or(BtfError::Malformed)?;
        Ok(btf)
    }

    fn index(&mut self) -> Option<()> {
        let mut at = 0;
        while at < self.types.len() {
            self.starts.push(at);
            let info = word(self.types, at + 4)?;
            let count = (info & 0xffff) as usize;
            let kind = info >> 24 & 0x1f;
            let rest = match kind {
                STRUCT | UNION | 15 | 19 => count * 12,
                3 => 12,
                6 | 13 => count * 8,
                1 | 14 | 17 => 4,
                2 | 7..=12 | 16 | 18 => 0,
                _ => return None,
            };
            if kind == STRUCT {
                let name = self.string(word(self.types, at)?)?;
                let number = u32::try_from(self.starts.len()).ok()?;
                self.structs.entry(name).or_insert(number);
            }
            at += WORDS + rest;
        }
        Some(())
    }

    fn string(&self, offset: u32) -> Option<&'a [u8]> {
        self.strings
            .get(offset as usize..)?
            .split(|byte| *byte == 0)
            .next()
    }

    /// Bytes from the start of struct `name` to the field that `path` leads to.
    pub(super) fn offset(&self, name: &str, path: &[&str]) -> Result<u32, BtfError> {
        let missing = || BtfError::Missing(format!("{name}.{}", path.join(".")));
        let start = *self.structs.get(name.as_bytes()).ok_or_else(missing)?;
        let (bits, _) = path
            .iter()
            .try_fold((0, start), |(bits, kind), field| {
                let (more, kind) = self.field(kind, field.as_bytes())?;
                Some((bits + more, kind))
            })
            .ok_or_else(missing)?;
        (bits % 8 == 0).then_some(bits / 8).ok_or_else(missing)
    }

    /// A field of a struct or union, its nameless parts included: its offset in bits and its type.
    fn field(&self, number: u32, name: &[u8]) -> Option<(u32, u32)> {
        let start = *self.starts.get((number as usize).checked_sub(1)?)?;
        let info = word(self.types, start + 4)?;
        if !matches!(info >> 24 & 0x1f, STRUCT | UNION) {
            return None;
        }
        let has_bit_fields = info >> 31 == 1;
        for index in 0..(info & 0xffff) as usize {
            let member = start + WORDS + index * WORDS;
            let own = self.string(word(self.types, member)?)?;
            let kind = word(self.types, member + 4)?;
            let offset = word(self.types, member + 8)?;
            let bits = if has_bit_fields {
                offset & 0x00ff_ffff
            } else {
                offset
            };
            if own == name {
                return Some((bits, kind));
            }
            if own.is_empty()
                && let Some((more, kind)) = self.field(kind, name)
            {
                return Some((bits + more, kind));
            }
        }
        None
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// struct outer { u32 first; union { u32 a; struct inner in; }; struct inner tail; }; struct inner { u32 x; u32 y; }
    fn sample() -> Vec<u8> {
        let strings = b"\0u32\0outer\0first\0a\0in\0tail\0inner\0x\0y\0";
        let name = |text: &str| {
            let all = String::from_utf8(strings.to_vec()).unwrap();
            all.find(&format!("\0{text}\0")).unwrap() as u32 + 1
        };
        let head = |kind: u32, count: u32| kind << 24 | count;
        let words: Vec<u32> = [
            vec![name("u32"), head(1, 0), 4, 32],
            vec![name("inner"), head(STRUCT, 2), 8],
            vec![name("x"), 1, 0, name("y"), 1, 32],
            vec![0, head(UNION, 2), 8, name("a"), 1, 0, name("in"), 2, 0],
            vec![name("outer"), head(STRUCT, 3), 20, name("first"), 1, 0],
            vec![0, 3, 32, name("tail"), 2, 96],
        ]
        .concat();
        let types: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mut bytes = MAGIC.to_ne_bytes().to_vec();
        bytes.extend([1, 0]);
        for word in [24, 0, types.len(), types.len(), strings.len()] {
            bytes.extend((word as u32).to_ne_bytes());
        }
        bytes.extend(types);
        bytes.extend(strings);
        bytes
    }

    #[test]
    fn a_field_is_found_through_nameless_parts_and_named_ones() {
        let bytes = sample();
        let btf = Btf::parse(&bytes).unwrap();
        for (path, offset) in [
            (&["first"][..], 0),
            (&["a"], 4),
            (&["in", "y"], 8),
            (&["tail"], 12),
            (&["tail", "y"], 16),
        ] {
            assert_eq!(btf.offset("outer", path), Ok(offset), "{path:?}");
        }
        assert_eq!(
            btf.offset("outer", &["tail", "z"]),
            Err(BtfError::Missing("outer.tail.z".to_owned()))
        );
        assert!(btf.offset("nobody", &["x"]).is_err());
        assert!(btf.offset("outer", &["first", "x"]).is_err());
    }

    #[test]
    fn bytes_that_are_cut_off_are_refused() {
        let bytes = sample();
        assert_eq!(Btf::parse(b"").err(), Some(BtfError::Malformed));
        for len in 0..bytes.len() {
            assert_eq!(
                Btf::parse(&bytes[..len]).err(),
                Some(BtfError::Malformed),
                "{len}"
            );
        }
    }
}
