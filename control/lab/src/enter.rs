//! Runs a command on a machine or in a pod of a lab.

use std::{fs::File, os::unix::process::CommandExt, path::PathBuf, process::Command};

use nix::sched::{CloneFlags, setns};

use crate::{error::LabError, folder::Lab, mesh, process};

/// Becomes the command, inside; returns only where that fails. In a pod with an instance it has the instance's
/// environment.
pub(crate) fn exec(lab: &Lab, name: &str, command: &[String]) -> Result<(), LabError> {
    let manifest = lab.manifest()?;
    let places = process::places(lab);
    let (place, path) = find(&places, name).ok_or_else(|| unknown(lab, name))?;
    let instance = process::of_lab(lab)
        .into_iter()
        .find(|found| found.machine.as_ref() == Some(place) && found.node.is_some());
    let file = File::open(path).map_err(LabError::file(path))?;
    setns(file, CloneFlags::CLONE_NEWNET).map_err(LabError::system(format!("enter {name}")))?;
    let (program, arguments) = match command.split_first() {
        Some((program, arguments)) => (program.as_str(), arguments),
        None => ("/bin/sh", &[][..]),
    };
    let environment = instance.map(|found| process::environment(found.id.pid));
    let source = Command::new(program)
        .args(arguments)
        .envs(environment.unwrap_or_default())
        .envs(mesh::environment(lab, &manifest))
        .exec();
    Err(LabError::Start {
        program: program.to_owned(),
        source,
    })
}

/// The place of this name; an instance may be written as `namespace/application/service/number`, and then is
/// the one of the latest epoch.
fn find<'a>(places: &'a [(String, PathBuf)], name: &str) -> Option<&'a (String, PathBuf)> {
    let slot = format!("{}.", name.replace('/', "."));
    let epoch = |place: &&(String, PathBuf)| place.0.strip_prefix(&slot)?.parse::<u64>().ok();
    let exact = places.iter().find(|place| place.0 == name);
    exact.or_else(|| {
        places
            .iter()
            .filter(|place| epoch(place).is_some())
            .max_by_key(epoch)
    })
}

/// The error that says which names there are.
pub(crate) fn unknown(lab: &Lab, name: &str) -> LabError {
    let known: Vec<_> = process::places(lab)
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    LabError::NoMachine {
        id: lab.id.clone(),
        name: name.to_owned(),
        known: known.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_is_found_by_its_slot_in_its_latest_epoch() {
        let places = [
            "edge-1",
            "shop.bookinfo.details.0.9",
            "shop.bookinfo.details.0.12",
        ]
        .map(|name| (name.to_owned(), PathBuf::new()));
        let found = |name: &str| find(&places, name).map(|(name, _)| name.as_str());
        assert_eq!(found("edge-1"), Some("edge-1"));
        assert_eq!(
            found("shop/bookinfo/details/0"),
            Some("shop.bookinfo.details.0.12")
        );
        assert_eq!(
            found("shop.bookinfo.details.0.9"),
            Some("shop.bookinfo.details.0.9")
        );
        assert_eq!(found("shop/bookinfo/details"), None);
        assert_eq!(found("edge-2"), None);
    }
}
