//! What a user may do at the control API.
//!
//! ```text
//!  admin               everything            a certificate without more: weft://MESH/user/NAME
//!  deployer/NS[/NS..]  reads; changes there  weft://MESH/user/NAME/deployer/NS
//!  viewer              reads                 weft://MESH/user/NAME/viewer
//! ```
//!
//! The same text stands in certificates and beside tokens. What each of them opens is the leads' to say.

use std::{collections::BTreeSet, fmt, str::FromStr};

use super::{IdentityError, is_label};

/// The most namespaces of one deployer.
const NAMESPACES: usize = 16;

/// What a user may do at the control API.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Access {
    /// Read what is not secret.
    Viewer,
    /// Read, and change what is in these namespaces; at least one.
    Deployer {
        /// The namespaces.
        namespaces: BTreeSet<String>,
    },
    /// Everything.
    Admin,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Viewer => f.write_str("viewer"),
            Self::Deployer { namespaces } => {
                f.write_str("deployer")?;
                namespaces.iter().try_for_each(|it| write!(f, "/{it}"))
            }
            Self::Admin => f.write_str("admin"),
        }
    }
}

impl FromStr for Access {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let form = || IdentityError::Access(text.to_owned());
        match text.split_once('/') {
            None if text == "viewer" => Ok(Self::Viewer),
            None if text == "admin" => Ok(Self::Admin),
            Some(("deployer", namespaces)) => {
                let namespaces: BTreeSet<String> =
                    namespaces.split('/').map(str::to_owned).collect();
                let well_formed = namespaces.iter().all(|it| is_label(it));
                if well_formed && namespaces.len() <= NAMESPACES {
                    Ok(Self::Deployer { namespaces })
                } else {
                    Err(form())
                }
            }
            _ => Err(form()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_survives_its_text_and_nothing_else_is_one() {
        for text in ["viewer", "admin", "deployer/bank/shop", "deployer/shop"] {
            assert_eq!(text.parse::<Access>().unwrap().to_string(), text);
        }
        let many = format!(
            "deployer{}",
            (0..17).map(|n| format!("/n{n}")).collect::<String>()
        );
        for text in [
            "",
            "Viewer",
            "viewer/shop",
            "admin/",
            "deployer",
            "deployer/",
            "deployer/a//b",
            "king",
            &many,
        ] {
            assert!(text.parse::<Access>().is_err(), "{text:?}");
        }
    }
}
