//! The versions of the CNI specification that are spoken here.

use serde_json::{Value, json};

use crate::error::Error;

/// A version whose result shape we speak; ordered by age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum CniVersion {
    V0_3_0,
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

impl CniVersion {
    pub(crate) const ALL: [Self; 5] = [
        Self::V0_3_0,
        Self::V0_3_1,
        Self::V0_4_0,
        Self::V1_0_0,
        Self::V1_1_0,
    ];
    pub(crate) const NEWEST: Self = Self::V1_1_0;

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// The version that a configuration asks for; a missing `cniVersion` means 0.1.0, which is none of ours.
    pub(crate) fn asked(config: &Value) -> Result<Self, Error> {
        let name = match config.get("cniVersion") {
            None | Some(Value::Null) => "0.1.0",
            Some(Value::String(name)) => name,
            Some(other) => {
                return Err(Error::Decode(format!(
                    "cniVersion = {other} is not a string"
                )));
            }
        };
        Self::ALL
            .into_iter()
            .find(|version| version.name() == name)
            .ok_or_else(|| {
                Error::Version(format!(
                    "unsupported cniVersion {name:?}: use one of {}",
                    Self::ALL.map(Self::name).join(", ")
                ))
            })
    }
}

/// The answer to VERSION, whatever came in on stdin.
pub(crate) fn answer(stdin: &[u8]) -> Value {
    let asked = serde_json::from_slice::<Value>(stdin)
        .ok()
        .and_then(|config| config.get("cniVersion")?.as_str().map(str::to_owned));
    json!({
        "cniVersion": asked.as_deref().unwrap_or(CniVersion::NEWEST.name()),
        "supportedVersions": CniVersion::ALL.map(CniVersion::name),
    })
}
