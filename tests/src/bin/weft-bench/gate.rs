//! What the figures must hold, in one table; each with where it was agreed.
//!
//! A gate passes when the end of its 95 % interval that is nearer to the bound does.

use serde::Serialize;

use crate::{
    agents, case, control,
    figures::{Figures, Interval, Series},
    load::{Family, Metric},
    statistics, table, tunnel,
};

/// One demand.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gate {
    /// What is judged; `None` is every case that the figures hold.
    case: Option<&'static str>,
    /// The metric; `None` is every one.
    metric: Option<&'static str>,
    against: Against,
    bound: Bound,
    source: &'static str,
}

#[derive(Clone, Copy, Debug)]
enum Against {
    /// The case of this name, same metric and family.
    Case(&'static str),
    /// The same over IPv4.
    Ipv4,
    /// The bound alone.
    Nothing,
}

#[derive(Clone, Copy, Debug)]
enum Bound {
    RatioAtLeast(f64),
    RatioAtMost(f64),
    /// Units of the metric more than the reference.
    MoreAtMost(f64),
    /// Units of the metric.
    AtLeast(f64),
    /// Units of the metric.
    AtMost(f64),
    /// Units of the metric, in every round.
    NeverMore(f64),
}

/// A gate as it came out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Verdict {
    pub(crate) gate: String,
    pub(crate) family: Family,
    pub(crate) value: Interval,
    pub(crate) passes: bool,
    pub(crate) source: &'static str,
}

const SAME_NODE: &str = "issue 3, done when, same node";
const TWO_NODES: &str = "issue 3, done when, two nodes";
const PACKETS: &str = "issue 3, done when, packets";

const fn at_least(case: &'static str, metric: Metric, against: &'static str, least: f64) -> Gate {
    Gate {
        case: Some(case),
        metric: Some(metric.name()),
        against: Against::Case(against),
        bound: Bound::RatioAtLeast(least),
        source: SAME_NODE,
    }
}

/// `bench vip`.
pub(crate) const VIP: &[Gate] = &[
    at_least(case::VIP, Metric::Throughput, case::DIRECT, 0.95),
    at_least(case::VIP, Metric::RequestResponse, case::DIRECT, 1.00),
    at_least(case::VIP, Metric::Connections, case::DIRECT, 1.00),
    at_least(case::VIP, Metric::Connections, case::NFTABLES, 1.15),
    at_least(case::VIP, Metric::RequestResponseOneCpu, case::DIRECT, 1.00),
    at_least(case::VIP, Metric::ConnectionsOneCpu, case::DIRECT, 1.00),
    at_least(case::VIP, Metric::ConnectionsOneCpu, case::NFTABLES, 1.15),
    // Between two CPUs it is their wake-ups that are measured, which splicing cannot spare.
    at_least(
        case::SPLICED,
        Metric::RequestResponseOneCpu,
        case::DIRECT,
        1.50,
    ),
    at_least(case::SPLICED, Metric::RequestResponse, case::DIRECT, 1.00),
    UDP,
];

/// Small datagrams through a VIP beside the direct route.
const UDP: Gate = Gate {
    source: PACKETS,
    ..at_least(case::VIP, Metric::Datagrams, case::DIRECT, 0.95)
};

/// `bench datapath`.
pub(crate) const DATAPATH: &[Gate] = &[
    Gate {
        case: None,
        metric: None,
        against: Against::Ipv4,
        bound: Bound::RatioAtMost(1.05),
        source: PACKETS,
    },
    UDP,
];

/// `bench tunnel`.
pub(crate) const TUNNEL: &[Gate] = &[
    Gate {
        source: TWO_NODES,
        ..at_least(
            tunnel::VIP_USERSPACE,
            Metric::Throughput,
            tunnel::PLAIN_USERSPACE,
            0.95,
        )
    },
    Gate {
        source: TWO_NODES,
        ..at_least(
            tunnel::VIP_KERNEL,
            Metric::Throughput,
            tunnel::PLAIN_KERNEL,
            0.95,
        )
    },
    Gate {
        case: Some(tunnel::VIP_USERSPACE),
        metric: Some(Metric::Latency.name()),
        against: Against::Case(tunnel::PLAIN_USERSPACE),
        bound: Bound::RatioAtMost(1.03),
        source: TWO_NODES,
    },
    Gate {
        case: Some(tunnel::VIP_KERNEL),
        metric: Some(Metric::Latency.name()),
        against: Against::Case(tunnel::PLAIN_KERNEL),
        bound: Bound::MoreAtMost(2.0),
        source: TWO_NODES,
    },
];

