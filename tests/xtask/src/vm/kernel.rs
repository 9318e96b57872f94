//! Debian's kernels, unpacked into the cache.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;

use crate::debian::{self, Apt};

/// Where a kernel's modules are below its folder.
const MODULES: &str = "lib/modules";
/// How packages of kernels begin.
const PACKAGE: &str = "linux-image-";

/// A series of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Series {
    /// Debian 12's own: the oldest that Weft serves, without TCX.
    #[value(name = "6.1")]
    V6_1,
    /// Debian 12's backport, which is Debian 13's.
    #[value(name = "6.12")]
    V6_12,
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        })
    }
}

impl Series {
    /// The suite whose `linux-image-amd64` is of this series.
    const fn suite(self) -> &'static str {
        match self {
            Self::V6_1 => "bookworm",
            Self::V6_12 => "bookworm-backports",
        }
    }

    /// How the packages of this series begin.
    fn package(self) -> String {
        format!("{PACKAGE}{self}.")
    }
}

/// A kernel and its modules.
#[derive(Debug)]
pub(crate) struct Kernel {
    folder: PathBuf,
    /// What `uname -r` says under it.
    pub(crate) release: String,
}

impl Kernel {
    /// The kernel of a series: the one in the cache, else the newest that Debian has.
    ///
    /// # Errors
    ///
    /// No such package, or an archive that cannot be reached.
    pub(crate) fn provide(series: Series) -> Result<Self> {
        let cache = debian::cache("vm")?;
        let folder = match cached(&cache, &series.package())? {
            Some(folder) => folder,
            None => fetch(series, &cache)?,
        };
        let name = folder
            .file_name()
            .context("a kernel's folder has no name")?;
        let release = name
            .to_string_lossy()
            .strip_prefix(PACKAGE)
            .context("not a kernel's folder")?
            .to_owned();
        let kernel = Self { folder, release };
        if !kernel.modules().join("modules.dep").exists() {
            debian::output(
                Command::new("depmod")
                    .arg("-b")
                    .arg(&kernel.folder)
                    .arg(&kernel.release),
            )?;
        }
        Ok(kernel)
    }

    /// The image that boots.
    pub(crate) fn image(&self) -> PathBuf {
        self.folder.join(format!("boot/vmlinuz-{}", self.release))
    }

    /// The folder of the modules.
    pub(crate) fn modules(&self) -> PathBuf {
        self.folder.join(MODULES).join(&self.release)
    }
}

fn cached(cache: &Path, prefix: &str) -> Result<Option<PathBuf>> {
    let mut found: Vec<PathBuf> = fs::read_dir(cache)
        .with_context(|| format!("failed to list {}", cache.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(prefix))
        })
        .collect();
    found.sort();
    Ok(found.pop())
}

fn fetch(series: Series, cache: &Path) -> Result<PathBuf> {
    let apt = Apt::suite(series.suite(), &cache.join(series.suite()))?;
    let package = apt.first_dependency("linux-image-amd64")?;
    ensure!(
        package.starts_with(&series.package()),
        "Debian's {} has {package}, which is not of {series}",
        series.suite()
    );
    let folder = cache.join(&package);
    apt.unpack(&[&package], &folder, "boot")?;
    Ok(folder)
}

/// A static shell for the time before the host's root is mounted.
pub(crate) fn busybox() -> Result<PathBuf> {
    let folder = debian::cache("vm")?.join("busybox-static");
    for program in ["bin/busybox", "usr/bin/busybox"] {
        if folder.join(program).exists() {
            return Ok(folder.join(program));
        }
    }
    let apt = Apt::suite("bookworm", &debian::cache("vm/bookworm")?)?;
    apt.unpack(&["busybox-static"], &folder, "bin/busybox")?;
    let program = folder.join("bin/busybox");
    if !program.exists() {
        bail!("busybox-static holds no bin/busybox");
    }
    Ok(program)
}
