//! `weft-bench`: measures Weft beside its peers in one run; started by `cargo xtask bench`.
#![forbid(unsafe_code)]

mod agents;
mod awake;
mod bench;
mod case;
mod control;
mod figures;
mod gate;
mod load;
mod mesh;
mod report;
mod rounds;
mod statistics;
mod table;
mod tunnel;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match bench::Bench::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
