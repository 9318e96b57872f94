//! From what was counted and is known to the text of one scrape.

use std::{collections::BTreeMap, time::Duration};

use ebpf_common::{
    layout::{Count, FLOW_FORWARD, FLOW_REVERSE, RefusedKey},
    reason::Reason,
};

use super::{
    Gauges,
    families::{self, Family, Text},
};
use crate::{
    datapath::LogCounts,
    observe::{BackendName, Names, VipName},
};

/// What the programs counted, at one moment.
#[derive(Clone, Debug, Default)]
pub(super) struct Reading {
    pub(super) reasons: Vec<(Reason, u64)>,
    pub(super) vips: Vec<(u32, Count)>,
    pub(super) backends: Vec<(u32, Count)>,
    pub(super) refused: Vec<(RefusedKey, u64)>,
    pub(super) log: LogCounts,
}

/// The names of the two directions: from the client to the backend, and back.
const DIRECTIONS: [(u8, &str); 2] = [(FLOW_FORWARD, "request"), (FLOW_REVERSE, "answer")];

/// The text. `now` is on the kernel's monotonic clock.
pub(super) fn render(names: &Names, gauges: &Gauges, reading: &Reading, now: Duration) -> String {
    let mut text = Text::of(&names.node);
    let reasons = reading.reasons.iter();
    text.family(
        &families::REFUSED,
        reasons.map(|(reason, count)| ([reason.name().to_owned()], count)),
    );
    vips(&mut text, names, reading);
    backends(&mut text, names, reading);
    by_map(&mut text, &families::FLOWS, &gauges.flows);
    text.single(&families::FLOWS_REMOVED, gauges.flows_removed);
    by_map(&mut text, &families::MAP_ENTRIES, &gauges.map_entries);
    by_map(&mut text, &families::MAP_LIMIT, &gauges.map_sizes);
    text.single(&families::ENDPOINTS, gauges.endpoints);
    text.single(&families::VIP_PORTS, gauges.vips);
    text.single(&families::TABLE_INDEX, gauges.applied.index);
    text.single(&families::TABLE_INCARNATION, gauges.applied.incarnation);
    let age = gauges.table_since.map(|since| now.saturating_sub(since));
    text.family(&families::TABLE_AGE, age.map(|age| ([], age.as_secs_f64())));
    text.single(&families::TABLE_TROUBLE, u8::from(gauges.has_trouble));
    let unreachable = gauges.unreachable.min(names.peers.len());
    let peers = [
        ("answers", names.peers.len() - unreachable),
        ("silent", unreachable),
    ];
    text.family(
        &families::PEERS,
        peers.map(|(state, count)| ([state.to_owned()], count)),
    );
    let rtts = gauges.rtt_us.iter().filter_map(|(node, rtt_us)| {
        let peer = names.peers.get(node)?;
        Some(([peer.clone()], f64::from(*rtt_us) / 1e6))
    });
    text.family(&families::RTT, rtts);
    text.single(&families::TUNNEL_UP, u8::from(gauges.tunnel_mtu > 0));
    text.single(&families::TUNNEL_MTU, gauges.tunnel_mtu);
    let log = &reading.log;
    let fates = [
        ("written", log.written),
        ("limited", log.limited),
        ("full", log.full),
    ];
    text.family(
        &families::LOG_EVENTS,
        fates.map(|(fate, count)| ([fate.to_owned()], count)),
    );
    text.end()
}

fn by_map<V: Copy + Into<u64>>(
    text: &mut Text,
    family: &Family,
    values: &BTreeMap<&'static str, V>,
) {
    let series = values.iter();
    text.family(
        family,
        series.map(|(map, value)| ([(*map).to_owned()], (*value).into())),
    );
}

fn vips(text: &mut Text, names: &Names, reading: &Reading) {
    let known = || {
        reading
            .vips
            .iter()
            .filter_map(|(counter, count)| Some((names.vips.get(counter)?, count)))
    };
    type Values = fn(&Count) -> [u64; 2];
    let both: [(&Family, Values); 2] = [
        (&families::VIP_PACKETS, |count| count.packets),
        (&families::VIP_BYTES, |count| count.bytes),
    ];
    for (family, values) in both {
        text.family(
            family,
            known().flat_map(|(vip, count)| {
                DIRECTIONS.map(|(direction, name)| {
                    let [service, policy, instance] = vip_labels(vip);
                    let value = values(count)[usize::from(direction)];
                    ([service, policy, instance, name.to_owned()], value)
                })
            }),
        );
    }
    text.family(
        &families::VIP_FLOWS,
        known().map(|(vip, count)| (vip_labels(vip), count.flows)),
    );
    let refused = reading.refused.iter().filter_map(|(key, count)| {
        let [service, policy, instance] = vip_labels(names.vips.get(&key.counter)?);
        let reason = Reason::ALL.get(key.reason as usize)?;
        Some(([service, policy, instance, reason.name().to_owned()], count))
    });
    text.family(&families::VIP_REFUSED, refused);
}

fn backends(text: &mut Text, names: &Names, reading: &Reading) {
    let known = || {
        reading
            .backends
            .iter()
            .filter_map(|(index, count)| Some((names.backends.get(index)?, count)))
    };
    type Values = fn(&Count) -> [u64; 2];
    let both: [(&Family, Values); 2] = [
        (&families::BACKEND_PACKETS, |count| count.packets),
        (&families::BACKEND_BYTES, |count| count.bytes),
    ];
    for (family, values) in both {
        text.family(
            family,
            known().flat_map(|(backend, count)| {
                DIRECTIONS.map(|(direction, name)| {
                    let [service, instance, epoch, at] = backend_labels(backend);
                    let value = values(count)[usize::from(direction)];
                    ([service, instance, epoch, at, name.to_owned()], value)
                })
            }),
        );
    }
    text.family(
        &families::BACKEND_FLOWS,
        known().map(|(backend, count)| (backend_labels(backend), count.flows)),
    );
}

fn vip_labels(vip: &VipName) -> [String; 3] {
    [
        vip.service.to_string(),
        vip.policy.to_owned(),
        vip.instance.map(|n| n.to_string()).unwrap_or_default(),
    ]
}

fn backend_labels(backend: &BackendName) -> [String; 4] {
    [
        backend.service.to_string(),
        backend.instance.to_string(),
        backend.epoch.to_string(),
        backend.node.to_string(),
    ]
}
