//! The product's binaries, as they were built beside the test that runs.

use std::{env, path::PathBuf};

/// The path of the workspace's binary `name`, of the same profile as the calling test.
///
/// # Panics
/// When it was not built: `cargo xtask netns` builds every binary before it runs the tests.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let test = env::current_exe().expect("a running program has a path");
    let path = test
        .parent()
        .and_then(|deps| deps.parent())
        .expect("cargo puts tests into a folder of the profile's")
        .join(name);
    assert!(
        path.is_file(),
        "{} is not built: cargo build --workspace --bins",
        path.display()
    );
    path
}
