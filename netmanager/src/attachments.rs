//! Who is attached to this node, and which addresses they have.
//!
//! An endpoint's number is never given again, so that its IPv6 address names it for good; an IPv4 address
//! rests [`REST4_MS`] after its release while others are free. The state is one value that is written to disk
//! before an answer leaves ([`store`](crate::store)); what is decided here takes the time as an argument and
//! does no I/O.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
};

use ebpf_common::addr::{Mesh6, NODE_ENDPOINT, Name6};
use ipnet::Ipv4Net;
use netmanager_api::{
    cni::{AttachmentKey, PodRef, Reserve},
    stream::{Endpoint, InstanceRef},
    table::Table,
};
use serde::{Deserialize, Serialize};

use crate::plan::PodEndpoint;

mod mac;

pub use mac::{Mac, MacError};

/// How long a released IPv4 address is left alone while there is another, ms (DESIGN section 3).
pub const REST4_MS: u64 = 10 * 60 * 1_000;

/// 2026-01-01, seconds since 1970.
const EPOCH_S: u64 = 1_767_225_600;

/// One attachment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// Whose it is.
    pub key: AttachmentKey,
    /// The endpoint's number.
    pub number: u32,
    /// Its IPv6 address.
    pub addr6: Ipv6Addr,
    /// Its IPv4 address.
    pub addr4: Option<Ipv4Addr>,
    /// The pod's end's MAC address.
    pub mac: Mac,
    /// The host-side link's MAC address.
    pub host_mac: Mac,
    /// Name of the host-side link.
    pub host_ifname: String,
    /// Index of the host-side link, once it is activated.
    pub host_ifindex: Option<u32>,
    /// The pod's network namespace.
    pub netns: String,
    /// Which pod.
    #[serde(default)]
    pub pod: PodRef,
    /// Which instance.
    pub instance: Option<InstanceRef>,
    /// When it was reserved, ms since the epoch.
    #[serde(default)]
    pub since_ms: u64,
}

/// All attachments and what must be remembered of those that are gone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Attachments {
    /// The highest endpoint number that was ever given; 0 before the first.
    last_number: u32,
    /// The node endpoint's IPv4 address.
    node4: Option<Ipv4Addr>,
    /// By their order of creation.
    attached: Vec<Attachment>,
    /// Released IPv4 addresses and when, ms since the epoch.
    resting4: BTreeMap<Ipv4Addr, u64>,
}

/// Why an attachment was not made or found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// Every IPv4 address of the node's blocks is taken.
    #[error(
        "no free IPv4 address in this node's {blocks} blocks of 32: the leads give another block soon"
    )]
    NoAddress4 {
        /// How many blocks the node has.
        blocks: usize,
    },
    /// Every endpoint number was given once.
    #[error("this node gave out every endpoint number it had: register it anew")]
    NoNumber,
    /// The mesh's prefix in the table is no /48 of fd00::/8.
    #[error("the mesh prefix {0} is not a /48 of fd00::/8")]
    Mesh(ipnet::Ipv6Net),
    /// The MAC address asked for cannot be one.
    #[error(transparent)]
    Mac(#[from] MacError),
    /// Two keys have the same host-side name.
    #[error("the host-side name {name} belongs to container {container}: detach that one first")]
    NameTaken {
        /// The name.
        name: String,
        /// Who has it.
        container: String,
    },
    /// Nobody reserved it.
    #[error(
        "no attachment of container {container}, interface {ifname} in network {network}: it was never reserved, or released"
    )]
    Unknown {
        /// `CNI_CONTAINERID`.
        container: String,
        /// `CNI_IFNAME`.
        ifname: String,
        /// The network's name.
        network: String,
    },
}

impl Attachments {
    /// Every attachment.
    pub fn iter(&self) -> impl Iterator<Item = &Attachment> {
        self.attached.iter()
    }

    /// The attachment of `key`.
    ///
    /// # Errors
    /// When there is none.
    pub fn get(&self, key: &AttachmentKey) -> Result<&Attachment, AttachError> {
        self.attached
            .iter()
            .find(|attachment| attachment.key == *key)
            .ok_or_else(|| unknown(key))
    }

