//! What is exported: every family with its labels, and how they are written.
//!
//! The text is Prometheus' exposition format 0.0.4. Every series has the label `node`. A family has at most
//! [`MAX_SERIES`] series, so that a large mesh cannot flood a scraper; what is left out is counted.

use std::fmt::{Display, Write};

/// How many series a family may have.
pub(super) const MAX_SERIES: usize = 20_000;

/// One family.
#[derive(Clone, Copy, Debug)]
pub(super) struct Family {
    pub(super) name: &'static str,
    pub(super) kind: &'static str,
    /// Its labels besides `node`.
    pub(super) labels: &'static [&'static str],
    pub(super) help: &'static str,
}

macro_rules! families {
    ($($constant:ident: $name:literal $kind:literal [$($label:literal),*] $help:literal;)*) => {
        $(pub(super) const $constant: Family = Family {
            name: $name,
            kind: $kind,
            labels: &[$($label),*],
            help: $help,
        };)*
        /// Every family, in the order in which they are written.
        #[cfg(test)]
        pub(super) const ALL: &[Family] = &[$($constant),*];
    };
}

families! {
    REFUSED: "weft_refused_packets_total" "counter" ["reason"]
        "Packets dropped or answered instead of forwarded, by reason.";
    VIP_PACKETS: "weft_vip_packets_total" "counter" ["service", "policy", "instance", "direction"]
        "Packets that passed, by VIP.";
    VIP_BYTES: "weft_vip_bytes_total" "counter" ["service", "policy", "instance", "direction"]
        "Bytes from the IP header on that passed, by VIP.";
    VIP_FLOWS: "weft_vip_flows_opened_total" "counter" ["service", "policy", "instance"]
        "Flows opened, by VIP.";
    VIP_REFUSED: "weft_vip_refused_packets_total" "counter" ["service", "policy", "instance", "reason"]
        "Packets refused at a VIP that this node knows, by reason.";
    BACKEND_PACKETS: "weft_backend_packets_total" "counter" ["service", "instance", "epoch", "at", "direction"]
        "Packets that passed, by backend; `at` is the backend's node.";
    BACKEND_BYTES: "weft_backend_bytes_total" "counter" ["service", "instance", "epoch", "at", "direction"]
        "Bytes from the IP header on that passed, by backend.";
    BACKEND_FLOWS: "weft_backend_flows_opened_total" "counter" ["service", "instance", "epoch", "at"]
        "Flows opened, by backend.";
    FLOWS: "weft_flows" "gauge" ["map"]
        "Flow entries at the last whole pass, by map; a flow has two.";
    FLOWS_REMOVED: "weft_flows_removed_total" "counter" []
        "Flow entries collected since the NetManager started.";
    MAP_ENTRIES: "weft_map_entries" "gauge" ["map"]
        "How many entries of a map are in use.";
    MAP_LIMIT: "weft_map_entries_limit" "gauge" ["map"]
        "How many entries a map holds.";
    ENDPOINTS: "weft_endpoints" "gauge" []
        "Attached endpoints.";
    VIP_PORTS: "weft_vip_ports" "gauge" []
        "Declared ports and VIPs in the kernel.";
    TABLE_INDEX: "weft_table_index" "gauge" []
        "Log index of the applied table.";
    TABLE_INCARNATION: "weft_table_incarnation" "gauge" []
        "Incarnation of the applied table.";
    TABLE_AGE: "weft_table_age_seconds" "gauge" []
        "Since when there was no newer table; absent before the first one after a start.";
    TABLE_TROUBLE: "weft_table_trouble" "gauge" []
        "1 while the kernel does not match the table.";
    PEERS: "weft_peers" "gauge" ["state"]
        "Nodes that this node's traffic may go to, by whether their probes answer.";
    RTT: "weft_peer_rtt_seconds" "gauge" ["peer"]
        "Smoothed round-trip time through the tunnel.";
    TUNNEL_UP: "weft_tunnel_up" "gauge" []
        "1 while there is a tunnel device.";
    TUNNEL_MTU: "weft_tunnel_mtu_bytes" "gauge" []
        "The largest inner packet that the tunnel device takes.";
    LOG_EVENTS: "weft_flow_log_events_total" "counter" ["fate"]
        "Events of the flow log: written, left out beyond the bound, left out because the ring was full.";
    LEFT_OUT: "weft_series_left_out" "gauge" []
        "Series that were left out of this answer because their family has too many.";
}

/// A text in the making.
pub(super) struct Text {
    out: String,
    node: String,
    left_out: usize,
}

impl Text {
    /// An empty one, of a node's.
    pub(super) fn of(node: &str) -> Self {
        Self {
            out: String::new(),
            node: escaped(node),
            left_out: 0,
        }
    }

    /// Writes a family: the values of its labels in their order, and the value.
    pub(super) fn family<const N: usize, V: Display>(
        &mut self,
        family: &Family,
        series: impl IntoIterator<Item = ([String; N], V)>,
    ) {
        debug_assert_eq!(N, family.labels.len(), "{}", family.name);
        let Family {
            name, kind, help, ..
        } = family;
        // Writing to a string cannot fail.
        let _ = writeln!(self.out, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (number, (labels, value)) in series.into_iter().enumerate() {
            if number >= MAX_SERIES {
                self.left_out += 1;
                continue;
            }
            let _ = write!(self.out, "{name}{{node=\"{}\"", self.node);
            for (label, value) in family.labels.iter().zip(&labels) {
                let _ = write!(self.out, ",{label}=\"{}\"", escaped(value));
            }
            let _ = writeln!(self.out, "}} {value}");
        }
    }

    /// Writes a family of one series.
    pub(super) fn single(&mut self, family: &Family, value: impl Display) {
        self.family(family, [([], value)]);
    }

    /// The whole text.
    pub(super) fn end(mut self) -> String {
        let left_out = self.left_out;
        self.single(&LEFT_OUT, left_out);
        self.out
    }
}

/// A label's value as it is written between quotes.
fn escaped(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for c in value.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_is_cut_where_it_would_flood_and_says_so() {
        let mut text = Text::of("n\"1");
        let series = (0..MAX_SERIES + 3).map(|n| ([n.to_string()], 1));
        text.family(&REFUSED, series);
        let text = text.end();
        let lines = text.lines().filter(|line| line.starts_with(REFUSED.name));
        assert_eq!(lines.count(), MAX_SERIES);
        assert!(
            text.contains("weft_series_left_out{node=\"n\\\"1\"} 3\n"),
            "{}",
            &text[text.len() - 99..]
        );
    }
}
