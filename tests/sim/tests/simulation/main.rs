//! Leads and agents in a world that a seed decides: the same seed, the same run.
//!
//! ```text
//!  seed --> faults: cuts, weather, crashes, failed syncs, sleeps, jumps of the time of day, drifting clocks
//!             |
//!  clients ---+--> network --> lead 0, 1, 2: the product's routes, Raft, log, state machine
//!             |       |           '--> redb on a simulated disk
//!             |       '------> agents: the product's stream, engine, store --> simulated processes and nodes --> I7
//!             '--> history --> linearizable?     states --> I1, I2     acknowledged --> still there (I6)
//! ```
//!
//! Nothing here waits for real time and nothing runs beside anything else: a run is one thread, whose clock goes on
//! where everybody waits. It is a process of its own too, because tokio and others count in statics.
//! `cargo xtask sim --seed N` runs one again and prints what happened.

mod agent;
mod clients;
mod disk;
mod entropy;
mod faults;
mod host;
mod judge;
mod line;
mod network;
mod plant;
mod run;
mod shelf;
mod time;
mod trace;
mod watch;

use std::{
    ops::Range,
    panic,
    process::Command,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use weft_history::random;

use crate::{
    run::{Profile, Report, run},
    trace::Trace,
};

/// How many seeds run whenever the tests do.
const SEEDS: u64 = 200;
/// How long a run may take in real time.
const STUCK: Duration = Duration::from_secs(300);

/// The seed that a process is to run.
const SEED: &str = "WEFT_SIM_SEED";
/// Set where the trace is not to be printed.
const QUIET: &str = "WEFT_SIM_QUIET";
/// Set where it is enough to know one seed that breaks something.
const FIRST: &str = "WEFT_SIM_FIRST";
/// What the runs are about; each seed has its own where it is not said.
const PROFILE: &str = "WEFT_SIM_PROFILE";

/// What panicked, wherever: tokio keeps a task's panic to itself.
static PANIC: Mutex<Option<String>> = Mutex::new(None);

fn lock(panic: &Mutex<Option<String>>) -> MutexGuard<'_, Option<String>> {
    panic.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a seed is about.
fn profile_of(seed: u64) -> Profile {
    match std::env::var(PROFILE) {
        Ok(profile) => profile
            .parse()
            .unwrap_or_else(|why: String| panic!("{why}")),
        Err(_) => Profile::of(seed),
    }
}

/// Runs a seed in this process.
fn play(seed: u64, trace: Trace) -> Report {
    let (sender, report) = mpsc::channel();
    panic::set_hook(Box::new(|panic| {
        *lock(&PANIC) = Some(panic.to_string());
    }));
    let play = move || {
        entropy::seed(seed);
        // Who started this may have given up.
        let _ = sender.send(run(seed, profile_of(seed), trace));
    };
    thread::Builder::new()
        .spawn(play)
        .expect("a thread can be made");
    let broken = match report.recv_timeout(STUCK) {
        Ok(report) if lock(&PANIC).is_none() => return report,
        Err(RecvTimeoutError::Timeout) => "a task never waits: time stands still".to_owned(),
        _ => lock(&PANIC).take().unwrap_or_default().replace('\n', " "),
    };
    Report {
        broken: Some(broken),
        ..Report::default()
    }
}

/// Runs a seed in a process of its own.
fn play_apart(seed: u64) -> Report {
    let program = std::env::current_exe().expect("a test program has a path");
    let output = Command::new(program)
        .args(["--exact", "the_given_seeds_keep_the_invariants"])
        .args(["--ignored", "--nocapture"])
        .env(SEED, seed.to_string())
        .env(QUIET, "1")
        .output()
        .expect("a test program can be started");
    let output = String::from_utf8_lossy(&output.stdout);
    let report = output.lines().find_map(Report::parse);
    report.unwrap_or_else(|| Report {
        broken: Some(format!("no report: {output}")),
        ..Report::default()
    })
}

/// Runs the seeds of a range on all cores, and panics with those that break something.
fn play_all(seeds: Range<u64>) {
    let began = Instant::now();
    let next = AtomicU64::new(seeds.start);
    let cores = thread::available_parallelism().map_or(1, |cores| cores.get());
    let work = || {
        let mut reports = Vec::new();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return reports;
            }
            let report = play_apart(seed);
            if let Some(what) = &report.broken {
                println!("seed {seed}: {what}");
                if std::env::var_os(FIRST).is_some() {
                    next.store(seeds.end, Ordering::Relaxed);
                }
            }
            reports.push((seed, report));
        }
    };
    let mut reports: Vec<_> = thread::scope(|scope| {
        let workers: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        let reports = workers.into_iter().map(|worker| worker.join());
        reports
            .flat_map(|reports| reports.expect("a worker only reports"))
            .collect()
    });
    reports.sort_by_key(|(seed, _)| *seed);
    let answered: u64 = reports.iter().map(|(_, report)| report.answered).sum();
    let unanswered: u64 = reports.iter().map(|(_, report)| report.unanswered).sum();
    let returns: u64 = reports.iter().map(|(_, report)| report.returns).sum();
    println!(
        "{} seeds in {:?}: {answered} operations answered, {unanswered} not, {returns} clusters lost and returned",
        reports.len(),
        began.elapsed()
    );
    let broken: Vec<_> = reports
        .into_iter()
        .filter(|(_, report)| report.broken.is_some())
        .map(|(seed, _)| seed)
        .collect();
    assert!(
        broken.is_empty(),
        "seeds {broken:?}: cargo xtask sim --seed N prints a run"
    );
}

#[test]
fn the_invariants_hold_whatever_a_seed_does() {
    play_all(0..SEEDS);
}

#[test]
fn a_seed_runs_twice_alike_and_another_differently() {
    let first: Vec<_> = (0..6).map(play_apart).collect();
    let again: Vec<_> = (0..6).map(play_apart).collect();
    assert_eq!(first, again);
    assert_ne!(first[0].hash, first[1].hash);
}

/// Prints what leads and agents log, as far as `RUST_LOG` says, between the lines of the trace.
fn print_logs() {
    let wanted = tracing_subscriber::EnvFilter::from_default_env();
    let printer = tracing_subscriber::fmt()
        .with_env_filter(wanted)
        .with_ansi(false)
        .without_time();
    printer.with_writer(std::io::stdout).init();
}

/// Reads a number from the environment.
fn given(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    let number = value.parse();
    Some(number.unwrap_or_else(|_| panic!("{name}={value} is no number")))
}

#[test]
#[ignore = "runs the seeds that it is given: cargo xtask sim"]
fn the_given_seeds_keep_the_invariants() {
    if let Some(seed) = given(SEED) {
        let quiet = given(QUIET).is_some();
        let trace = if quiet {
            Trace::default()
        } else {
            print_logs();
            Trace::printed()
        };
        let report = play(seed, trace);
        println!("\n{report}");
        assert!(
            quiet || report.broken.is_none(),
            "seed {seed} breaks something"
        );
        return;
    }
    let from = given("WEFT_SIM_FROM").unwrap_or(0);
    play_all(from..from + given("WEFT_SIM_SEEDS").unwrap_or(SEEDS));
}
