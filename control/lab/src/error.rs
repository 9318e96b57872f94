//! Why a lab could not be made, used or taken down.

use std::{io, path::PathBuf};

/// Why a lab could not be made, used or taken down.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// Not root.
    #[error("a lab is made of network namespaces, which only root can make: run as root")]
    NotRoot,
    /// A program could not be started at all.
    #[error("failed to start {program}")]
    Start {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `ip` is not there.
    #[error("ip was not found: apt-get install -y --no-install-recommends iproute2")]
    NoIproute,
    /// A program ended with an error.
    #[error("{what}: {stderr}")]
    Failed {
        /// What was tried.
        what: String,
        /// What the program said.
        stderr: String,
    },
    /// A file or folder of the lab.
    #[error("{path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A system call.
    #[error("failed to {what}")]
    System {
        /// What was tried.
        what: String,
        /// Why.
        #[source]
        source: nix::Error,
    },
    /// The manifest cannot be read.
    #[error("{path} is no lab's manifest")]
    Manifest {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A product's binary is missing.
    #[error("{name} is not beside weft in {dir}: build it, or say where by --binaries")]
    NoBinary {
        /// Which.
        name: String,
        /// Where it was looked for.
        dir: PathBuf,
    },
    /// No lab of that ID.
    #[error("there is no lab {id:?}: weft lab list shows those there are")]
    NoLab {
        /// The ID.
        id: String,
    },
    /// No ID was given and there is no single lab.
    #[error("{count} labs are up: say which by --lab, of {ids}")]
    WhichLab {
        /// How many.
        count: usize,
        /// Their IDs.
        ids: String,
    },
    /// No machine or pod of that name.
    #[error("lab {id} has no machine or pod {name:?}: there are {known}")]
    NoMachine {
        /// The lab.
        id: String,
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// A delay that cannot be read.
    #[error(
        "{text:?} is not a delay between two sites: expected for instance cloud-edge=15ms, of {sites}"
    )]
    Delay {
        /// What was given.
        text: String,
        /// The sites there are.
        sites: String,
    },
    /// The mesh did not come up in time.
    #[error("lab {id} was not ready within {seconds} s: {missing}\n{logs}")]
    NotReady {
        /// The lab.
        id: String,
        /// How long was waited.
        seconds: u64,
        /// What is missing.
        missing: String,
        /// The last lines of the logs.
        logs: String,
    },
    /// Several things went wrong while going on after each.
    #[error("{}", .0.iter().map(chain).collect::<Vec<_>>().join("\n"))]
    Several(Vec<LabError>),
}

/// An error with its causes on one line.
fn chain(error: &LabError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(source) = cause {
        text = format!("{text}: {source}");
        cause = source.source();
    }
    text
}

impl LabError {
    /// An error on a file or folder.
    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }

    /// An error of a system call.
    pub(crate) fn system(what: impl Into<String>) -> impl FnOnce(nix::Error) -> Self {
        let what = what.into();
        move |source| Self::System { what, source }
    }
}
