//! How the log, snapshots and Raft messages are written: MessagePack with field names.
//!
//! Self-describing, so that a newer version may add fields; addresses are text, as in JSON, because serde's
//! tagged enums only read them so.

use std::io;

use serde::{Serialize, de::DeserializeOwned};

pub(crate) fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, rmp_serde::encode::Error> {
    let mut bytes = Vec::new();
    write(&mut bytes, value)?;
    Ok(bytes)
}

/// How many bytes [`encode`] makes of it.
pub(crate) fn size<T: Serialize>(value: &T) -> Result<usize, rmp_serde::encode::Error> {
    let mut count = Count(0);
    write(&mut count, value)?;
    Ok(count.0)
}

fn write<T: Serialize>(
    out: &mut impl io::Write,
    value: &T,
) -> Result<(), rmp_serde::encode::Error> {
    let mut serializer = rmp_serde::Serializer::new(out)
        .with_struct_map()
        .with_human_readable();
    value.serialize(&mut serializer)
}

struct Count(usize);

impl io::Write for Count {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, rmp_serde::decode::Error> {
    T::deserialize(&mut rmp_serde::Deserializer::new(bytes).with_human_readable())
}