    /// The attachment for `wish`: the one that is there, else a new one.
    ///
    /// # Errors
    /// When there is no number or address left, or the wish cannot be granted.
    pub fn reserve(
        &mut self,
        wish: &Reserve,
        table: &Table,
        now_ms: u64,
    ) -> Result<&Attachment, AttachError> {
        let present = self
            .attached
            .iter()
            .position(|attachment| attachment.key == wish.key);
        if let Some(position) = present {
            return Ok(&self.attached[position]);
        }
        let mesh = mesh_of(table)?;
        let host_ifname = host_ifname(&wish.key);
        if let Some(other) = self
            .attached
            .iter()
            .find(|other| other.host_ifname == host_ifname)
        {
            let container = other.key.container_id.clone();
            return Err(AttachError::NameTaken {
                name: host_ifname,
                container,
            });
        }
        let number = self.last_number.max(NODE_ENDPOINT).checked_add(1);
        let number = number.ok_or(AttachError::NoNumber)?;
        let mac = match &wish.mac {
            Some(text) => text.parse()?,
            None => Mac::derived(table.node.number, number, mac::Side::Pod),
        };
        let addr4 = self.free4(table, now_ms)?;
        let node = table.node.number;
        self.last_number = number;
        if let Some(address) = addr4 {
            self.resting4.remove(&address);
        }
        self.attached.push(Attachment {
            key: wish.key.clone(),
            number,
            addr6: Ipv6Addr::from_bits(mesh.encode(Name6::Endpoint {
                node,
                endpoint: number,
            })),
            addr4,
            mac,
            host_mac: Mac::derived(node, number, mac::Side::Host),
            host_ifname,
            host_ifindex: None,
            netns: wish.netns.clone(),
            pod: wish.pod.clone(),
            instance: wish.instance.clone(),
            since_ms: now_ms,
        });
        Ok(self.attached.last().expect("one was just pushed"))
    }

    /// Notes the host-side link of an attachment.
    ///
    /// # Errors
    /// When nobody reserved it.
    pub fn activate(&mut self, key: &AttachmentKey, ifindex: u32) -> Result<(), AttachError> {
        let attachment = self
            .attached
            .iter_mut()
            .find(|attachment| attachment.key == *key)
            .ok_or_else(|| unknown(key))?;
        attachment.host_ifindex = Some(ifindex);
        Ok(())
    }

    /// Forgets an attachment; its IPv4 address rests from now on.
    pub fn release(&mut self, key: &AttachmentKey, now_ms: u64) -> Option<Attachment> {
        let position = self
            .attached
            .iter()
            .position(|attachment| attachment.key == *key)?;
        let attachment = self.attached.remove(position);
        if let Some(address) = attachment.addr4 {
            self.resting4.insert(address, now_ms);
        }
        Some(attachment)
    }

    /// The keys in `network` that are not in `keep`.
    #[must_use]
    pub fn not_kept(&self, network: &str, keep: &[AttachmentKey]) -> Vec<AttachmentKey> {
        self.attached
            .iter()
            .map(|attachment| &attachment.key)
            .filter(|key| key.network == network && !keep.contains(key))
            .cloned()
            .collect()
    }

    /// The node endpoint's addresses; its IPv4 address stays the same while the node has the block.
    ///
    /// # Errors
    /// When the table's mesh prefix is none.
    pub fn node_addresses(
        &mut self,
        table: &Table,
        now_ms: u64,
    ) -> Result<(Ipv6Addr, Option<Ipv4Addr>), AttachError> {
        let endpoint = Name6::Endpoint {
            node: table.node.number,
            endpoint: NODE_ENDPOINT,
        };
        let addr6 = Ipv6Addr::from_bits(mesh_of(table)?.encode(endpoint));
        let blocks = blocks(table);
        if self
            .node4
            .is_some_and(|own| !blocks.iter().any(|block| block.contains(&own)))
        {
            self.node4 = None;
        }
        if self.node4.is_none() {
            // A node whose pods took every address still answers by IPv6.
            self.node4 = self.free4(table, now_ms).unwrap_or(None);
        }
        Ok((addr6, self.node4))
    }

