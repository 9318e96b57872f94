//! `weft-cni`: parses nothing, decides nothing; hands the environment and stdin to the library.
#![forbid(unsafe_code)]

use std::{
    io::{Read, Write},
    process::ExitCode,
};

fn main() -> ExitCode {
    let mut stdin = Vec::new();
    let answer = match std::io::stdin().lock().read_to_end(&mut stdin) {
        Ok(_) => weft_cni::run(&std::env::vars_os().collect(), &stdin),
        Err(source) => weft_cni::unread(source),
    };
    for line in &answer.log {
        eprintln!("weft-cni: {line}");
    }
    match std::io::stdout().lock().write_all(answer.stdout.as_bytes()) {
        Ok(()) => ExitCode::from(answer.exit),
        Err(error) => {
            eprintln!("weft-cni: failed to write the answer: {error}");
            ExitCode::FAILURE
        }
    }
}
