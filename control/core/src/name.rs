//! Names of things: labels, applications, services, slots.
//!
//! Each is written and stored as one string (`namespace/application/service#instance`), so that it can be a
//! key of a map in any format.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::report::InstanceId;

/// Why a string is not a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Not an RFC 1123 label.
    #[error(
        "{0:?} is not a name: use 1 to 63 of a-z, 0-9 and '-', first and last a letter or digit"
    )]
    Label(String),
    /// Not the right number of parts.
    #[error("{0:?} is not of the form {1}")]
    Form(String, &'static str),
}

/// An RFC 1123 label: the name of a namespace, application, service or cluster.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// The smallest there is.
    pub(crate) fn least() -> Self {
        Self("0".to_owned())
    }

    /// The label as written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let well_formed = (1..=63).contains(&text.len())
            && text.bytes().all(inner)
            && !text.starts_with('-')
            && !text.ends_with('-');
        if well_formed {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError::Label(text.to_owned()))
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An application: `namespace/application`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AppName {
    /// Its namespace.
    pub namespace: Name,
    /// Its name.
    pub name: Name,
}

impl AppName {
    /// The service of this application called `service`.
    #[must_use]
    pub fn service(&self, service: &Name) -> ServiceName {
        ServiceName {
            namespace: self.namespace.clone(),
            application: self.name.clone(),
            service: service.clone(),
        }
    }
}

impl FromStr for AppName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let (namespace, name) = text
            .split_once('/')
            .ok_or_else(|| NameError::Form(text.to_owned(), "namespace/application"))?;
        Ok(Self {
            namespace: namespace.parse()?,
            name: name.parse()?,
        })
    }
}

impl fmt::Display for AppName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A service: `namespace/application/service`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServiceName {
    /// Its namespace.
    pub namespace: Name,
    /// Its application.
    pub application: Name,
    /// Its name within the application.
    pub service: Name,
}

impl ServiceName {
    /// Whether it belongs to `app`.
    pub(crate) fn is_of(&self, app: &AppName) -> bool {
        self.namespace == app.namespace && self.application == app.name
    }

    /// The application it belongs to.
    #[must_use]
    pub fn app(&self) -> AppName {
        AppName {
            namespace: self.namespace.clone(),
            name: self.application.clone(),
        }
    }

    /// One of its slots.
    #[must_use]
    pub fn slot(&self, instance: u32) -> Slot {
        Slot {
            service: self.clone(),
            instance,
        }
    }
}

impl FromStr for ServiceName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let form = || NameError::Form(text.to_owned(), "namespace/application/service");
        let mut parts = text.split('/');
        let mut next = || parts.next().ok_or_else(form);
        let (namespace, application, service) = (next()?, next()?, next()?);
        if parts.next().is_some() {
            return Err(form());
        }
        Ok(Self {
            namespace: namespace.parse()?,
            application: application.parse()?,
            service: service.parse()?,
        })
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}/{}/{}",
            self.namespace, self.application, self.service
        )
    }
}

/// One slot of a service: `namespace/application/service#instance`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Slot {
    /// The service.
    pub service: ServiceName,
    /// Its number, from 0.
    pub instance: u32,
}

impl Slot {
    /// The life of this slot in `epoch`.
    #[must_use]
    pub fn at(&self, epoch: u64) -> InstanceId {
        InstanceId {
            service: self.service.to_string(),
            instance: self.instance,
            epoch,
        }
    }

    /// The slot of a reported instance; an error when its service is no name.
    pub fn of(id: &InstanceId) -> Result<Self, NameError> {
        Ok(Self {
            service: id.service.parse()?,
            instance: id.instance,
        })
    }
}

impl FromStr for Slot {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let form = || NameError::Form(text.to_owned(), "namespace/application/service#instance");
        let (service, instance) = text.split_once('#').ok_or_else(form)?;
        Ok(Self {
            service: service.parse()?,
            instance: instance.parse().map_err(|_| form())?,
        })
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.service, self.instance)
    }
}

macro_rules! as_string {
    ($($name:ident),*) => {$(
        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.to_string()
            }
        }
    )*};
}
as_string!(Name, AppName, ServiceName, Slot);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_an_rfc_1123_label() {
        for good in ["a", "0", "reviews-v1", &"x".repeat(63)] {
            assert_eq!(good.parse::<Name>().map(String::from), Ok(good.to_owned()));
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a_b", "ä", &"x".repeat(64)] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_slot_survives_its_text() {
        let slot: Slot = "shop/bookinfo/reviews-v1#2".parse().unwrap();
        assert_eq!(slot.to_string(), "shop/bookinfo/reviews-v1#2");
        assert_eq!(Slot::of(&slot.at(7)), Ok(slot));
        for bad in ["a/b#0", "a/b/c", "a/b/c#", "a/b/c#-1", "a/b/c/d#0", "#0"] {
            assert!(bad.parse::<Slot>().is_err(), "{bad:?}");
        }
    }
}
