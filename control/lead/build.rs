//! Says what the state of a lead and its encoding follow from: leads compare theirs only where that is the same.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

const PARTS: [&str; 4] = [
    "../core/src",
    "../../ebpf/common/src",
    "../../Cargo.lock",
    "src/raft/codec.rs",
];

/// FNV-1a.
fn hash(hash: u64, bytes: &[u8]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    bytes.iter().fold(hash, step)
}

fn files(path: &Path, all: &mut Vec<PathBuf>) -> io::Result<()> {
    if !path.is_dir() {
        all.push(path.to_owned());
        return Ok(());
    }
    for entry in fs::read_dir(path)? {
        files(&entry?.path(), all)?;
    }
    Ok(())
}

fn main() -> io::Result<()> {
    let mut all = Vec::new();
    for part in PARTS {
        println!("cargo::rerun-if-changed={part}");
        files(Path::new(part), &mut all)?;
    }
    all.sort();
    let mut source = 0xcbf2_9ce4_8422_2325;
    for file in all {
        source = hash(source, file.as_os_str().as_encoded_bytes());
        source = hash(source, &fs::read(file)?);
    }
    println!("cargo::rustc-env=WEFT_STATE={source:016x}");
    Ok(())
}
