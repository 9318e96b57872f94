//! What the numbers of the kernel's maps stand for.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use ebpf_common::layout::{Addr, PROTO_ICMP6, VIP_ITSELF_PORT, VipKey};
use netmanager_api::table::Table;

use super::told::ip;
use crate::{
    attachments::{Attachment, Attachments},
    plan::KernelState,
};

/// The name of the node endpoint.
pub const NODE: &str = "node";

/// Names by number, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// This node, within its cluster.
    pub node: String,
    /// `namespace/name` of this node's pods by their addresses; the node endpoint is [`NODE`].
    pub pods: BTreeMap<IpAddr, String>,
    /// VIPs by their element of `VIP_COUNTS`.
    pub vips: BTreeMap<u32, VipName>,
    /// Backends by their index.
    pub backends: BTreeMap<u32, BackendName>,
    /// `cluster/node` of the peers by their number.
    pub peers: BTreeMap<u32, String>,
}

/// A VIP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VipName {
    /// `namespace/application/service`.
    pub service: Arc<str>,
    /// The policy's name.
    pub policy: &'static str,
    /// The instance's number for policy `instance`.
    pub instance: Option<u32>,
}

/// A backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendName {
    /// `namespace/application/service`.
    pub service: Arc<str>,
    /// The slot's number.
    pub instance: u32,
    /// The binding's epoch.
    pub epoch: u64,
    /// The number of its node.
    pub node: u32,
}

impl Names {
    /// The names of what stands in `state`, by `table` and `attachments`.
    #[must_use]
    pub fn of(node: &str, table: &Table, state: &KernelState, attachments: &Attachments) -> Self {
        let indexes: BTreeMap<Addr, u32> = state
            .backends
            .iter()
            .filter(|(_, backend)| backend.flags != 0)
            .map(|(index, backend)| (backend.addr6, *index))
            .collect();
        let mut names = Self {
            node: node.to_owned(),
            peers: table
                .peers
                .iter()
                .map(|peer| (peer.number, peer.name.clone()))
                .collect(),
            ..Self::default()
        };
        for attachment in attachments.iter() {
            let name = pod_name(attachment);
            if let Some(addr4) = attachment.addr4 {
                names.pods.insert(addr4.into(), name.clone());
            }
            names.pods.insert(attachment.addr6.into(), name);
        }
        let own = state.config.iter();
        for address in own.flat_map(|config| [config.node4, config.node6]) {
            if address != Addr::default() {
                names.pods.insert(ip(&address), NODE.to_owned());
            }
        }
        for service in &table.services {
            let name: Arc<str> = service.name.as_str().into();
            for vip in &service.vips {
                let key = VipKey {
                    addr: Addr::from_v6(vip.addr6.to_bits()),
                    port_be: VIP_ITSELF_PORT,
                    proto: PROTO_ICMP6,
                    pad: 0,
                };
                // Element 0 is shared by those that have none of their own.
                if let Some(entry) = state.vips.get(&key).filter(|entry| entry.counter != 0) {
                    let vip = VipName {
                        service: name.clone(),
                        policy: vip.policy.0.name(),
                        instance: vip.instance,
                    };
                    names.vips.insert(entry.counter, vip);
                }
            }
            for backend in &service.backends {
                let address = Addr::from_v6(backend.addr6.to_bits());
                if let Some(index) = indexes.get(&address) {
                    let backend = BackendName {
                        service: name.clone(),
                        instance: backend.instance,
                        epoch: backend.epoch,
                        node: backend.node,
                    };
                    names.backends.insert(*index, backend);
                }
            }
        }
        names
    }
}

/// As `kubectl` writes it; a process that is no pod is named by its container.
pub(crate) fn pod_name(attachment: &Attachment) -> String {
    let pod = &attachment.pod;
    match (pod.namespace.as_str(), pod.name.as_str()) {
        ("", "") => attachment.key.container_id.clone(),
        ("", name) => name.to_owned(),
        (namespace, name) => format!("{namespace}/{name}"),
    }
}
