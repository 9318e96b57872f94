//! Network namespaces of one test each, removed on drop.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use serde_json::Value;

pub(crate) struct Netns {
    name: String,
    path: PathBuf,
}

impl Netns {
    pub(crate) fn new(role: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("weft-cni-{role}-{}-{number}", std::process::id());
        ok(Command::new("ip").args(["netns", "add", &name]));
        let path = Path::new("/run/netns").join(&name);
        Self { name, path }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `ip ARGS` inside.
    pub(crate) fn ip(&self, args: &str) -> String {
        ok(Command::new("ip")
            .args(["-n", &self.name])
            .args(args.split(' ')))
    }

    /// The list that `ip -j ARGS` prints inside.
    pub(crate) fn ip_json(&self, args: &str) -> Vec<Value> {
        let out = self.ip(&format!("-d -j {args}"));
        if out.trim().is_empty() {
            return Vec::new();
        }
        serde_json::from_str(&out).unwrap()
    }

    /// Runs a program inside.
    pub(crate) fn exec(&self, args: &[&str]) -> String {
        ok(Command::new("nsenter")
            .arg(format!("--net={}", self.path.display()))
            .args(args))
    }

    pub(crate) fn link_names(&self) -> Vec<String> {
        self.ip_json("link show")
            .iter()
            .map(|link| link["ifname"].as_str().unwrap().to_owned())
            .collect()
    }

    pub(crate) fn delete(&self) {
        ok(Command::new("ip").args(["netns", "del", &self.name]));
    }

    /// Everything that an attachment could leave behind: links, addresses, routes, neighbours.
    pub(crate) fn snapshot(&self) -> String {
        [
            "-br link show",
            "-br addr show",
            "-4 route show table all",
            "-6 route show table all",
            "neigh show nud permanent",
        ]
        .map(|what| self.ip(what))
        .join("--\n")
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .output();
    }
}

fn ok(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}
