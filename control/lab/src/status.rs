//! The processes of a lab, what they are for, and their memory.

use std::{fs, path::Path};

use serde::Serialize;
use serde_json::json;

use crate::{
    error::LabError,
    folder::{Lab, Manifest},
    process::{self, Found},
};

/// One process.
#[derive(Debug, Serialize)]
struct Row {
    machine: Option<String>,
    /// The node of the pod that it is in.
    node: Option<String>,
    /// `lead`, `agent`, `netmanager`, `tunnel`, `wan` or `instance`.
    kind: &'static str,
    pid: i32,
    command: String,
    /// Resident memory, KiB (proc(5), VmRSS).
    rss_kib: u64,
    /// Memory of the eBPF maps that the process has open, KiB (fdinfo, memlock).
    map_kib: u64,
}

/// How the processes are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Table,
    Json,
}

/// Prints every process of the lab.
pub(crate) fn show(lab: &Lab, format: Format) -> Result<(), LabError> {
    let mut rows: Vec<Row> = process::of_lab(lab).iter().map(row).collect();
    rows.sort_by(|a, b| (a.kind, &a.machine, a.pid).cmp(&(b.kind, &b.machine, b.pid)));
    if format == Format::Json {
        println!("{}", json!({ "lab": lab.id, "processes": rows }));
        return Ok(());
    }
    println!(
        "{:<11} {:<30} {:>7} {:>9} {:>9}  COMMAND",
        "KIND", "MACHINE", "PID", "RSS KiB", "MAPS KiB"
    );
    for row in rows {
        let machine = row.machine.as_deref().unwrap_or("-");
        println!(
            "{:<11} {machine:<30} {:>7} {:>9} {:>9}  {}",
            row.kind, row.pid, row.rss_kib, row.map_kib, row.command
        );
    }
    Ok(())
}

fn row(found: &Found) -> Row {
    let pid = found.id.pid;
    let command: Vec<_> = found.command.iter().take(4).map(String::as_str).collect();
    Row {
        machine: found.machine.clone(),
        node: found.node.clone(),
        kind: kind(&found.command),
        pid,
        command: command.join(" "),
        rss_kib: rss_kib(pid),
        map_kib: map_kib(pid),
    }
}

/// What a process is for, by its command line.
pub(crate) fn kind(command: &[String]) -> &'static str {
    let binary = command.first().map(|path| {
        Path::new(path)
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
    });
    let words: Vec<_> = command.iter().skip(1).take(2).map(String::as_str).collect();
    match (binary.as_deref(), words.as_slice()) {
        (Some("weft"), ["lead", ..]) => "lead",
        (Some("weft"), ["agent", ..]) => "agent",
        (Some("weft"), ["lab", "wan"]) => "wan",
        (Some("weft-netmanager"), ["run", ..]) => "netmanager",
        (Some("weft-netmanager"), ["tunnel", ..]) => "tunnel",
        _ => "instance",
    }
}

fn rss_kib(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    field(&status, "VmRSS:").unwrap_or(0)
}

/// Each map once, however many descriptors show it.
fn map_kib(pid: i32) -> u64 {
    let mut maps = std::collections::BTreeMap::new();
    let descriptors = fs::read_dir(format!("/proc/{pid}/fdinfo"));
    for entry in descriptors.into_iter().flatten().flatten() {
        let info = fs::read_to_string(entry.path()).unwrap_or_default();
        if let (Some(map), Some(bytes)) = (field(&info, "map_id:"), field(&info, "memlock:")) {
            maps.insert(map, bytes);
        }
    }
    maps.values().sum::<u64>() / 1024
}

fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// The last lines of the logs of programs that do not run, or of all where all run.
pub(crate) fn last_words(lab: &Lab, manifest: &Manifest) -> String {
    let running = process::of_lab(lab);
    let mut dead = Vec::new();
    let mut all = Vec::new();
    for program in &manifest.programs {
        let path = lab.path(format!("log/{}.log", program.machine));
        let text = fs::read_to_string(path).unwrap_or_default();
        let lines: Vec<_> = text.lines().rev().take(3).collect();
        let words = lines
            .iter()
            .rev()
            .map(|line| format!("  {}: {line}", program.machine));
        if running.iter().any(|found| found.runs(&program.command)) {
            all.extend(words);
        } else {
            dead.extend(words);
        }
    }
    if dead.is_empty() { all } else { dead }.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_command_line() {
        for (line, want) in [
            ("/t/weft lead --name a", "lead"),
            ("/t/weft agent --config x", "agent"),
            ("weft-netmanager run --node n", "netmanager"),
            ("/t/weft-netmanager tunnel --name wl0", "tunnel"),
            ("/t/weft lab wan --lab abcd", "wan"),
            ("bookinfo load", "instance"),
            ("", "instance"),
        ] {
            let command: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
            assert_eq!(kind(&command), want, "{line}");
        }
    }

    #[test]
    fn a_field_is_the_first_number_of_its_line() {
        let text = "VmPeak:\t  10 kB\nVmRSS:\t    8192 kB\nmap_id:\t7\n";
        assert_eq!(field(text, "VmRSS:"), Some(8192));
        assert_eq!(field(text, "map_id:"), Some(7));
        assert_eq!(field(text, "memlock:"), None);
    }
}
