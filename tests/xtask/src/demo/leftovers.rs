//! What a machine has, before and after: the demo must leave none of it behind.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

/// The kernel takes namespaces and links apart behind our back; so long it may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The product's programs.
const PROGRAMS: [&str; 4] = ["weft", "weft-netmanager", "weft-cni", "bookinfo"];

/// Namespaces, links, routes, mounts, pins, cgroups and processes of a machine, one line each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Machine(BTreeSet<String>);

impl Machine {
    /// Looks.
    pub(crate) fn look() -> Self {
        let mut lines = BTreeSet::new();
        let mut add = |kind: &str, names: Vec<String>| {
            lines.extend(names.into_iter().map(|name| format!("{kind} {name}")));
        };
        add("namespace", children(Path::new("/run/netns")));
        add("link", children(Path::new("/sys/class/net")));
        add("route", said("ip", &["route", "show", "table", "all"]));
        add(
            "route",
            said("ip", &["-6", "route", "show", "table", "all"]),
        );
        add("rule", said("ip", &["rule", "show"]));
        add("mount", mounts());
        add("pin", below(Path::new("/sys/fs/bpf"), 4));
        add("cgroup", below(Path::new("/sys/fs/cgroup"), 4));
        add("lab", children(Path::new("/run/weft-lab")));
        add("socket", children(Path::new("/var/run/wireguard")));
        add("process", processes());
        Self(lines)
    }

    /// That the machine is as it was, but for what other labs and other users do meanwhile; `own` is the lab
    /// that was taken down.
    pub(crate) fn compare(&self, own: &str) -> Result<String, String> {
        let start = Instant::now();
        loop {
            let now = Self::look();
            let new = self.new_in(&now, own);
            if new.is_empty() {
                return Ok(format!("{} things looked at", now.0.len()));
            }
            if start.elapsed() > PATIENCE {
                return Err(format!("left behind: {}", new.join(", ")));
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// What is new and not another lab's.
    fn new_in(&self, now: &Self, own: &str) -> Vec<String> {
        let others: Vec<&str> = now
            .0
            .iter()
            .filter_map(|line| line.strip_prefix("lab "))
            .filter(|lab| *lab != own)
            .collect();
        let foreign = |line: &str| others.iter().any(|lab| line.contains(lab));
        let new = now.0.difference(&self.0).filter(|line| !foreign(line));
        new.cloned().collect()
    }
}

fn children(dir: &Path) -> Vec<String> {
    paths(dir).iter().map(|path| name(path)).collect()
}

fn paths(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

fn name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// The folders below `dir`, and in a bpffs the pins too.
fn below(dir: &Path, depth: u32) -> Vec<String> {
    let mut found = Vec::new();
    for path in paths(dir) {
        if path.is_symlink() || !(path.is_dir() || dir.starts_with("/sys/fs/bpf")) {
            continue;
        }
        if path.is_dir() && depth > 1 {
            found.extend(below(&path, depth - 1));
        }
        found.push(path.display().to_string());
    }
    found
}

fn mounts() -> Vec<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let point = |line: &str| line.split_whitespace().nth(4).map(str::to_owned);
    text.lines().filter_map(point).collect()
}

fn said(program: &str, args: &[&str]) -> Vec<String> {
    let output = Command::new(program).args(args).output();
    let text = output.map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&text)
        .lines()
        .map(|line| line.trim().to_owned())
        .collect()
}

/// The product's processes, each with the lab that it belongs to.
fn processes() -> Vec<String> {
    let ours = |path: &PathBuf| {
        let command = fs::read(path.join("cmdline")).ok()?;
        let first = command.split(|byte| *byte == 0).next()?;
        let program = name(Path::new(&*String::from_utf8_lossy(first)));
        PROGRAMS.contains(&program.as_str()).then_some(())?;
        let environment = fs::read(path.join("environ")).unwrap_or_default();
        let marks = environment.split(|byte| *byte == 0);
        let mark = marks
            .map(String::from_utf8_lossy)
            .find(|word| word.starts_with("WEFT_LAB="));
        Some(format!(
            "{program} {} {}",
            name(path),
            mark.unwrap_or_default()
        ))
    };
    paths(Path::new("/proc")).iter().filter_map(ours).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(lines: &[&str]) -> Machine {
        Machine(lines.iter().map(|line| (*line).to_owned()).collect())
    }

    #[test]
    fn what_is_new_is_left_behind_unless_another_lab_has_it() {
        let before = machine(&["link lo", "namespace old"]);
        let now = machine(&[
            "link lo",
            "lab bbbb",
            "namespace weft-aaaa-edge-1",
            "namespace weft-bbbb-edge-1",
            "process weft 7 WEFT_LAB=bbbb",
        ]);
        assert_eq!(before.new_in(&now, "aaaa"), ["namespace weft-aaaa-edge-1"]);
    }

    #[test]
    fn an_own_lab_that_is_still_there_is_left_behind() {
        let now = machine(&["lab aaaa", "namespace weft-aaaa-edge-1"]);
        assert_eq!(machine(&[]).new_in(&now, "aaaa").len(), 2);
    }
}
