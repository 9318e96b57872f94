//! Quantities as people write them, each with its unit: `250m`, `64Mi`, `20ms`, `5Mbps`.
//!
//! A number without a unit is refused where more than one unit is usual. Stored and sent as integers in the
//! smallest unit that matters, because decisions are made of them.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Why a text is no quantity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Digits are missing or something else stands there.
    #[error("{text:?} is not {what}: write {example}")]
    Form {
        /// As written.
        text: String,
        /// What was expected.
        what: &'static str,
        /// How to write it.
        example: &'static str,
    },
    /// More than can be represented, or finer than the smallest unit.
    #[error("{text:?} is out of range for {what}: {limit}")]
    Range {
        /// As written.
        text: String,
        /// What was expected.
        what: &'static str,
        /// The range.
        limit: &'static str,
    },
}

/// Processing power in thousandths of a vCPU: `250m`, `2`, `0.5`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Cpu(u64);

/// An amount of memory in bytes: `64Mi`, `1Gi`, `500M`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Bytes(u64);

/// A round-trip time in microseconds: `20ms`, `500us`, `1s`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Latency(u32);

/// A bandwidth in bits per second: `5Mbps`, `1Gbps`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Bandwidth(u64);

/// A unit's name and how many of the smallest unit it is.
type Scale = (&'static str, u64);

/// `text` as a whole number of the smallest unit.
fn parse(
    text: &str,
    what: &'static str,
    example: &'static str,
    scales: &[Scale],
    max: u64,
) -> Result<u64, UnitError> {
    let form = || UnitError::Form {
        text: text.to_owned(),
        what,
        example,
    };
    let range = |limit| UnitError::Range {
        text: text.to_owned(),
        what,
        limit,
    };
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let scale = scales
        .iter()
        .find(|(name, _)| *name == suffix)
        .ok_or_else(form)?
        .1;
    let (whole, fraction) = match number.split_once('.') {
        Some((_, "")) => return Err(form()),
        Some(parts) => parts,
        None => (number, ""),
    };
    let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) {
        return Err(form());
    }
    let too_big = "it is too large";
    let whole: u64 = whole.parse().map_err(|_| range(too_big))?;
    let mut value = u128::from(whole) * u128::from(scale);
    if !fraction.is_empty() {
        if fraction.len() > 9 {
            return Err(range("at most nine decimals"));
        }
        let parts: u128 = fraction.parse().map_err(|_| form())?;
        let ten = 10u128.pow(fraction.len() as u32);
        if !(parts * u128::from(scale)).is_multiple_of(ten) {
            return Err(range("it is finer than the smallest unit"));
        }
        value += parts * u128::from(scale) / ten;
    }
    u64::try_from(value)
        .ok()
        .filter(|value| *value <= max)
        .ok_or_else(|| range(too_big))
}

impl FromStr for Cpu {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let scales = [("m", 1), ("", 1000)];
        parse(
            text,
            "an amount of processing power",
            "250m, 0.5 or 2 (vCPU)",
            &scales,
            1_000_000_000,
        )
        .map(Self)
    }
}

impl FromStr for Bytes {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let scales = [
            ("Ki", 1 << 10),
            ("Mi", 1 << 20),
            ("Gi", 1 << 30),
            ("Ti", 1 << 40),
            ("k", 1000),
            ("M", 1_000_000),
            ("G", 1_000_000_000),
            ("T", 1_000_000_000_000),
        ];
        parse(text, "an amount of memory", "64Mi or 1Gi", &scales, 1 << 50).map(Self)
    }
}

impl FromStr for Latency {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let scales = [("us", 1), ("ms", 1000), ("s", 1_000_000)];
        parse(text, "a latency", "20ms or 500us", &scales, 3_600_000_000)
            .map(|us| Self(u32::try_from(us).unwrap_or(u32::MAX)))
    }
}

impl FromStr for Bandwidth {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let scales = [
            ("bps", 1),
            ("kbps", 1000),
            ("Mbps", 1_000_000),
            ("Gbps", 1_000_000_000),
        ];
        parse(
            text,
            "a bandwidth",
            "5Mbps or 1Gbps (bits per second)",
            &scales,
            1_000_000_000_000_000,
        )
        .map(Self)
    }
}

impl Cpu {
    /// So many thousandths of a vCPU.
    #[must_use]
    pub const fn milli(milli: u64) -> Self {
        Self(milli)
    }

    /// In thousandths of a vCPU.
    #[must_use]
    pub const fn as_milli(self) -> u64 {
        self.0
    }
}