    /// Never gives numbers up to `number` again: what the kernel or the table still knows, when the state on
    /// disk was lost.
    pub fn raise_numbers(&mut self, number: u32) {
        self.last_number = self.last_number.max(number);
    }

    /// Begins after every number that this node can have given: its state is lost, but it is no new node. There
    /// is one number for each second since 2026, so that a node which attaches fewer than one endpoint a second
    /// never meets an old one.
    pub fn begin_anew(&mut self, now_ms: u64) {
        let seconds = (now_ms / 1_000).saturating_sub(EPOCH_S);
        self.raise_numbers(u32::try_from(seconds).unwrap_or(u32::MAX / 2));
    }

    /// As the kernel should hold the activated ones.
    #[must_use]
    pub fn pods(&self) -> Vec<PodEndpoint> {
        self.attached
            .iter()
            .filter_map(|attachment| {
                Some(PodEndpoint {
                    number: attachment.number,
                    ifindex: attachment.host_ifindex?,
                    mac: attachment.mac.octets(),
                    host_mac: attachment.host_mac.octets(),
                    addr6: attachment.addr6,
                    addr4: attachment.addr4,
                    service: attachment
                        .instance
                        .as_ref()
                        .map(|instance| instance.service.clone()),
                })
            })
            .collect()
    }

    /// As the agent should know the activated ones.
    #[must_use]
    pub fn endpoints(&self) -> Vec<Endpoint> {
        self.attached
            .iter()
            .filter(|attachment| attachment.host_ifindex.is_some())
            .map(|attachment| Endpoint {
                number: attachment.number,
                addr6: attachment.addr6,
                addr4: attachment.addr4,
                instance: attachment.instance.clone(),
            })
            .collect()
    }

    /// A free address of the node's blocks: the first that was never used or rested enough, else the one that
    /// rests the longest. `None` where the node has no block.
    fn free4(&self, table: &Table, now_ms: u64) -> Result<Option<Ipv4Addr>, AttachError> {
        let blocks = blocks(table);
        if blocks.is_empty() {
            return Ok(None);
        }
        let is_taken = |address: &Ipv4Addr| {
            self.node4 == Some(*address)
                || self
                    .attached
                    .iter()
                    .any(|attachment| attachment.addr4 == Some(*address))
        };
        blocks
            .iter()
            .flat_map(|block| u32::from(block.network())..=u32::from(block.broadcast()))
            .map(Ipv4Addr::from)
            // Some stacks take an address ending in .0 or .255 for a network's or a broadcast's.
            .filter(|address| !matches!(address.octets()[3], 0 | 255))
            .filter(|address| !is_taken(address))
            .min_by_key(|address| match self.resting4.get(address) {
                Some(since) if now_ms.saturating_sub(*since) < REST4_MS => *since,
                _ => 0,
            })
            .map(Some)
            .ok_or(AttachError::NoAddress4 {
                blocks: blocks.len(),
            })
    }
}

fn blocks(table: &Table) -> &[Ipv4Net] {
    if table.mesh.prefix4.is_some() {
        &table.node.blocks4
    } else {
        &[]
    }
}

fn mesh_of(table: &Table) -> Result<Mesh6, AttachError> {
    let prefix = table.mesh.prefix6;
    Mesh6::new(prefix.network().to_bits())
        .filter(|_| prefix.prefix_len() == Mesh6::LEN)
        .ok_or(AttachError::Mesh(prefix))
}

fn unknown(key: &AttachmentKey) -> AttachError {
    AttachError::Unknown {
        container: key.container_id.clone(),
        ifname: key.ifname.clone(),
        network: key.network.clone(),
    }
}

/// "wf" and 11 hexadecimal digits, of the same hash that names the attachment elsewhere.
fn host_ifname(key: &AttachmentKey) -> String {
    key.file_name()
        .chars()
        .take(11)
        .fold("wf".to_owned(), |mut name, digit| {
            name.push(digit);
            name
        })
}

#[cfg(test)]
mod tests;
