//! Processes: started inside a pod, looked at, ended.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
};

use control_core::assignment::Run;
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};

use super::pod::{Kept, Pod, Process, on_a_thread, own_mounts};

/// A log file is put aside when it is longer, bytes; two of them are kept.
const LOG_MAX: u64 = 4 << 20;

/// Why a process did not start.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NotStarted {
    /// It never will; why.
    Never(String),
    /// It may another time; why.
    NotNow(String),
}

/// Starts the instance's command in its network namespace, with mounts of its own.
pub(super) fn start(pods: &Path, pod: &Pod, kept: &Kept) -> Result<(Child, Process), NotStarted> {
    let (program, arguments) = program(&kept.run).map_err(NotStarted::Never)?;
    let not_now = |what: &str| {
        let what = what.to_owned();
        move |error: io::Error| NotStarted::NotNow(format!("failed to {what}: {error}"))
    };
    let log = File::options()
        .create(true)
        .append(true)
        .open(pod.log())
        .map_err(not_now("open its log"))?;
    let errors = log.try_clone().map_err(not_now("open its log"))?;
    pod.write_hosts(kept)
        .map_err(not_now("write its hosts file"))?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(environment(kept))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        .process_group(0);
    let spawned = on_a_thread(|| {
        pod.enter()?;
        own_mounts(pods, pod)?;
        Ok(command.spawn())
    });
    let child = spawned
        .map_err(not_now("prepare its namespaces"))?
        .map_err(|error| refused(program, &error))?;
    let pid = i32::try_from(child.id()).expect("the kernel's pids are below 2^22");
    // A process that has ended already is a zombie until it is waited for, so its stat is there.
    let start = stat(pid).map_or(0, |stat| stat.start);
    Ok((child, Process { pid, start }))
}

/// The program of an instance and its arguments; why there is none.
pub(super) fn program(run: &Run) -> Result<(&String, &[String]), String> {
    run.command.split_first().ok_or_else(|| match &run.image {
        Some(image) => format!(
            "image {image:?} needs a cluster that runs containers: give the service a command to run it here"
        ),
        None => "it has no command".to_owned(),
    })
}

fn refused(program: &str, error: &io::Error) -> NotStarted {
    use io::ErrorKind::{InvalidInput, NotFound, PermissionDenied};
    let why = format!("failed to run {program:?}: {error}");
    let never = matches!(error.kind(), NotFound | PermissionDenied | InvalidInput)
        || error.raw_os_error() == Some(Errno::ENOEXEC as i32);
    if never {
        NotStarted::Never(why)
    } else {
        NotStarted::NotNow(why)
    }
}

/// The whole environment: the instance's, where it runs, and the agent's PATH unless it has its own.
fn environment(kept: &Kept) -> BTreeMap<String, String> {
    let mut env = kept.run.env.clone();
    env.insert("WEFT_NODE".to_owned(), kept.node.clone());
    if let Ok(path) = std::env::var("PATH") {
        env.entry("PATH".to_owned()).or_insert(path);
    }
    env
}

/// How a process ended, for people.
pub(super) fn ending(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("its process exited with {code}"),
        (None, Some(signal)) => match Signal::try_from(signal) {
            Ok(signal) => format!("its process was ended by {signal}"),
            Err(_) => format!("its process was ended by signal {signal}"),
        },
        (None, None) => "its process ended".to_owned(),
    }
}

/// Whether it runs; a zombie does not.
pub(super) fn is_alive(process: Process) -> bool {
    stat(process.pid).is_some_and(|stat| stat.start == process.start && stat.runs)
}

/// Sends a signal to the process and its group; nobody else is hit when it is gone.
pub(super) fn signal(process: Process, signal: Signal) {
    if is_alive(process) {
        // It may end between the look and the signal; its group has its number as long as anybody is in it.
        let _ = killpg(Pid::from_raw(process.pid), signal);
    }
}

/// Ends every process of `pids` at once; says whether there was one.
pub(super) fn kill_all(pids: &[i32]) -> bool {
    for pid in pids {
        let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
    }
    !pids.is_empty()
}

/// Puts the log aside when it is long. The process goes on writing at the (new) end, because it appends.
pub(super) fn rotate(log: &Path) -> io::Result<()> {
    if fs::metadata(log)?.len() > LOG_MAX {
        fs::copy(log, log.with_extension("1"))?;
        OpenOptions::new().write(true).open(log)?.set_len(0)?;
    }
    Ok(())
}

#[derive(Debug, PartialEq, Eq)]
struct Stat {
    runs: bool,
    start: u64,
}

fn stat(pid: i32) -> Option<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Fields 3 (state) and 22 (start) of proc_pid_stat(5); the name before them may hold anything.
fn parse_stat(text: &str) -> Option<Stat> {
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    Some(Stat {
        runs: !matches!(state, "Z" | "X" | "x"),
        start: fields.nth(18)?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processs_start_is_read_behind_any_name() {
        let rest = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        let stat = Stat {
            runs: true,
            start: 4711,
        };
        assert_eq!(parse_stat(&format!("77 (a ) b (c) {rest}")), Some(stat));
        let zombie = rest.replacen('S', "Z", 1);
        assert!(!parse_stat(&format!("77 (x) {zombie}")).unwrap().runs);
        assert_eq!(parse_stat("77 (x) S 1 2"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn this_process_is_alive_and_one_with_another_start_is_not() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let start = stat(pid).unwrap().start;
        assert!(is_alive(Process { pid, start }));
        let start = start + 1;
        assert!(!is_alive(Process { pid, start }));
    }

    #[test]
    fn a_long_log_is_put_aside_and_a_short_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        fs::write(&log, "short").unwrap();
        rotate(&log).unwrap();
        assert_eq!(fs::read(&log).unwrap(), b"short");
        let long = usize::try_from(LOG_MAX).unwrap() + 1;
        fs::write(&log, vec![b'x'; long]).unwrap();
        rotate(&log).unwrap();
        assert_eq!(fs::metadata(&log).unwrap().len(), 0);
        assert_eq!(
            fs::metadata(dir.path().join("log.1")).unwrap().len(),
            LOG_MAX + 1
        );
    }
}
