//! Why a packet was not simply forwarded; the index into the `REASONS` per-CPU counter array.

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $code:literal $name:literal;)*) => {
        /// Why a packet was dropped, or answered instead of forwarded.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u32)]
        pub enum Reason { $($(#[$doc])* $variant = $code,)* }

        impl Reason {
            /// Every reason, in the order of its code.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The name in metrics and traces.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

reasons! {
    /// Shorter than its headers say, or a length field that contradicts another.
    Malformed = 0 "malformed";
    /// From a pod, with a source address that is not the pod's.
    SpoofedSource = 1 "spoofed_source";
    /// From a pod, to an address outside the mesh.
    NotMesh = 2 "not_mesh";
    /// To a VIP that this node's table does not hold: the caller has no link or grant.
    NotLinked = 3 "not_linked";
    /// To a VIP on a port that its service does not declare.
    UndeclaredPort = 4 "undeclared_port";
    /// To a VIP that has no backend now.
    NoBackend = 5 "no_backend";
    /// The established-flow table is full.
    FlowTableFull = 6 "flow_table_full";
    /// The endpoint has as many flows as it may.
    FlowQuota = 7 "flow_quota";
    /// No free source port was found for the reverse entry.
    NoSourcePort = 8 "no_source_port";
    /// A flow's backend is gone; the flow is ended.
    BackendGone = 9 "backend_gone";
    /// A TCP segment to a VIP that neither opens a flow nor belongs to one.
    NoFlow = 10 "no_flow";
    /// From a pod straight to an endpoint address, not as an answer: the way to a service is its VIP.
    DirectEndpoint = 11 "direct_endpoint";
    /// To an endpoint address that nobody has.
    NoEndpoint = 12 "no_endpoint";
    /// A protocol other than TCP, UDP and ICMP echo.
    Protocol = 13 "protocol";
    /// An IP fragment that cannot be matched to its flow.
    Fragment = 14 "fragment";
    /// IPv4 options or IPv6 extension headers beyond what the parser walks.
    HeaderChain = 15 "header_chain";
    /// From the tunnel: a source that is not a remote endpoint (a VIP, a local endpoint, outside the mesh).
    TunnelSource = 16 "tunnel_source";
    /// From the tunnel: a destination that is not a local endpoint.
    TunnelDestination = 17 "tunnel_destination";
    /// A map or helper refused what must succeed; a bug or a kernel limit.
    Internal = 18 "internal";
    /// Time to live or hop limit used up.
    HopLimit = 19 "hop_limit";
    /// Larger than the path to the backend carries.
    TooBig = 20 "too_big";
    /// It waits, in its link's queue, until a take-over has moved the flows.
    Held = 21 "held";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_dense_and_names_unique() {
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
            assert_eq!(
                Reason::ALL
                    .iter()
                    .filter(|other| other.name() == reason.name())
                    .count(),
                1
            );
        }
    }
}
