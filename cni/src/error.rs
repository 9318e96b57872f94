//! What can go wrong, each with its CNI code (CNI spec 1.1, section 5 "Error"); 100 and up are ours.

use std::io;

use netmanager_api::cni::Refused;

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The asked cniVersion is none of ours, or has no such command.
    #[error("{0}")]
    Version(String),
    /// Something was asked by the configuration that Weft does not do.
    #[error("unsupported field {key} = {value}: {way_out}")]
    Field {
        /// Path of the key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What to do instead.
        way_out: &'static str,
    },
    /// The environment is incomplete or wrong; names every variable that is.
    #[error("{0}")]
    Environment(String),
    /// Reading or writing failed.
    #[error("failed to {what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The configuration is not JSON of the right shape.
    #[error("failed to decode the network configuration: {0}")]
    Decode(String),
    /// The configuration is readable and wrong.
    #[error("{0}")]
    Config(String),
    /// The NetManager is away or busy: ask again.
    #[error("{0}")]
    TryAgain(String),
    /// ADD would fail now (STATUS).
    #[error("{0}")]
    NotAvailable(String),
    /// The NetManager said no.
    #[error("{}", .0.message)]
    Refused(Refused),
    /// The kernel refused a change.
    #[error("failed to {what}: {why}")]
    Kernel {
        /// What was tried.
        what: String,
        /// Its answer.
        why: String,
    },
    /// CHECK found differences.
    #[error("{}", .0.join("; "))]
    Differs(Vec<String>),
    /// The NetManager does not keep the protocol.
    #[error("{0}")]
    Protocol(String),
    /// An operation failed and something else failed on the way out.
    #[error("{first}")]
    Several {
        /// What failed first.
        first: Box<Error>,
        /// What failed after it.
        then: Vec<String>,
    },
}

impl Error {
    /// The CNI error code.
    #[must_use]
    pub fn code(&self) -> u32 {
        match self {
            Self::Version(_) => 1,
            Self::Field { .. } => 2,
            Self::Environment(_) => 4,
            Self::Io { .. } => 5,
            Self::Decode(_) => 6,
            Self::Config(_) => 7,
            Self::TryAgain(_) => 11,
            Self::NotAvailable(_) => 50,
            Self::Refused(refused) => refused.code,
            Self::Kernel { .. } => 100,
            Self::Differs(_) => 101,
            Self::Protocol(_) => 102,
            Self::Several { first, .. } => first.code(),
        }
    }

    /// More for people: what else went wrong.
    #[must_use]
    pub fn details(&self) -> String {
        match self {
            Self::Several { then, .. } => then.join("; "),
            _ => String::new(),
        }
    }

    /// All failures of a cleanup as one, the first one's code; success when there were none.
    pub(crate) fn gather(failures: Vec<Self>) -> Result<(), Self> {
        let mut failures = failures.into_iter();
        match failures.next() {
            None => Ok(()),
            Some(first) => Err(first.and_then_also(failures)),
        }
    }

    /// This failure, and those that followed it.
    pub(crate) fn and_then_also(self, failures: impl IntoIterator<Item = Self>) -> Self {
        let then: Vec<_> = failures
            .into_iter()
            .map(|error| error.to_string())
            .collect();
        if then.is_empty() {
            return self;
        }
        Self::Several {
            first: Box::new(self),
            then,
        }
    }

    pub(crate) fn io(what: impl Into<String>, source: io::Error) -> Self {
        Self::Io {
            what: what.into(),
            source,
        }
    }

    pub(crate) fn kernel(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Self {
        |error| Self::Kernel {
            what: what.into(),
            why: match error {
                rtnetlink::Error::NetlinkError(message) => message.to_io().to_string(),
                other => other.to_string(),
            },
        }
    }
}
