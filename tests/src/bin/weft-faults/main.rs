//! `weft-faults`: real leads under faults; started by `cargo xtask faults`.
#![forbid(unsafe_code)]

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::Parser;
use weft_tests::faults::Faults;

#[derive(Debug, Parser)]
struct Options {
    /// The folder with weft.
    #[arg(long, value_name = "DIR")]
    binaries: PathBuf,
    /// Where the leads keep their data.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// What decides which faults there are.
    #[arg(long)]
    seed: u64,
    /// How long there are faults, seconds.
    #[arg(long)]
    seconds: u64,
    /// The round-trip time between the leads, milliseconds.
    #[arg(long, default_value_t = 0)]
    rtt: u64,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let faults = Faults {
        binaries: options.binaries,
        data: options.data,
        seed: options.seed,
        time: Duration::from_secs(options.seconds),
        rtt: Duration::from_millis(options.rtt),
    };
    match faults.run() {
        Ok(summary) => {
            println!("{summary}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
