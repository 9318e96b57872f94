//! The `weft` binary.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = weft::Cli::parse();
    weft::start_tracing(&cli);
    match weft::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            weft::exit_code(&error)
        }
    }
}
