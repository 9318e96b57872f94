//! The sample application: one binary, role by subcommand.
#![forbid(unsafe_code)]

mod answer;
mod client;
mod fetch;
mod load;
mod load_record;
mod role;
mod service;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match role::Bookinfo::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
