//! The agent stream: what a node and its agent say to each other.
//!
//! The node dials its agent and both talk on one bidirectional stream. The first message of the node is
//! [`Hello`]; the agent answers with the node's table as soon as the leads gave it a number, and with each
//! newer one. Every list is complete (a node that was away needs no history), every message may come again.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use serde::{Deserialize, Serialize};

use crate::{
    conditions::{Conditions, Coordinate},
    table::{Revision, Table},
};

/// Which instance of which service, in which life.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct InstanceRef {
    /// `namespace/application/service`.
    pub service: String,
    /// The slot's number.
    pub instance: u32,
    /// The binding's epoch.
    pub epoch: u64,
}

/// What a node says. Tagged from outside: an inner tag would make serde read the numbers that are keys as text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromNode {
    /// The first message.
    Hello(Hello),
    /// All endpoints, whenever one changed.
    Endpoints {
        /// Every attached interface but the node endpoint.
        endpoints: Vec<Endpoint>,
    },
    /// The kernel now matches the table of this revision.
    Applied {
        /// The table's revision.
        revision: Revision,
    },
    /// Measurements, every second or on a change.
    Measured(Measured),
}

/// Who a node is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The node's name within its cluster; must be the one in its certificate.
    pub node: String,
    /// The tunnel's public key, base64.
    pub public_key: String,
    /// The tunnel's UDP port.
    pub tunnel_port: u16,
    /// Addresses by which other nodes may reach the tunnel, best first.
    pub underlay: Vec<IpAddr>,
    /// The table that the kernel matches now, if any.
    pub applied: Option<Revision>,
    /// Version of the NetManager.
    pub version: String,
}

/// One attached interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Its number on the node.
    pub number: u32,
    /// Its IPv6 address.
    pub addr6: Ipv6Addr,
    /// Its IPv4 address.
    pub addr4: Option<Ipv4Addr>,
    /// The instance behind it; `None` is a mere client.
    pub instance: Option<InstanceRef>,
}

/// What a node measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Measured {
    /// Smoothed round-trip time through the tunnel to each probed peer that answers, by node number, microseconds.
    pub rtt_us: BTreeMap<u32, u32>,
    /// Peers whose last three probes failed, by node number.
    pub unreachable: Vec<u32>,
    /// Probing backends that took a TCP connection (UDP-only services: answered an echo) through the network.
    pub reached: Vec<InstanceRef>,
    /// Established flows from this node's endpoints to each draining backend.
    pub draining_flows: Vec<DrainingFlows>,
    /// Where the node is in the network; `None` before enough peers answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub coordinate: Option<Coordinate>,
}

/// Flows that a draining backend still has from one node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainingFlows {
    /// The backend.
    pub instance: InstanceRef,
    /// How many flows.
    pub flows: u64,
}

/// What an agent says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum ToNode {
    /// A newer table.
    Table(Box<Table>),
    /// Load and coordinates of what the table names, complete.
    Conditions(Conditions),
}

#[cfg(feature = "stream")]
#[allow(
    clippy::all,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    unreachable_pub,
    unused_qualifications,
    reason = "generated"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/weft.node.v1.NodeDoor.rs"));
}
#[cfg(feature = "stream")]
pub use generated::{node_door_client::NodeDoorClient, node_door_server};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conditions::{BackendLoad, NodePlace};

    #[test]
    fn every_message_of_an_agent_reads_back() {
        let conditions = Conditions {
            nodes: vec![NodePlace {
                node: 7,
                coordinate: Coordinate {
                    at_us: [1, -2, 3],
                    height_us: 4,
                    error_permille: 1000,
                },
            }],
            loads: vec![BackendLoad {
                addr6: Ipv6Addr::LOCALHOST,
                percent: 95,
            }],
        };
        let message = ToNode::Conditions(conditions);
        let text = serde_json::to_string(&message).unwrap();
        assert_eq!(
            serde_json::from_str::<ToNode>(&text).unwrap(),
            message,
            "{text}"
        );
    }

    #[test]
    fn every_message_of_a_node_reads_back() {
        let instance = InstanceRef {
            service: "shop/bookinfo/reviews-v1".to_owned(),
            instance: 0,
            epoch: 4,
        };
        let measured = Measured {
            rtt_us: BTreeMap::from([(2, 20_000)]),
            unreachable: vec![3],
            reached: vec![instance.clone()],
            draining_flows: vec![DrainingFlows { instance, flows: 5 }],
            coordinate: Some(Coordinate {
                at_us: [-1, 0, 70_000],
                height_us: 300,
                error_permille: 120,
            }),
        };
        let applied = FromNode::Applied {
            revision: Revision {
                incarnation: 1,
                index: 41,
            },
        };
        for message in [FromNode::Measured(measured), applied] {
            let text = serde_json::to_string(&message).unwrap();
            assert_eq!(
                serde_json::from_str::<FromNode>(&text).unwrap(),
                message,
                "{text}"
            );
        }
    }
}
