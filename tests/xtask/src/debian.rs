//! Debian packages that are downloaded by apt and unpacked into the cache; nothing is installed.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

/// Whose keys sign Debian's archive.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The folder `name` of the cache, `$XDG_CACHE_HOME/weft` (`~/.cache/weft`), outside the checkout.
pub(crate) fn cache(name: &str) -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME") {
        Some(base) => PathBuf::from(base),
        None => env::home_dir()
            .context("there is no home folder: set HOME or XDG_CACHE_HOME")?
            .join(".cache"),
    };
    let folder = base.join("weft").join(name);
    fs::create_dir_all(&folder).with_context(|| format!("failed to make {}", folder.display()))?;
    Ok(folder)
}

/// What a command prints, trimmed.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("failed to start {name}"))?;
    ensure!(output.status.success(), "{name}: {}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// apt, and the sources that it asks.
#[derive(Debug)]
pub(crate) struct Apt {
    options: Vec<String>,
}

impl Apt {
    /// The machine's own sources.
    pub(crate) const fn own() -> Self {
        Self {
            options: Vec::new(),
        }
    }

    /// One suite of Debian's archive alone, whatever the machine's sources are; its lists are kept in `folder`.
    ///
    /// # Errors
    ///
    /// No keys of Debian's, or an archive that does not answer.
    pub(crate) fn suite(name: &str, folder: &Path) -> Result<Self> {
        ensure!(
            Path::new(KEYRING).exists(),
            "{KEYRING} is missing: apt-get install -y --no-install-recommends debian-archive-keyring"
        );
        for part in ["lists/partial", "cache/archives/partial"] {
            let path = folder.join(part);
            fs::create_dir_all(&path)
                .with_context(|| format!("failed to make {}", path.display()))?;
        }
        let sources = folder.join("sources.list");
        fs::write(
            &sources,
            format!("deb [signed-by={KEYRING}] http://deb.debian.org/debian {name} main\n"),
        )
        .with_context(|| format!("failed to write {}", sources.display()))?;
        let option = |name: &str, path: &Path| format!("-o{name}={}", path.display());
        let apt = Self {
            options: vec![
                option("Dir::Etc::sourcelist", &sources),
                option("Dir::Etc::sourceparts", Path::new("/dev/null")),
                option("Dir::State::lists", &folder.join("lists")),
                option("Dir::State::status", Path::new("/dev/null")),
                option("Dir::Cache", &folder.join("cache")),
                "-oAPT::Sandbox::User=root".to_owned(),
            ],
        };
        eprintln!("$ apt-get update (of Debian's {name} alone)");
        output(apt.command("apt-get").args(["-qq", "update"]))?;
        Ok(apt)
    }

    /// The first package that a metapackage depends on.
    pub(crate) fn first_dependency(&self, metapackage: &str) -> Result<String> {
        let text = output(self.command("apt-cache").args(["show", metapackage]))?;
        first_dependency(&text).with_context(|| format!("{metapackage} depends on nothing"))
    }

    /// Downloads packages and unpacks them beside `folder`, then moves them there in one step; `proof` is a path
    /// in it by which another process that was faster is known.
    pub(crate) fn unpack(&self, packages: &[&str], folder: &Path, proof: &str) -> Result<()> {
        let parent = folder.parent().context("the cache has no parent folder")?;
        let work = parent.join(format!("unpacking-{}", std::process::id()));
        fs::create_dir_all(&work).with_context(|| format!("failed to make {}", work.display()))?;
        let line = format!("apt-get download {}", packages.join(" "));
        eprintln!("$ {line}");
        let downloaded = self
            .command("apt-get")
            .arg("download")
            .args(packages)
            .current_dir(&work)
            .stdout(Stdio::null())
            .status()
            .context("failed to start apt-get");
        let result = downloaded.and_then(|status| {
            ensure!(status.success(), "{line}: {status} (apt-get update first?)");
            unpack_all(&work)?;
            match fs::rename(&work, folder) {
                Err(error) if !folder.join(proof).exists() => Err(error)
                    .with_context(|| format!("failed to move {line} to {}", folder.display())),
                _ => Ok(()),
            }
        });
        // After the rename there is nothing left of it.
        let _ = fs::remove_dir_all(&work);
        result
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options);
        command
    }
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

/// The name after the first `Depends:` of what `apt-cache show` prints.
fn first_dependency(shown: &str) -> Option<String> {
    let depends = shown
        .lines()
        .find_map(|line| line.strip_prefix("Depends: "))?;
    let name = depends.split([' ', ',', '|']).next()?;
    Some(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metapackage_names_what_it_stands_for() {
        let shown = "Package: linux-image-amd64\nVersion: 6.1.176-1\nDepends: linux-image-6.1.0-50-amd64 (= 6.1.176-1), other\n";
        assert_eq!(
            first_dependency(shown).as_deref(),
            Some("linux-image-6.1.0-50-amd64")
        );
        assert_eq!(first_dependency("Package: alone\n"), None);
    }
}
