//! A compiler with a BPF `core`, and a linker built against its LLVM.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};

use crate::debian::{Apt, cache, output};

/// Debian's packages: a compiler, its libraries for this machine and for BPF, and its LLVM.
const DEBIAN_PACKAGES: [&str; 5] = [
    "rustc-web",
    "libstd-rust-web-1.96",
    "libstd-rust-web-dev",
    "libstd-rust-web-dev-bpf",
    "libllvm22",
];
/// What Debian's LLVM itself needs; these are installed where they are missing.
const DEBIAN_LIBRARIES: [&str; 7] = [
    "libedit2",
    "libffi8",
    "libstdc++6",
    "libxml2",
    "libz3-4",
    "libzstd1",
    "zlib1g",
];
/// The linker's version (aya-rs/bpf-linker).
const LINKER_VERSION: &str = "0.13.0";

/// Where a compiler is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Debian,
    Nightly,
}

/// A compiler and its linker.
#[derive(Debug)]
pub(super) struct Toolchain {
    source: Source,
    /// Where everything of it is kept.
    folder: PathBuf,
    /// The folder of the compiler's own libraries, its LLVM among them.
    libraries: PathBuf,
    rustc: PathBuf,
}

/// The toolchain that this machine has or can have.
pub(super) fn provide() -> Result<Toolchain> {
    let toolchain = match debian() {
        Ok(toolchain) => toolchain,
        Err(debian) => nightly().with_context(|| {
            format!("no BPF compiler: Debian's cannot be had ({debian:#}), nor rustup's nightly")
        })?,
    };
    toolchain.provide_linker()?;
    Ok(toolchain)
}

impl Toolchain {
    /// Where everything of this toolchain is kept.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The linker.
    pub(super) fn linker(&self) -> PathBuf {
        self.folder.join("linker/bin/bpf-linker")
    }

    /// Cargo, told to use this compiler.
    pub(super) fn cargo(&self) -> Command {
        let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        // The prebuilt and the self-built core both need what a stable compiler locks.
        command
            .env("RUSTC_BOOTSTRAP", "1")
            .env("RUSTC", &self.rustc);
        if self.source == Source::Debian {
            command.env("LD_LIBRARY_PATH", &self.libraries);
        }
        command
    }

    /// What cargo must be told beyond the target.
    pub(super) fn cargo_args(&self) -> &'static [&'static str] {
        match self.source {
            Source::Debian => &[],
            Source::Nightly => &["-Z", "build-std=core"],
        }
    }

    /// The compiler's version line.
    pub(super) fn rustc_version(&self) -> Result<String> {
        output(self.rustc().arg("--version"))
    }

    /// The linker's version line.
    pub(super) fn linker_version(&self) -> Result<String> {
        output(Command::new(self.linker()).arg("--version"))
    }

    /// Paths outside the checkout that the compiler would write into the object, and their names there.
    pub(super) fn foreign_paths(&self) -> Result<Vec<(PathBuf, &'static str)>> {
        let sysroot = output(self.rustc().args(["--print", "sysroot"]))?;
        Ok(vec![(cargo_home()?, "/cargo"), (sysroot.into(), "/rust")])
    }

    fn rustc(&self) -> Command {
        let mut command = Command::new(&self.rustc);
        if self.source == Source::Debian {
            command.env("LD_LIBRARY_PATH", &self.libraries);
        }
        command
    }

    /// Builds the linker against the compiler's LLVM, once.
    fn provide_linker(&self) -> Result<()> {
        if self.linker().exists() && self.linker_version().is_ok() {
            return Ok(());
        }
        let major = self.llvm_major()?;
        let prefix = self.folder.join("llvm");
        let library = library(&self.libraries, &format!("libLLVM.so.{major}."))?;
        fs::create_dir_all(prefix.join("lib"))
            .with_context(|| format!("failed to make {}", prefix.display()))?;
        let link = prefix.join("lib/libLLVM.so");
        // A link from an earlier try may point elsewhere.
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(&library, &link)
            .with_context(|| format!("failed to link {}", link.display()))?;
        let feature = format!("llvm-{major}");
        eprintln!("$ cargo install bpf-linker --version {LINKER_VERSION} --features {feature}");
        let status = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args([
                "install",
                "bpf-linker",
                "--version",
                LINKER_VERSION,
                "--locked",
                "--force",
            ])
            .args(["--no-default-features", "--features", &feature, "--root"])
            .arg(self.folder.join("linker"))
            .current_dir(&self.folder)
            .env("CARGO_TARGET_DIR", self.folder.join("linker/target"))
            .env("LLVM_PREFIX", &prefix)
            .env(
                "RUSTFLAGS",
                format!("-Clink-arg=-Wl,-rpath,{}", self.libraries.display()),
            )
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .status()
            .context("failed to start cargo install")?;
        ensure!(
            status.success(),
            "bpf-linker {LINKER_VERSION} does not build: {status}"
        );
        let _ = fs::remove_dir_all(self.folder.join("linker/target"));
        Ok(())
    }

    fn llvm_major(&self) -> Result<u32> {
        let version = output(self.rustc().arg("-vV"))?;
        version
            .lines()
            .find_map(|line| {
                line.strip_prefix("LLVM version: ")?
                    .split('.')
                    .next()?
                    .parse()
                    .ok()
            })
            .with_context(|| format!("the compiler names no LLVM version: {version}"))
    }
}