/// `bench table`.
pub(crate) const TABLE: &[Gate] = &[
    at_most(table::LOAD, 2_000.0),
    at_most(table::CHANGE, 20.0),
    Gate {
        case: Some(table::WHOLE),
        metric: Some(table::PACKET),
        against: Against::Case(table::ONE),
        bound: Bound::RatioAtMost(1.03),
        source: SCALE,
    },
];

const SCALE: &str = "issue 3, scale";

const fn at_most(metric: &'static str, most: f64) -> Gate {
    Gate {
        case: Some(table::WHOLE),
        metric: Some(metric),
        against: Against::Nothing,
        bound: Bound::AtMost(most),
        source: SCALE,
    }
}

/// `bench control`, where the leads are near each other.
pub(crate) const CONTROL: &[Gate] = &[
    weft(control::WRITES, Against::Nothing, Bound::AtLeast(2_500.0)),
    weft(
        control::WRITES,
        Against::Case(control::ETCD),
        Bound::RatioAtLeast(0.7),
    ),
    weft(control::P99, Against::Nothing, Bound::AtMost(50.0)),
    weft(
        control::LEADER_KILLED,
        Against::Nothing,
        Bound::NeverMore(1_500.0),
    ),
    weft(control::LOST, Against::Nothing, Bound::NeverMore(0.0)),
    DRAINED,
];

/// `bench control`, where they are not.
pub(crate) const CONTROL_FAR: &[Gate] = &[
    weft(
        control::LEADER_KILLED,
        Against::Nothing,
        Bound::NeverMore(4_000.0),
    ),
    weft(control::LOST, Against::Nothing, Bound::NeverMore(0.0)),
    DRAINED,
];

const DRAINED: Gate = weft(
    control::DRAINED_LEASES,
    Against::Nothing,
    Bound::NeverMore(2.0),
);

/// `bench agents`, at its default size.
pub(crate) const AGENTS: &[Gate] = &[
    weft(agents::TOLD_P99, Against::Nothing, Bound::AtMost(300.0)),
    weft(agents::UNCONCERNED, Against::Nothing, Bound::NeverMore(0.0)),
    weft(
        agents::LEADER_RSS,
        Against::Nothing,
        Bound::NeverMore(1_024.0),
    ),
    weft(agents::SERVES, Against::Nothing, Bound::NeverMore(10_000.0)),
];

const fn weft(metric: &'static str, against: Against, bound: Bound) -> Gate {
    Gate {
        case: Some(control::WEFT),
        metric: Some(metric),
        against,
        bound,
        source: "issue 4, done when",
    }
}

/// Every gate whose series were measured, with how it came out.
pub(crate) fn judge(gates: &[Gate], figures: &Figures) -> Vec<Verdict> {
    let judged = |gate: &Gate| -> Vec<Verdict> {
        let series = figures.series().filter(|series| gate.concerns(series));
        series
            .filter_map(|series| gate.judge(figures, series))
            .collect()
    };
    gates.iter().flat_map(judged).collect()
}

impl Gate {
    fn concerns(&self, series: &Series) -> bool {
        let case = match self.case {
            Some(case) => case == series.case,
            None => statistics::is_program(series.case),
        };
        let family = match self.against {
            Against::Case(_) | Against::Nothing => true,
            Against::Ipv4 => series.family == Family::Ipv6,
        };
        case && family && self.metric.is_none_or(|metric| metric == series.metric)
    }