impl Bytes {
    /// So many bytes.
    #[must_use]
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// In bytes.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// In whole units, as many as a person can read.
    #[must_use]
    pub const fn rounded(self) -> Self {
        let unit = match self.0 {
            0..0x400 => 1,
            0x400..0x10_0000 => 1 << 10,
            0x10_0000..0x2_8000_0000 => 1 << 20,
            _ => 1 << 30,
        };
        Self(self.0 / unit * unit)
    }
}

impl Latency {
    /// So many microseconds.
    #[must_use]
    pub const fn us(us: u32) -> Self {
        Self(us)
    }

    /// In microseconds.
    #[must_use]
    pub const fn as_us(self) -> u32 {
        self.0
    }
}

impl Bandwidth {
    /// So many bits per second.
    #[must_use]
    pub const fn bps(bps: u64) -> Self {
        Self(bps)
    }

    /// In bits per second.
    #[must_use]
    pub const fn as_bps(self) -> u64 {
        self.0
    }
}

/// The number in the largest unit in which it is whole.
fn show(f: &mut fmt::Formatter<'_>, value: u64, scales: &[Scale]) -> fmt::Result {
    let (name, scale) = scales
        .iter()
        .find(|(_, scale)| value >= *scale && value.is_multiple_of(*scale))
        .copied()
        .unwrap_or(scales[scales.len() - 1]);
    write!(f, "{}{name}", value / scale)
}

impl fmt::Display for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        show(f, self.0, &[("m", 1)])
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        show(
            f,
            self.0,
            &[("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10), ("B", 1)],
        )
    }
}

impl fmt::Display for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 >= 10_000 {
            return write!(f, "{}ms", self.0 / 1000);
        }
        show(f, u64::from(self.0), &[("ms", 1000), ("us", 1)])
    }
}

impl fmt::Display for Bandwidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        show(
            f,
            self.0,
            &[
                ("Gbps", 1_000_000_000),
                ("Mbps", 1_000_000),
                ("kbps", 1000),
                ("bps", 1),
            ],
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantity_has_its_unit() {
        assert_eq!("250m".parse(), Ok(Cpu(250)));
        assert_eq!("2".parse(), Ok(Cpu(2000)));
        assert_eq!("0.5".parse(), Ok(Cpu(500)));
        assert_eq!("64Mi".parse(), Ok(Bytes(64 << 20)));
        assert_eq!("1.5Gi".parse(), Ok(Bytes(3 << 29)));
        assert_eq!("20ms".parse(), Ok(Latency(20_000)));
        assert_eq!("0.5ms".parse(), Ok(Latency(500)));
        assert_eq!("5Mbps".parse(), Ok(Bandwidth(5_000_000)));
    }

    #[test]
    fn a_rounded_amount_has_few_digits() {
        for (bytes, want) in [
            (0, "0B"),
            (1_000, "1000B"),
            (5_000, "4Ki"),
            ((300 << 20) + 17, "300Mi"),
            ((5 << 30) - 1, "5119Mi"),
            ((75 << 30) + 1, "75Gi"),
        ] {
            assert_eq!(Bytes::new(bytes).rounded().to_string(), want);
        }
    }

    #[test]
    fn an_ambiguous_or_missing_unit_is_refused() {
        for bad in ["64", "64MB", "64 Mi", "64mi", "64m", "-1Mi", "Mi", ""] {
            assert!(bad.parse::<Bytes>().is_err(), "{bad:?}");
        }
        for bad in ["20", "20 ms", "ms", "20m", "1h", "1..5ms", "1.ms", ".5ms"] {
            assert!(bad.parse::<Latency>().is_err(), "{bad:?}");
        }
        for bad in ["5", "5M", "5MBps", "5mbps", "5Mbit"] {
            assert!(bad.parse::<Bandwidth>().is_err(), "{bad:?}");
        }
        for bad in ["0.0001", "250u", "1e3", "99999999999999999999", "²"] {
            assert!(bad.parse::<Cpu>().is_err(), "{bad:?}");
        }
        assert_eq!(
            "64".parse::<Bytes>().unwrap_err().to_string(),
            "\"64\" is not an amount of memory: write 64Mi or 1Gi"
        );
    }

    #[test]
    fn a_quantity_is_shown_in_a_unit_that_it_parses_from() {
        for text in ["250m", "2000m"] {
            assert_eq!(text.parse::<Cpu>().unwrap().to_string(), text);
        }
        for text in ["64Mi", "1Gi", "3Ki"] {
            assert_eq!(text.parse::<Bytes>().unwrap().to_string(), text);
        }
        for text in ["20ms", "500us", "1500us"] {
            assert_eq!(text.parse::<Latency>().unwrap().to_string(), text);
        }
        assert_eq!(Latency(54_321).to_string(), "54ms");
    }
}
