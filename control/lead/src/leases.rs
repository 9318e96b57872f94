//! Which clusters are silent for too long, by the leader's own monotonic clock.
//!
//! A cluster that the leader has not heard of yet gets one whole lease: a new leader therefore waits one lease
//! before it calls anybody lost, and so does one that was itself stopped for a while. Deadlines are not
//! replicated; that a cluster *is* lost is a command.

use std::{collections::BTreeMap, time::Duration};

use control_core::{
    base::{ClusterState, KnowledgeBase},
    name::Name,
    plan::Failover,
};
use tokio::time::Instant;

/// The deadlines of the clusters.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    term: u64,
    checked: Option<Instant>,
    renewed: BTreeMap<(Name, u64), Instant>,
}

impl Leases {
    /// The agent of `cluster` was heard at `now`.
    pub(crate) fn renew(&mut self, cluster: Name, session: u64, now: Instant) {
        self.renewed.insert((cluster, session), now);
    }

    /// The clusters of `ready` that were silent for a whole lease, as the leader of `term`.
    pub(crate) fn expired(
        &mut self,
        term: u64,
        ready: Vec<(Name, u64)>,
        lease: Duration,
        now: Instant,
    ) -> Vec<(Name, u64)> {
        let slept = self.checked.is_none_or(|last| now - last > lease / 2);
        if slept || term != self.term {
            self.renewed.clear();
        }
        self.term = term;
        self.checked = Some(now);
        self.renewed.retain(|key, _| ready.contains(key));
        for key in &ready {
            self.renewed.entry(key.clone()).or_insert(now);
        }
        self.renewed
            .iter()
            .filter(|(_, renewed)| now.saturating_duration_since(**renewed) >= lease)
            .map(|(key, _)| key.clone())
            .collect()
    }
}

/// The clusters whose agents should be renewing.
pub(crate) fn ready(base: &KnowledgeBase) -> Vec<(Name, u64)> {
    base.clusters
        .iter()
        .filter(|(_, cluster)| cluster.state == ClusterState::Ready)
        .map(|(name, cluster)| (name.clone(), cluster.session))
        .collect()
}

/// Whether lost clusters' instances are bound elsewhere: not while more than a third of the clusters (and not
/// merely one) vanished within one lease of each other and are still gone. Then it is more likely that the leads
/// are cut off than that all of them died.
pub(crate) fn failover(base: &KnowledgeBase, lease_ms: u64) -> Failover {
    let mut lost: Vec<u64> = base
        .clusters
        .values()
        .filter_map(|cluster| match cluster.state {
            ClusterState::Ready => None,
            ClusterState::Lost { since_ms } => Some(since_ms),
        })
        .collect();
    lost.sort_unstable();
    let together = lost
        .iter()
        .map(|end| {
            let begin = end.saturating_sub(lease_ms);
            lost.iter()
                .filter(|at| (begin..=*end).contains(*at))
                .count()
        })
        .max()
        .unwrap_or(0);
    if together >= 2 && together * 3 > base.clusters.len() {
        Failover::Paused
    } else {
        Failover::Run
    }
}

#[cfg(test)]
mod tests {
    use control_core::{
        base::Cluster,
        report::{ClusterFacts, Tier},
    };

    use super::*;

    const LEASE: Duration = Duration::from_secs(10);

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn two() -> Vec<(Name, u64)> {
        vec![("cloud".parse().unwrap(), 7), ("edge".parse().unwrap(), 8)]
    }

    /// Looks every second from 0 to `until`; what is expired at the end.
    fn watch(leases: &mut Leases, term: u64, from: Instant, until: u64) -> Vec<(Name, u64)> {
        let mut expired = Vec::new();
        for second in 0..=until {
            expired = leases.expired(term, two(), LEASE, from + ms(second * 1000));
        }
        expired
    }

    #[test]
    fn a_new_leader_waits_one_lease() {
        let start = Instant::now();
        let mut leases = Leases::default();
        assert_eq!(watch(&mut leases, 1, start, 9), []);
        assert_eq!(watch(&mut leases, 2, start + ms(9_500), 9), []);
        let late = leases.expired(2, two(), LEASE, start + ms(19_500));
        assert_eq!(late, two());
    }

    #[test]
    fn a_renewal_counts_for_its_session_only() {
        let start = Instant::now();
        let mut leases = Leases::default();
        watch(&mut leases, 1, start, 8);
        leases.renew("edge".parse().unwrap(), 8, start + ms(8_000));
        leases.renew("cloud".parse().unwrap(), 6, start + ms(8_000));
        let late = leases.expired(1, two(), LEASE, start + ms(10_000));
        assert_eq!(late, [("cloud".parse().unwrap(), 7)]);
    }

    #[test]
    fn a_leader_that_slept_blames_nobody() {
        let start = Instant::now();
        let mut leases = Leases::default();
        watch(&mut leases, 1, start, 1);
        assert_eq!(leases.expired(1, two(), LEASE, start + ms(60_000)), []);
    }

    fn base(states: &[ClusterState]) -> KnowledgeBase {
        let facts = ClusterFacts {
            tier: Tier::Edge,
            region: "de".to_owned(),
            labels: BTreeMap::new(),
            cpu_price_ueur_h: 0,
            memory_price_ueur_h: 0,
            egress_price_ueur_gib: 0,
            cpu_power_mw: 0,
            carbon_g_kwh: 0,
            prefixes: Vec::new(),
        };
        let cluster = |(number, state): (usize, &ClusterState)| {
            let cluster = Cluster {
                facts: facts.clone(),
                session: 1,
                state: *state,
                without_ipv4: None,
                reported_ms: 0,
                drained_since_ms: None,
                leaving_since_ms: None,
                certificate_ends_ms: None,
                nodes: BTreeMap::new(),
            };
            (format!("c{number}").parse().unwrap(), cluster)
        };
        KnowledgeBase {
            clusters: states.iter().enumerate().map(cluster).collect(),
            ..KnowledgeBase::default()
        }
    }

    #[test]
    fn failover_pauses_when_more_than_a_third_vanish_within_one_lease() {
        let lost = |since_ms| ClusterState::Lost { since_ms };
        let ready = ClusterState::Ready;
        let cases: [(&[ClusterState], Failover); 7] = [
            (&[], Failover::Run),
            (&[lost(5), ready, ready], Failover::Run),
            (&[lost(5), ready], Failover::Run),
            (&[lost(5), lost(9_000), ready], Failover::Paused),
            (&[lost(5), lost(90_000), ready], Failover::Run),
            (
                &[lost(5), lost(6), ready, ready, ready, ready],
                Failover::Run,
            ),
            (&[lost(5), lost(6), ready, ready, ready], Failover::Paused),
        ];
        for (states, want) in cases {
            assert_eq!(failover(&base(states), 10_000), want, "{states:?}");
        }
    }
}
