//! File descriptors: what the doors hold must fit into the process's limit (`RLIMIT_NOFILE`, getrlimit(2)).
//!
//! The soft limit is 1,024 nearly everywhere, for programs that use select(2); a program that does not may raise it to
//! the hard one by itself. Where even that is small, the door for agents takes fewer connections and says so: the disk and
//! the other leads must never wait for a descriptor.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::{
    LeadError,
    door::{CONNECTIONS, CONNECTIONS_BY_TOKEN},
};

/// What a lead needs beside its doors: its database, snapshots, the connections to the other leads.
const OWN: usize = 256;
/// The fewest connections with which the door of agents and leads is of use.
const FEWEST: usize = 64;

/// Raises this process's soft limit as far as a lead needs it; how many connections the door may hold.
///
/// # Errors
/// When even the hard limit does not serve a lead.
pub(crate) fn raise() -> Result<usize, LeadError> {
    let wanted = (CONNECTIONS + CONNECTIONS_BY_TOKEN + OWN) as u64;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let reachable = maximum.unwrap_or(u64::MAX).min(wanted);
    let mut limit = current.unwrap_or(u64::MAX);
    if limit < reachable {
        let raised = Rlimit {
            current: Some(reachable),
            maximum,
        };
        match setrlimit(Resource::Nofile, raised) {
            Ok(()) => limit = reachable,
            Err(error) => tracing::warn!(%error, limit, "failed to raise the limit of descriptors"),
        }
    }
    let room = room(limit).ok_or(LeadError::Descriptors {
        limit,
        needed: (FEWEST + CONNECTIONS_BY_TOKEN + OWN) as u64,
        wanted,
    })?;
    if room < CONNECTIONS {
        tracing::warn!(
            limit,
            wanted,
            connections = room,
            "few descriptors: raise the hard limit (LimitNOFILE= of systemd)"
        );
    }
    Ok(room)
}

/// How many connections the door of agents and leads may hold; `None` where that is too few.
fn room(limit: u64) -> Option<usize> {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let room = limit.checked_sub(CONNECTIONS_BY_TOKEN + OWN)?;
    (room >= FEWEST).then_some(room.min(CONNECTIONS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_door_holds_what_the_limit_leaves() {
        for (limit, want) in [
            (0, None),
            (575, None),
            (576, Some(64)),
            (1_024, Some(512)),
            (4_608, Some(4_096)),
            (u64::MAX, Some(4_096)),
        ] {
            assert_eq!(room(limit), want, "{limit}");
        }
    }
}
