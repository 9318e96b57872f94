//! Running cargo, and where it put the binaries.

use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// Packages whose binaries are built together. The CNI plugin stands alone, so that the features which the others
/// ask of their common crates do not make it larger.
type Groups = &'static [&'static [&'static str]];
/// All of the product.
pub(crate) const PRODUCT: Groups = &[&["weft", "weft-netmanager", "bookinfo"], &["weft-cni"]];
/// What decides.
pub(crate) const CONTROL_PLANE: Groups = &[&["weft"]];
/// What carries packets.
pub(crate) const DATA_PATH: Groups = &[&["weft-netmanager"], &["weft-cni"]];

/// A cargo command at the workspace's root.
///
/// In CI, where each checkout is built once, without incremental compilation: its state is more than half of what a
/// checkout's build takes of the disk. `CARGO_INCREMENTAL` overrules.
pub(crate) fn cargo(args: &[&str]) -> Command {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(cargo);
    command.args(args).current_dir(root());
    if env::var_os("CI").is_some() && env::var_os("CARGO_INCREMENTAL").is_none() {
        command.env("CARGO_INCREMENTAL", "0");
    }
    command
}

/// The workspace's root.
pub(crate) fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// Runs cargo to its successful end.
pub(crate) fn run(args: &[&str]) -> Result<()> {
    let line = args.join(" ");
    eprintln!("$ cargo {line}");
    let status = cargo(args)
        .status()
        .with_context(|| format!("failed to start cargo {line}"))?;
    ensure!(status.success(), "cargo {line}: {status}");
    Ok(())
}

/// Builds binaries of the product for release; returns the folder that holds all of them.
pub(crate) fn release(groups: Groups) -> Result<PathBuf> {
    let mut folder = None;
    for packages in groups {
        for (name, path) in executables(packages)? {
            let parent = path
                .parent()
                .with_context(|| format!("{name} has no folder"))?
                .to_owned();
            folder = Some(parent);
        }
    }
    folder.context("cargo built no binary")
}

/// Builds the binaries of `packages` for release and says where each is.
pub(crate) fn executables(packages: &[&str]) -> Result<BTreeMap<String, PathBuf>> {
    let mut args = vec!["build", "--release", "--bins"];
    args.extend(packages.iter().flat_map(|package| ["--package", package]));
    let found = announced(&args)?;
    if found.is_empty() {
        bail!("cargo built no binary of {}", packages.join(", "));
    }
    Ok(found.into_iter().collect())
}

/// Runs cargo with `args` and says which executables it announces, by the names of their targets.
pub(crate) fn announced(args: &[&str]) -> Result<Vec<(String, PathBuf)>> {
    let line = args.join(" ");
    eprintln!("$ cargo {line}");
    let output = cargo(args)
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("failed to start cargo {line}"))?;
    ensure!(output.status.success(), "cargo {line}: {}", output.status);
    let text = String::from_utf8(output.stdout).context("cargo's messages are not UTF-8")?;
    Ok(text.lines().filter_map(executable).collect())
}

/// The name and path in one of cargo's messages, if it announces a binary.
fn executable(line: &str) -> Option<(String, PathBuf)> {
    let message: Value = serde_json::from_str(line).ok()?;
    let path = message.get("executable")?.as_str()?;
    let name = message.get("target")?.get("name")?.as_str()?;
    Some((name.to_owned(), PathBuf::from(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_messages_that_announce_a_binary_count() {
        let line =
            r#"{"reason":"compiler-artifact","target":{"name":"weft"},"executable":"/t/weft"}"#;
        assert_eq!(executable(line), Some(("weft".into(), "/t/weft".into())));
        let library =
            r#"{"reason":"compiler-artifact","target":{"name":"weft"},"executable":null}"#;
        assert_eq!(executable(library), None);
        assert_eq!(executable("warning: something"), None);
    }
}
