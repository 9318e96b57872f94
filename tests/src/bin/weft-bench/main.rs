//! `weft-bench`: measures Weft's data path beside its peers in one run; started by `cargo xtask bench`.
#![forbid(unsafe_code)]

mod case;
mod figures;
mod load;
mod mesh;
mod rounds;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match rounds::Bench::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
