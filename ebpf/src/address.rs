//! What an address of a packet names, by the tested codec of `ebpf_common::addr`.

use ebpf_common::{
    addr::{Mesh4, Mesh6, Name4, Name6, Policy},
    layout::{Addr, Config},
};

use crate::parse::Family;

/// What an address names.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Name {
    /// A semantic service IP.
    Vip(Policy),
    /// An endpoint; on this node where the address says so (an IPv4 address does not say).
    Endpoint { here: bool },
    /// Nothing of this mesh.
    Foreign,
}

/// What `address` names in this mesh.
#[inline(always)]
pub(crate) fn name(config: &Config, family: Family, address: &Addr) -> Name {
    match family {
        Family::V4 => name4(config, u32::from_be(address.v4_be())),
        Family::V6 => name6(config, address.to_bits()),
    }
}

#[inline(always)]
fn name4(config: &Config, address: u32) -> Name {
    let base = u32::from_be(config.mesh4.v4_be());
    match Mesh4::new(base, config.mesh4_len as u8).and_then(|mesh| mesh.decode(address)) {
        Some(Name4::Vip { policy, .. }) => Name::Vip(policy),
        Some(Name4::Endpoint { .. }) => Name::Endpoint { here: false },
        None => Name::Foreign,
    }
}

#[inline(always)]
fn name6(config: &Config, address: u128) -> Name {
    match Mesh6::new(config.mesh6.to_bits()).and_then(|mesh| mesh.decode(address)) {
        Some(Name6::Vip { policy, .. }) => Name::Vip(policy),
        Some(Name6::Endpoint { node, .. }) => Name::Endpoint {
            here: node == config.node,
        },
        None => Name::Foreign,
    }
}
