//! Running iproute2.

use std::{
    io::{ErrorKind, Write},
    process::{Command, Stdio},
};

use crate::error::LabError;

/// Runs `ip` with these arguments to its successful end.
pub(crate) fn ip(args: &[&str]) -> Result<(), LabError> {
    batch(args, "")
}

/// Runs the lines of `batch` by one `ip` inside the namespace `netns`.
pub(crate) fn inside(netns: &str, lines: &[String]) -> Result<(), LabError> {
    batch(&["-n", netns, "-batch", "-"], &lines.join("\n"))
}

fn batch(args: &[&str], input: &str) -> Result<(), LabError> {
    let start = |source: std::io::Error| match source.kind() {
        ErrorKind::NotFound => LabError::NoIproute,
        _ => LabError::Start {
            program: "ip".into(),
            source,
        },
    };
    let mut child = Command::new("ip")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(start)?;
    if let Some(mut stdin) = child.stdin.take() {
        // An ip that ends early says why on standard error.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(start)?;
    if output.status.success() {
        return Ok(());
    }
    Err(LabError::Failed {
        what: format!("ip {}", args.join(" ")),
        stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}