    fn judge(&self, figures: &Figures, own: Series) -> Option<Verdict> {
        let (reference, name) = match self.against {
            Against::Case(case) => (Series { case, ..own }, format!(" by {case}")),
            Against::Ipv4 => {
                let family = Family::Ipv4;
                (Series { family, ..own }, format!(" by {}", family.name()))
            }
            Against::Nothing => (own, String::new()),
        };
        let compare = match self.bound {
            Bound::RatioAtLeast(_) | Bound::RatioAtMost(_) => |own: f64, other: f64| own / other,
            Bound::MoreAtMost(_) => |own: f64, other: f64| own - other,
            Bound::AtLeast(_) | Bound::AtMost(_) | Bound::NeverMore(_) => |own: f64, _| own,
        };
        let value = match self.bound {
            Bound::NeverMore(_) => figures.range(own)?,
            _ => figures.compare(own, reference, compare)?,
        };
        let (bound, passes) = match self.bound {
            Bound::RatioAtLeast(least) => (format!(">= {least:.2}"), value.low >= least),
            Bound::RatioAtMost(most) => (format!("<= {most:.2}"), value.high <= most),
            Bound::MoreAtMost(most) => (format!("+{most:.1} at most"), value.high <= most),
            Bound::AtLeast(least) => (format!(">= {least:.0}"), value.low >= least),
            Bound::AtMost(most) => (format!("<= {most:.0}"), value.high <= most),
            Bound::NeverMore(most) => (format!("always <= {most:.0}"), value.high <= most),
        };
        Some(Verdict {
            gate: format!("{} of {}{name} {bound}", own.metric, own.case),
            family: own.family,
            value,
            passes,
            source: self.source,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(own: (&'static str, f64), other: (&'static str, f64), metric: Metric) -> Figures {
        let mut figures = Figures::default();
        for (case, value) in [own, other] {
            let series = Series {
                metric: metric.name(),
                family: Family::Ipv4,
                case,
            };
            for _ in 0..15 {
                figures.push(series, metric.unit(), value);
            }
        }
        figures
    }

    #[test]
    fn a_gate_passes_at_its_bound_and_is_missed_just_below() {
        for (value, passes) in [(95.0, true), (94.9, false)] {
            let figures = figures(
                (case::VIP, value),
                (case::DIRECT, 100.0),
                Metric::Throughput,
            );
            let verdicts = judge(VIP, &figures);
            assert_eq!(verdicts.len(), 1, "{verdicts:?}");
            assert_eq!(verdicts[0].passes, passes, "{verdicts:?}");
        }
    }

    #[test]
    fn a_latency_is_judged_by_the_kind_of_its_tunnel() {
        let userspace = (tunnel::VIP_USERSPACE, tunnel::PLAIN_USERSPACE);
        let kernel = (tunnel::VIP_KERNEL, tunnel::PLAIN_KERNEL);
        for ((own, plain), value, passes) in [
            (userspace, 103.0, true),
            (userspace, 103.1, false),
            (kernel, 102.0, true),
            (kernel, 102.1, false),
        ] {
            let figures = figures((own, value), (plain, 100.0), Metric::Latency);
            let verdicts = judge(TUNNEL, &figures);
            assert_eq!(verdicts.len(), 1, "{verdicts:?}");
            assert_eq!(verdicts[0].passes, passes, "{own} {value}");
        }
    }

    #[test]
    fn a_gate_without_a_reference_is_judged_by_its_bound() {
        for (value, passes) in [(20.0, true), (20.1, false)] {
            let mut figures = Figures::default();
            let series = Series {
                metric: table::CHANGE,
                family: Family::Ipv4,
                case: table::WHOLE,
            };
            figures.push(series, "ms", value);
            let verdicts = judge(TABLE, &figures);
            assert_eq!(verdicts.len(), 1, "{verdicts:?}");
            assert_eq!(verdicts[0].passes, passes, "{verdicts:?}");
        }
    }

    #[test]
    fn what_must_never_be_more_is_judged_by_its_worst_round() {
        for (worst, passes) in [(1_500.0, true), (1_500.1, false)] {
            let mut figures = Figures::default();
            let series = Series {
                metric: control::LEADER_KILLED,
                family: Family::Ipv4,
                case: control::WEFT,
            };
            for value in [900.0; 15].into_iter().chain([worst]) {
                figures.push(series, "ms", value);
            }
            let verdicts = judge(CONTROL, &figures);
            assert_eq!(verdicts.len(), 1, "{verdicts:?}");
            assert_eq!(verdicts[0].passes, passes, "{verdicts:?}");
        }
    }

    #[test]
    fn changes_are_judged_by_their_number_and_beside_etcd() {
        for (weft, etcd, passes) in [
            (2_500.0, 3_500.0, [true, true]),
            (2_499.0, 3_500.0, [false, true]),
            (2_500.0, 3_600.0, [true, false]),
        ] {
            let mut figures = Figures::default();
            for (case, value) in [(control::WEFT, weft), (control::ETCD, etcd)] {
                let series = Series {
                    metric: control::WRITES,
                    family: Family::Ipv4,
                    case,
                };
                figures.push(series, "1/s", value);
            }
            let verdicts = judge(CONTROL, &figures);
            let passed: Vec<_> = verdicts.iter().map(|verdict| verdict.passes).collect();
            assert_eq!(passed, passes, "{verdicts:?}");
        }
    }

    #[test]
    fn a_gate_without_its_series_says_nothing() {
        assert_eq!(judge(VIP, &Figures::default()), []);
    }

    #[test]
    fn a_program_is_judged_over_ipv6_by_ipv4() {
        let mut figures = Figures::default();
        for (family, ns) in [(Family::Ipv4, 100.0), (Family::Ipv6, 106.0)] {
            let series = Series {
                metric: Metric::Datagrams.name(),
                family,
                case: statistics::PROGRAMS[0],
            };
            figures.push(series, "ns", ns);
        }
        let verdicts = judge(DATAPATH, &figures);
        assert_eq!(verdicts.len(), 1, "{verdicts:?}");
        assert_eq!(
            (verdicts[0].family, verdicts[0].passes),
            (Family::Ipv6, false)
        );
    }
}
