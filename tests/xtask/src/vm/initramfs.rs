//! What a guest starts with: a shell, the modules that mount the host's root, and the scripts.
//!
//! The archive is cpio's "newc" (kernel: Documentation/driver-api/early-userspace/buffer-format.rst): a header of
//! fourteen numbers of eight hexadecimal digits, the name, the bytes, each part filled up to four bytes.

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use anyhow::{Context, Result, ensure};

use super::kernel::{Kernel, busybox};

/// What mounts the host's root and makes it writable for the guest alone; the rest the kernel asks for by itself,
/// once `modprobe` is there.
const NEEDED: [&str; 4] = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;

/// The archive for a kernel; `run` is what the guest does once it has the host's root.
pub(crate) fn build(kernel: &Kernel, run: &str) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for name in ["bin", "modules", "proc", "dev", "host", "rw", "root"] {
        archive.entry(name, FOLDER, &[]);
    }
    let busybox = busybox()?;
    archive.entry("bin/busybox", PROGRAM, &read(&busybox)?);
    archive.entry("init", PROGRAM, include_bytes!("init.sh"));
    archive.entry("run.sh", PROGRAM, run.as_bytes());
    let folder = kernel.modules();
    let dependencies = text(&folder.join("modules.dep"))?;
    let built_in = text(&folder.join("modules.builtin"))?;
    for (number, path) in (10..).zip(in_order(&dependencies, &built_in)?) {
        let (_, name) = path.rsplit_once('/').unwrap_or(("", path));
        let name = format!("modules/{number}-{}", name.trim_end_matches(".xz"));
        archive.entry(&name, PROGRAM, &module(&folder.join(path))?);
    }
    Ok(archive.finish())
}

fn text(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("failed to read {}", path.display()))
}

/// A module as the kernel takes it.
fn module(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_none_or(|extension| extension != "xz") {
        return read(path);
    }
    let output = Command::new("xz")
        .arg("-dc")
        .arg(path)
        .output()
        .context("failed to start xz")?;
    ensure!(output.status.success(), "xz -dc {}", path.display());
    Ok(output.stdout)
}

/// The paths of the needed modules and of what they need, each after what it needs.
fn in_order<'a>(dependencies: &'a str, built_in: &str) -> Result<Vec<&'a str>> {
    let named = |path: &str, name: &str| {
        let file = path.rsplit('/').next().unwrap_or(path);
        file.strip_prefix(name)
            .is_some_and(|rest| rest.starts_with(".ko"))
    };
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    for name in NEEDED {
        let line = dependencies.lines().find_map(|line| {
            let (path, needs) = line.split_once(':')?;
            named(path, name).then_some((path, needs))
        });
        let Some((path, needs)) = line else {
            ensure!(
                built_in.lines().any(|path| named(path, name)),
                "the kernel has no {name}"
            );
            continue;
        };
        // What a module needs stands in the order in which it is unloaded (modules.dep(5)).
        for path in needs.split_whitespace().rev().chain([path]) {
            if seen.insert(path) {
                order.push(path);
            }
        }
    }
    Ok(order)
}

/// A cpio archive.
#[derive(Debug, Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: usize,
}

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let links = 1;
        let fields = [
            self.entries,
            mode as usize,
            0,
            0,
            links,
            0,
            content.len(),
            0,
            0,
            0,
            0,
            name.len() + 1,
            0,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").into_bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_comes_after_what_it_needs() {
        let dependencies = "kernel/fs/9p/9p.ko.xz: kernel/net/9p/9pnet.ko.xz kernel/fs/netfs/netfs.ko.xz\n\
            kernel/net/9p/9pnet_virtio.ko.xz: kernel/net/9p/9pnet.ko.xz kernel/fs/netfs/netfs.ko.xz\n\
            kernel/fs/overlayfs/overlay.ko.xz:\n\
            kernel/fs/other/other.ko.xz:\n";
        let built_in = "kernel/drivers/virtio/virtio_pci.ko\n";
        assert_eq!(
            in_order(dependencies, built_in).unwrap(),
            [
                "kernel/fs/netfs/netfs.ko.xz",
                "kernel/net/9p/9pnet.ko.xz",
                "kernel/net/9p/9pnet_virtio.ko.xz",
                "kernel/fs/9p/9p.ko.xz",
                "kernel/fs/overlayfs/overlay.ko.xz",
            ]
        );
        let error = in_order(dependencies, "").unwrap_err().to_string();
        assert_eq!(error, "the kernel has no virtio_pci");
    }

    #[test]
    fn every_part_of_an_archive_starts_at_a_multiple_of_four() {
        let mut archive = Archive::default();
        archive.entry("a", PROGRAM, b"12345");
        let bytes = archive.finish();
        assert_eq!(&bytes[..14], b"07070100000001");
        // 110 bytes of header and a name of two make 112.
        assert_eq!(&bytes[112..120], b"12345\0\0\0");
        assert_eq!(&bytes[120..126], b"070701");
        assert_eq!(bytes.len() % 4, 0);
    }
}
