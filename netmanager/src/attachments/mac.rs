//! MAC addresses of attachments.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A unicast MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac([u8; 6]);

/// Not a MAC address that an interface can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a MAC address for an interface: expected six octets like 02:00:00:00:00:01, unicast and not zero"
)]
pub struct MacError(String);

/// Which end of a veth pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Pod,
    Host,
}

impl Mac {
    /// A locally administered address (IEEE 802, bit 1 of the first octet) that is one endpoint's end's own.
    pub(super) fn derived(node: u32, endpoint: u32, side: Side) -> Self {
        let [a, b] = (node as u16).to_be_bytes();
        let [c, d, e] = [
            (endpoint >> 16) as u8,
            (endpoint >> 8) as u8,
            endpoint as u8,
        ];
        let first = match side {
            Side::Pod => 0x02,
            Side::Host => 0x06,
        };
        Self([first, a, b, c, d, e])
    }

    /// Its six octets.
    #[must_use]
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let bad = || MacError(text.to_owned());
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts
                .next()
                .filter(|part| part.len() == 2)
                .ok_or_else(bad)?;
            *octet = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        let is_usable = octets[0] & 1 == 0 && octets != [0; 6];
        if parts.next().is_some() || !is_usable {
            return Err(bad());
        }
        Ok(Self(octets))
    }
}

impl TryFrom<String> for Mac {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, MacError> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_survives_its_text_and_unusable_ones_are_refused() {
        let mac = Mac::derived(3, 0x01_0203, Side::Host);
        assert_eq!(mac.to_string(), "06:00:03:01:02:03");
        assert_eq!(mac.to_string().parse(), Ok(mac));
        for text in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "2:0:0:0:0:1",
            "01:00:5e:00:00:01",
            "00:00:00:00:00:00",
            "ff:ff:ff:ff:ff:ff",
            "+2:00:00:00:00:xx",
        ] {
            assert_eq!(text.parse::<Mac>(), Err(MacError(text.into())), "{text}");
        }
    }
}
