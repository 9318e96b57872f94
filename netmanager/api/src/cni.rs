//! The CNI door: what `weft-cni` asks of its node's NetManager.
//!
//! One connection carries one request and one reply, each one line of JSON. Only root may knock (the
//! NetManager checks the peer's credentials). An attachment is made in two steps, so that a plugin that dies
//! between them leaves a reservation that garbage collection finds and nothing that carries traffic:
//!
//! ```text
//!  plugin                       NetManager
//!    | reserve(key, netns, ...) -> | gives addresses, names, MTU; idempotent per key
//!    | makes the veth pair, wires the pod's end
//!    | activate(key, ifindex)   -> | attaches the programs, publishes the endpoint
//! ```

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::stream::InstanceRef;

/// The socket's usual place.
pub const DEFAULT_SOCKET: &str = "/run/weft/cni.sock";
/// The longest line either side accepts, bytes.
pub const MAX_LINE: usize = 1 << 20;

/// One attachment, as the runtime names it (CNI spec 1.1, section 2: network, container and interface).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AttachmentKey {
    /// `name` of the network configuration.
    pub network: String,
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_IFNAME`, or the plugin's own interface when it is chained.
    pub ifname: String,
}

/// Who is being attached, as far as the runtime says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodRef {
    /// `K8S_POD_NAMESPACE`.
    pub namespace: String,
    /// `K8S_POD_NAME`.
    pub name: String,
    /// `K8S_POD_UID`.
    pub uid: String,
}

/// What the plugin asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Gives the attachment its addresses; the same answer when asked again with the same key.
    Reserve(Reserve),
    /// The pod's end is wired: attach the programs and publish the endpoint.
    Activate {
        /// The attachment.
        key: AttachmentKey,
        /// Index of the host-side link, in the NetManager's network namespace.
        host_ifindex: u32,
    },
    /// Forgets the attachment; succeeds when there is none.
    Release {
        /// The attachment.
        key: AttachmentKey,
    },
    /// Says whether the attachment is published and its programs are attached.
    Check {
        /// The attachment.
        key: AttachmentKey,
    },
    /// Releases every attachment of `network` that is not in `keep`.
    Gc {
        /// `name` of the network configuration.
        network: String,
        /// `cni.dev/valid-attachments`.
        keep: Vec<AttachmentKey>,
    },
    /// Says whether ADD would succeed now.
    Status,
}

/// A wish for an attachment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reserve {
    /// The attachment.
    pub key: AttachmentKey,
    /// `CNI_NETNS`, an absolute path.
    pub netns: String,
    /// Who is being attached.
    #[serde(default)]
    pub pod: PodRef,
    /// Which instance of a service this is; `None` is a client that no service counts on.
    #[serde(default)]
    pub instance: Option<InstanceRef>,
    /// A MAC address asked for (`runtimeConfig.mac` or `CNI_ARGS` `MAC`).
    #[serde(default)]
    pub mac: Option<String>,
}

/// How the plugin must wire the pod's end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reserved {
    /// The endpoint's number on this node.
    pub endpoint: u32,
    /// Name of the host-side link, unique on the node.
    pub host_ifname: String,
    /// The pod's end's MAC address.
    pub mac: String,
    /// The host-side link's MAC address, the permanent neighbour of both gateways.
    pub host_mac: String,
    /// Its IPv6 address, to be set as /128 without DAD.
    pub addr6: Ipv6Addr,
    /// Its IPv4 address, to be set as /32; `None` where the mesh has no IPv4.
    pub addr4: Option<Ipv4Addr>,
    /// The node endpoint's IPv6 address.
    pub gateway6: Ipv6Addr,
    /// The node endpoint's IPv4 address.
    pub gateway4: Option<Ipv4Addr>,
    /// The mesh's prefixes, to be routed on-link through the gateway with the address as source.
    pub mesh6: ipnet::Ipv6Net,
    /// `None` where the mesh has no IPv4.
    pub mesh4: Option<ipnet::Ipv4Net>,
    /// The pod's MTU, bytes.
    pub mtu: u32,
}

/// What the NetManager answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "snake_case")]
pub enum Reply {
    /// To [`Request::Reserve`].
    Reserved(Reserved),
    /// To the other requests, when done.
    Done,
    /// To any request, when refused.
    Refused(Refused),
}

/// Why a request was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    /// The CNI error code that the plugin should answer (CNI spec 1.1, section 5 "Error").
    pub code: u32,
    /// What is wrong and the way out, lower case, no full stop.
    pub message: String,
}
