//! What the machine must have before anything is touched.

use std::fs;

use super::DatapathError;

/// The oldest kernel that Weft runs on (Debian 12's).
const OLDEST: (u32, u32) = (6, 1);
/// The first kernel with TCX.
const TCX_SINCE: (u32, u32) = (6, 6);
/// Capabilities by bit (`linux/capability.h`); SYS_ADMIN implies BPF and PERFMON.
const NET_ADMIN: u32 = 12;
const SYS_ADMIN: u32 = 21;
const PERFMON: u32 = 38;
const BPF: u32 = 39;

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preflight {
    /// Whether the kernel has TCX.
    pub has_tcx: bool,
}

/// Checks kernel and capabilities.
///
/// # Errors
/// Names the first thing that is missing.
pub fn preflight() -> Result<Preflight, DatapathError> {
    let read = |path: &str| {
        fs::read_to_string(path).map_err(|source| DatapathError::File {
            what: "read",
            path: path.into(),
            source,
        })
    };
    check(
        &read("/proc/sys/kernel/osrelease")?,
        &read("/proc/self/status")?,
    )
}

/// The same over the text of the two files.
fn check(release: &str, status: &str) -> Result<Preflight, DatapathError> {
    let release = release.trim();
    let version = version(release);
    if version < OLDEST {
        return Err(DatapathError::KernelTooOld {
            found: release.to_owned(),
            needed: "6.1",
        });
    }
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0);
    let has = |bit: u32| effective & (1 << bit) != 0;
    let missing = [
        ("CAP_NET_ADMIN", has(NET_ADMIN)),
        ("CAP_BPF", has(BPF) || has(SYS_ADMIN)),
        ("CAP_PERFMON", has(PERFMON) || has(SYS_ADMIN)),
    ]
    .into_iter()
    .find(|(_, held)| !held);
    match missing {
        Some((name, _)) => Err(DatapathError::Capability(name)),
        None => Ok(Preflight {
            has_tcx: version >= TCX_SINCE,
        }),
    }
}

/// Major and minor of a release such as `6.1.0-28-amd64`; (0, 0) where it is none.
fn version(release: &str) -> (u32, u32) {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor),
        _ => (0, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: &str = "Name:\tx\nCapEff:\t000001ffffffffff\n";

    #[test]
    fn old_kernels_are_refused_by_name_and_tcx_is_told_by_version() {
        for (release, want) in [
            ("5.15.0-91-generic\n", None),
            ("6.0.19", None),
            ("nonsense", None),
            ("6.1.0-28-amd64\n", Some(false)),
            ("6.5.13", Some(false)),
            ("6.6.1", Some(true)),
            ("6.18.44-fc-v669", Some(true)),
            ("7.0-rc1", Some(true)),
        ] {
            match (check(release, ALL), want) {
                (Ok(found), Some(has_tcx)) => assert_eq!(found.has_tcx, has_tcx, "{release}"),
                (Err(error), None) => {
                    assert!(error.to_string().contains(release.trim()), "{error}");
                }
                (result, want) => panic!("{release}: {result:?} instead of {want:?}"),
            }
        }
    }

    #[test]
    fn the_first_missing_capability_is_named() {
        let status = |bits: &[u32]| {
            let mask = bits.iter().fold(0u64, |mask, bit| mask | 1 << bit);
            format!("CapEff:\t{mask:016x}\n")
        };
        for (bits, want) in [
            (&[BPF, PERFMON][..], Some("CAP_NET_ADMIN")),
            (&[NET_ADMIN, PERFMON], Some("CAP_BPF")),
            (&[NET_ADMIN, BPF], Some("CAP_PERFMON")),
            (&[NET_ADMIN, BPF, PERFMON], None),
            (&[NET_ADMIN, SYS_ADMIN], None),
        ] {
            let error = check("6.6.0", &status(bits))
                .err()
                .map(|error| error.to_string());
            assert_eq!(error.is_some(), want.is_some(), "{bits:?}");
            if let (Some(error), Some(want)) = (error, want) {
                assert!(error.contains(want), "{error}");
            }
        }
    }
}
