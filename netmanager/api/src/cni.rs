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
//!    | sets the host-side link up  | (it stays down until the programs are attached, so nothing leaves in clear)
//! ```
//!
//! Both ends of the pair carry [`AttachmentKey::mark`] as their link group from the instant they exist, so
//! that what a killed plugin left is recognised without any state.
//!
//! A release that finds nobody at the door is queued: one file per attachment in [`pending_dir`], named
//! [`AttachmentKey::file_name`], its content the line of a [`Request::Release`]. The NetManager carries them
//! out when it starts and then removes each file; a name that starts with a dot is a file being written.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

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

impl AttachmentKey {
    /// The link group (`IFLA_GROUP`) of both ends of the attachment's veth pair; never a small number, which
    /// people give to groups of their own.
    #[must_use]
    pub fn mark(&self) -> u32 {
        let hash = self.hash64();
        ((hash >> 32) ^ (hash & 0xffff_ffff)) as u32 | 1 << 31
    }

    /// Name of the file that queues the attachment's release.
    #[must_use]
    pub fn file_name(&self) -> String {
        format!("{:016x}.json", self.hash64())
    }

    /// FNV-1a over the three names, a zero byte after each (no name holds one).
    fn hash64(&self) -> u64 {
        [&self.network, &self.container_id, &self.ifname]
            .into_iter()
            .flat_map(|name| name.bytes().chain([0]))
            .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            })
    }
}

/// Where releases wait that found nobody at the door `socket`.
#[must_use]
pub fn pending_dir(socket: &Path) -> PathBuf {
    socket.with_file_name("cni-pending")
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

#[cfg(test)]
mod tests {
    use super::*;

    fn key(network: &str, container_id: &str, ifname: &str) -> AttachmentKey {
        AttachmentKey {
            network: network.into(),
            container_id: container_id.into(),
            ifname: ifname.into(),
        }
    }

    #[test]
    fn an_attachment_keeps_its_mark_and_file_name_across_versions() {
        let key = key("weft", "c1", "net1");
        assert_eq!(key.file_name(), "d93fba428b3e00bb.json");
        assert_eq!(key.mark(), 0xd201_baf9);
    }

    #[test]
    fn names_that_run_together_alike_are_different_attachments() {
        assert_ne!(key("ab", "c", "d").mark(), key("a", "bc", "d").mark());
        assert_ne!(
            key("a", "b", "cd").file_name(),
            key("a", "bc", "d").file_name()
        );
    }

    #[test]
    fn releases_wait_beside_the_socket() {
        assert_eq!(
            pending_dir(Path::new(DEFAULT_SOCKET)),
            Path::new("/run/weft/cni-pending")
        );
    }
}