/// Debian's compiler, unpacked into the cache.
fn debian() -> Result<Toolchain> {
    let folder = cache("ebpf")?.join(format!("debian-{}", DEBIAN_PACKAGES[1]));
    let usr = folder.join("usr");
    if !usr.join("bin/rustc").exists() {
        Apt::own().unpack(&DEBIAN_PACKAGES, &folder, "usr/bin/rustc")?;
    }
    let libraries = fs::read_dir(usr.join("lib"))
        .with_context(|| format!("failed to list {}", usr.join("lib").display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| library(path, "librustc_driver-").is_ok())
        .with_context(|| format!("{} holds no compiler", usr.display()))?;
    let toolchain = Toolchain {
        source: Source::Debian,
        rustc: usr.join("bin/rustc"),
        libraries,
        folder,
    };
    if toolchain
        .rustc()
        .arg("--version")
        .stderr(Stdio::null())
        .output()
        .is_ok_and(|output| output.status.success())
    {
        return Ok(toolchain);
    }
    install_libraries()?;
    toolchain
        .rustc_version()
        .context("the unpacked compiler does not start")?;
    Ok(toolchain)
}

fn install_libraries() -> Result<()> {
    let packages = DEBIAN_LIBRARIES.join(" ");
    let line = format!("apt-get install -y --no-install-recommends {packages}");
    eprintln!("$ {line}");
    let status = Command::new("apt-get")
        .args(["install", "-y", "--no-install-recommends"])
        .args(DEBIAN_LIBRARIES)
        .stdout(Stdio::null())
        .status()
        .with_context(|| format!("failed to start {line}"))?;
    ensure!(
        status.success(),
        "Debian's LLVM lacks libraries; as root: {line}"
    );
    Ok(())
}

/// rustup's nightly with its own `rust-src`.
fn nightly() -> Result<Toolchain> {
    const INSTALL: &str = "rustup toolchain install nightly --profile minimal --component rust-src";
    let find = || -> Result<(PathBuf, PathBuf)> {
        let mut command = Command::new("rustup");
        let rustc = PathBuf::from(output(command.args([
            "which",
            "--toolchain",
            "nightly",
            "rustc",
        ]))?);
        let sysroot = PathBuf::from(output(Command::new(&rustc).args(["--print", "sysroot"]))?);
        ensure!(
            sysroot.join("lib/rustlib/src/rust/library/core").exists(),
            "the nightly has no rust-src: {INSTALL}"
        );
        Ok((rustc, sysroot))
    };
    let (rustc, sysroot) = find().or_else(|_| {
        eprintln!("$ {INSTALL}");
        let mut words = INSTALL.split(' ');
        let status = Command::new(words.next().unwrap_or("rustup"))
            .args(words)
            .status()
            .with_context(|| format!("rustup is not there; it would be: {INSTALL}"))?;
        ensure!(status.success(), "{INSTALL}: {status}");
        find()
    })?;
    let mut toolchain = Toolchain {
        source: Source::Nightly,
        folder: PathBuf::new(),
        libraries: sysroot.join("lib"),
        rustc,
    };
    let version = toolchain
        .rustc_version()?
        .replace(|c: char| !c.is_ascii_alphanumeric(), "-");
    toolchain.folder = cache("ebpf")?.join(version);
    fs::create_dir_all(&toolchain.folder)
        .with_context(|| format!("failed to make {}", toolchain.folder.display()))?;
    Ok(toolchain)
}

/// The file in `folder` whose name starts with `prefix`.
fn library(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("failed to list {}", folder.display()))?;
    for entry in entries {
        let path = entry
            .with_context(|| format!("failed to list {}", folder.display()))?
            .path();
        if path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(prefix))
        {
            return Ok(path);
        }
    }
    bail!("{} holds no {prefix}*", folder.display())
}

fn cargo_home() -> Result<PathBuf> {
    match env::var_os("CARGO_HOME") {
        Some(path) => Ok(path.into()),
        None => Ok(env::home_dir()
            .context("there is no home folder: set HOME or CARGO_HOME")?
            .join(".cargo")),
    }
}
