//! `cargo xtask`: every command of the project.
#![forbid(unsafe_code)]

mod bench;
mod build;
mod check;
mod command;
mod debian;
mod demo;
mod ebpf;
mod faults;
mod fuzz;
mod host;
mod sim;
mod vm;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match command::Xtask::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
