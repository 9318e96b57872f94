//! Runs a command on a machine or in a pod of a lab.

use std::{fs::File, os::unix::process::CommandExt, process::Command};

use nix::sched::{CloneFlags, setns};

use crate::{
    error::LabError,
    folder::Lab,
    mesh,
    process::{self, NAMES},
};

/// Becomes the command, inside; returns only where that fails.
pub(crate) fn exec(lab: &Lab, name: &str, command: &[String]) -> Result<(), LabError> {
    let manifest = lab.manifest()?;
    let path = format!("{NAMES}/{}", lab.netns(name));
    let file = match name.parse::<i32>() {
        Ok(pid) if process::of_lab(lab).iter().any(|found| found.id.pid == pid) => {
            let path = format!("/proc/{pid}/ns/net");
            File::open(&path).map_err(LabError::file(path))?
        }
        _ => File::open(&path).map_err(|_| unknown(lab, name))?,
    };
    setns(file, CloneFlags::CLONE_NEWNET).map_err(LabError::system(format!("enter {name}")))?;
    let (program, arguments) = match command.split_first() {
        Some((program, arguments)) => (program.as_str(), arguments),
        None => ("/bin/sh", &[][..]),
    };
    let source = Command::new(program)
        .args(arguments)
        .envs(mesh::environment(lab, &manifest))
        .exec();
    Err(LabError::Start {
        program: program.to_owned(),
        source,
    })
}

/// The error that says which names there are.
pub(crate) fn unknown(lab: &Lab, name: &str) -> LabError {
    let prefix = lab.prefix();
    let known: Vec<_> = process::names(&prefix)
        .iter()
        .filter_map(|name| name.strip_prefix(&prefix).map(ToOwned::to_owned))
        .collect();
    LabError::NoMachine {
        id: lab.id.clone(),
        name: name.to_owned(),
        known: known.join(", "),
    }
}
