//! The recipe of the kernel programs' object.
//!
//! What is needed beyond cargo is a `core` library for the BPF target and a linker that speaks LLVM. Two sources
//! are known to work; the first that this machine can have is taken, and kept in
//! `$XDG_CACHE_HOME/weft/ebpf` (`~/.cache/weft/ebpf`), outside the checkout:
//!
//! 1. Debian's `rustc-web`, whose BPF `core` comes built. Its packages are unpacked, not installed.
//! 2. rustup's nightly with `rust-src`, of which cargo builds `core` (`-Z build-std`).
//!
//! `bpf-linker` is built against the LLVM of that same compiler. Paths are remapped and no debug information is
//! made, so the bytes depend on the source and the toolchain alone, and `toolchain.json` says which one it was.

mod toolchain;

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use self::toolchain::Toolchain;
use crate::{build::root, debian::output};

/// The object's file name.
const OBJECT: &str = "weft.bpf.o";
/// The file that says what the object was made by.
const RECORD: &str = "toolchain.json";
/// The target: little-endian BPF, which all our machines are.
const TARGET: &str = "bpfel-unknown-none";

/// What an object was made by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The compiler's version line.
    pub(crate) rustc: String,
    /// The linker's version line.
    pub(crate) bpf_linker: String,
    /// SHA-256 of the object, in hexadecimal.
    pub(crate) sha256: String,
}

impl Record {
    /// Whether two objects were made by the same toolchain, so that their bytes must be equal.
    fn same_toolchain(&self, other: &Self) -> bool {
        (&self.rustc, &self.bpf_linker) == (&other.rustc, &other.bpf_linker)
    }

    fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(RECORD);
        let text = fs::read_to_string(&path)
            .with_context(|| format!("failed to read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is not a record", path.display()))
    }
}

/// Rebuilds the committed object.
///
/// # Errors
///
/// No toolchain that this machine can have, with the line that would bring one; a build that failed.
pub(crate) fn rebuild() -> Result<()> {
    let folder = root().join("ebpf/prebuilt");
    let before = Record::read(&folder).ok();
    let after = build(&folder)?;
    let change = match &before {
        Some(before) if before.sha256 == after.sha256 => "unchanged",
        Some(before) if before.same_toolchain(&after) => "changed",
        Some(_) => "changed, also its toolchain",
        None => "new",
    };
    println!("ebpf/prebuilt/{OBJECT}: {change}, sha256 {}", after.sha256);
    Ok(())
}

/// Builds the object and its record into `folder`.
///
/// # Errors
///
/// As [`rebuild`].
pub(crate) fn build(folder: &Path) -> Result<Record> {
    let toolchain = toolchain::provide()?;
    let object = compile(&toolchain)?;
    fs::create_dir_all(folder).with_context(|| format!("failed to make {}", folder.display()))?;
    let target = folder.join(OBJECT);
    fs::copy(&object, &target)
        .with_context(|| format!("failed to copy the object to {}", target.display()))?;
    let record = Record {
        rustc: toolchain.rustc_version()?,
        bpf_linker: toolchain.linker_version()?,
        sha256: sha256(&target)?,
    };
    let text = serde_json::to_string_pretty(&record).context("failed to write the record")? + "\n";
    fs::write(folder.join(RECORD), text)
        .with_context(|| format!("failed to write {RECORD} in {}", folder.display()))?;
    Ok(record)
}

/// Runs cargo for the programs' own workspace; the path of what it made.
fn compile(toolchain: &Toolchain) -> Result<std::path::PathBuf> {
    let target_dir = toolchain.folder().join("target");
    let mut cargo = toolchain.cargo();
    cargo
        .args(["build", "--quiet", "--locked", "--release"])
        .args(["--target", TARGET])
        .args(toolchain.cargo_args())
        .current_dir(root().join("ebpf"))
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(toolchain)?)
        .env("CARGO_TARGET_DIR", &target_dir);
    // A compiler cache would not know this compiler's libraries.
    for name in [
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "CARGO_BUILD_TARGET",
    ] {
        cargo.env_remove(name);
    }
    eprintln!("$ cargo build --release --target {TARGET} (in ebpf/)");
    let status = cargo.status().context("failed to start cargo")?;
    ensure!(
        status.success(),
        "the kernel programs do not build: {status}"
    );
    Ok(target_dir.join(TARGET).join("release/weft"))
}

/// The compiler's flags, separated as `CARGO_ENCODED_RUSTFLAGS` wants them.
fn rustflags(toolchain: &Toolchain) -> Result<String> {
    let root = root().canonicalize().context("the workspace has no root")?;
    let linker = toolchain.linker();
    let mut flags = vec![
        // aya-ebpf asks which registers a kprobe would see; ours has none, so any answer gives the same bytes.
        "--cfg=bpf_target_arch=\"x86_64\"".to_owned(),
        format!("-Clinker={}", linker.display()),
        format!("--remap-path-prefix={}=/weft", root.display()),
    ];
    for (path, name) in toolchain.foreign_paths()? {
        flags.push(format!("--remap-path-prefix={}={name}", path.display()));
    }
    Ok(flags.join("\x1f"))
}

/// SHA-256 of a file, by coreutils.
fn sha256(path: &Path) -> Result<String> {
    let line = output(Command::new("sha256sum").arg(path))?;
    match line.split_whitespace().next() {
        Some(sum) if sum.len() == 64 => Ok(sum.to_owned()),
        _ => bail!("sha256sum said {line:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[ignore = "needs the eBPF toolchain: cargo xtask ebpf"]
    fn the_committed_object_is_what_the_source_builds() {
        let committed = root().join("ebpf/prebuilt");
        let folder = std::env::temp_dir().join(format!("weft-ebpf-{}", std::process::id()));
        let built = build(&folder).expect("the recipe works on this machine");
        let recorded = Record::read(&committed).expect("the committed object has a record");
        assert_eq!(
            sha256(&committed.join(OBJECT)).expect("the committed object"),
            recorded.sha256,
            "the record is of another object: cargo xtask ebpf"
        );
        if built.same_toolchain(&recorded) {
            assert_eq!(
                built.sha256, recorded.sha256,
                "the committed object is old: cargo xtask ebpf"
            );
        } else {
            let status = crate::build::cargo(&["test", "--package", "weft-tests"])
                .args(["--test", "program_*", "--", "--ignored"])
                .env("WEFT_BPF_OBJECT", folder.join(OBJECT))
                .status()
                .expect("cargo starts");
            assert!(
                status.success(),
                "{} builds programs that fail",
                built.rustc
            );
        }
        fs::remove_dir_all(&folder).expect("the folder of the built object");
    }

    #[test]
    fn the_bytes_are_compared_only_under_the_same_toolchain() {
        let record = |rustc: &str, sha256: &str| Record {
            rustc: rustc.into(),
            bpf_linker: "bpf-linker 0.13.0".into(),
            sha256: sha256.into(),
        };
        assert!(record("rustc 1.96.0", "a").same_toolchain(&record("rustc 1.96.0", "b")));
        assert!(!record("rustc 1.96.0", "a").same_toolchain(&record("rustc 1.97.0", "a")));
    }
}
