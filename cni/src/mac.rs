//! A MAC address that one interface may have.

use std::{fmt, str::FromStr};

/// Six octets, most significant first; not a group address, not all zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mac(pub(crate) [u8; 6]);

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why| format!("{text:?} is no MAC address of an interface: {why}");
        let octets: Vec<u8> = text
            .split([':', '-'])
            .map(|octet| match octet.len() {
                2 => u8::from_str_radix(octet, 16).ok(),
                _ => None,
            })
            .collect::<Option<_>>()
            .ok_or_else(|| wrong("octets are two hexadecimal digits"))?;
        let octets: [u8; 6] = octets.try_into().map_err(|_| wrong("it has six octets"))?;
        if octets[0] & 1 == 1 {
            return Err(wrong("it is a group address"));
        }
        if octets == [0; 6] {
            return Err(wrong("it is all zero"));
        }
        Ok(Self(octets))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(out, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_interfaces_address_is_a_mac() {
        for (text, good) in [
            ("02:00:5e:00:53:01", true),
            ("02-00-5E-00-53-01", true),
            ("03:00:5e:00:53:01", false),
            ("00:00:00:00:00:00", false),
            ("02:00:5e:00:53", false),
            ("2:0:5e:0:53:1", false),
            ("02:00:5e:00:53:0g", false),
            ("", false),
        ] {
            assert_eq!(text.parse::<Mac>().is_ok(), good, "{text}");
        }
        let mac: Mac = "02-00-5E-00-53-01".parse().unwrap();
        assert_eq!(mac.to_string(), "02:00:5e:00:53:01");
    }
}
