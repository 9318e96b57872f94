//! The `weft` binary.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;

/// A lead makes and drops many small values for each change, on several threads: measured beside glibc's, that takes 4 to 8 %
/// of its processor time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = weft::Cli::parse();
    weft::start_tracing(&cli);
    match weft::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
