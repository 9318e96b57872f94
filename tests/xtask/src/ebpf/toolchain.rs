//! A compiler with a BPF `core`, and a linker built against its LLVM.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};

use super::output;

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
    let folder = cache()?.join(format!("debian-{}", DEBIAN_PACKAGES[1]));
    let usr = folder.join("usr");
    if !usr.join("bin/rustc").exists() {
        unpack_debian(&folder)?;
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

/// Downloads the packages and unpacks them beside `folder`, then moves them there in one step.
fn unpack_debian(folder: &Path) -> Result<()> {
    let parent = folder.parent().context("the cache has no parent folder")?;
    let work = parent.join(format!("unpacking-{}", std::process::id()));
    fs::create_dir_all(&work).with_context(|| format!("failed to make {}", work.display()))?;
    let line = format!("apt-get download {}", DEBIAN_PACKAGES.join(" "));
    eprintln!("$ {line}");
    let downloaded = Command::new("apt-get")
        .arg("download")
        .args(DEBIAN_PACKAGES)
        .current_dir(&work)
        .stdout(Stdio::null())
        .status()
        .context("failed to start apt-get");
    let result = downloaded.and_then(|status| {
        ensure!(status.success(), "{line}: {status} (apt-get update first?)");
        unpack_all(&work)?;
        match fs::rename(&work, folder) {
            Err(error) if !folder.join("usr/bin/rustc").exists() => Err(error)
                .with_context(|| format!("failed to move the compiler to {}", folder.display())),
            _ => Ok(()),
        }
    });
    // After the rename there is nothing left of it.
    let _ = fs::remove_dir_all(&work);
    result
}

fn unpack_all(work: &Path) -> Result<()> {
    for entry in fs::read_dir(work).with_context(|| format!("failed to list {}", work.display()))? {
        let package = entry.context("failed to list the downloads")?.path();
        if package
            .extension()
            .is_some_and(|extension| extension == "deb")
        {
            output(Command::new("dpkg").arg("-x").arg(&package).arg(work))?;
            fs::remove_file(&package)
                .with_context(|| format!("failed to remove {}", package.display()))?;
        }
    }
    Ok(())
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
    toolchain.folder = cache()?.join(version);
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

fn cache() -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME") {
        Some(base) => PathBuf::from(base),
        None => home()?.join(".cache"),
    };
    let folder = base.join("weft/ebpf");
    fs::create_dir_all(&folder).with_context(|| format!("failed to make {}", folder.display()))?;
    Ok(folder)
}

fn cargo_home() -> Result<PathBuf> {
    match env::var_os("CARGO_HOME") {
        Some(path) => Ok(path.into()),
        None => Ok(home()?.join(".cargo")),
    }
}

fn home() -> Result<PathBuf> {
    env::home_dir().context("there is no home folder: set HOME or XDG_CACHE_HOME")
}
