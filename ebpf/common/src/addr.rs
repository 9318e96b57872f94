//! Semantic service addresses: an address that says how it wants to be reached.
//!
//! ```text
//! IPv6 | 48: mesh prefix | 4: kind | 4: policy | 8: zero | 32: node or service | 32: endpoint or instance |
//!        kind 0 = endpoint (node number, endpoint number)
//!        kind 1 = VIP      (service number, instance number or 0)
//!
//! IPv4 | base /12..=/16 | 1: VIP? | endpoints: the rest is one flat space, given out in /27 blocks
//!                                 | VIPs: 3 bits policy code, the rest is the number
//!        with 10.16.0.0/12: endpoints 10.16.0.0/13, VIPs 10.24+code.n.n
//! ```
//!
//! Integers are in host byte order: an IPv4 address is a `u32`, an IPv6 address a `u128`, most significant
//! octet first. The invariant: `decode(encode(x)) == x`, and `encode(decode(a)) == a` for each address that
//! decodes. What an address does not say (which service a number belongs to) is not known here.

/// How a VIP picks a backend; the code stands in the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Policy {
    /// Equal shares over all healthy backends.
    Balanced = 0,
    /// The nearest healthy backends by measured round-trip time.
    Closest = 1,
    /// Weights from reported load.
    LeastLoaded = 2,
    /// Weights from the carbon intensity of the backend's cluster.
    Greenest = 3,
    /// One source keeps one backend (Maglev).
    Sticky = 4,
    /// That instance and no other.
    Instance = 7,
}

impl Policy {
    /// Every policy, in the order of its code.
    pub const ALL: [Self; 6] = [
        Self::Balanced,
        Self::Closest,
        Self::LeastLoaded,
        Self::Greenest,
        Self::Sticky,
        Self::Instance,
    ];

    /// The code as it stands in addresses and maps.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// The policy of a code; `None` for the reserved codes 5 and 6 and all above 7.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::Balanced,
            1 => Self::Closest,
            2 => Self::LeastLoaded,
            3 => Self::Greenest,
            4 => Self::Sticky,
            7 => Self::Instance,
            _ => return None,
        })
    }

    /// The name that users write: `balanced`, `closest`, `least_loaded`, `greenest`, `sticky`, `instance`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Balanced => "balanced",
            Self::Closest => "closest",
            Self::LeastLoaded => "least_loaded",
            Self::Greenest => "greenest",
            Self::Sticky => "sticky",
            Self::Instance => "instance",
        }
    }

    /// The policy of a user's word; the inverse of [`Policy::name`].
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.name() == name)
    }
}

/// What an address of the mesh's IPv6 space names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Name6 {
    /// An attached interface on a node.
    Endpoint {
        /// The node's number, given through the log.
        node: u32,
        /// The endpoint's number on that node; 1 is the node endpoint.
        endpoint: u32,
    },
    /// A semantic service IP.
    Vip {
        /// How it picks a backend.
        policy: Policy,
        /// The service's number.
        service: u32,
        /// The instance's number for [`Policy::Instance`], else 0.
        instance: u32,
    },
}

/// A mesh's IPv6 space: a /48 of RFC 4193 (`fd00::/8`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mesh6(u128);

/// The endpoint number of every node's own endpoint.
pub const NODE_ENDPOINT: u32 = 1;
/// UDP port at which every node endpoint answers its peers' echoes (the letters of Weft on a telephone).
pub const ECHO_PORT: u16 = 9338;

impl Mesh6 {
    /// The prefix length of a mesh.
    pub const LEN: u8 = 48;
    /// The prefix length of one node's endpoints (kind, policy, zero and node number are fixed).
    pub const NODE_LEN: u8 = 96;
    const MASK: u128 = !0 << 80;

    /// The mesh whose first address is `base`; `None` unless `base` is in `fd00::/8` and its low 80 bits are zero.
    #[must_use]
    pub const fn new(base: u128) -> Option<Self> {
        if base & !Self::MASK == 0 && base >> 120 == 0xfd {
            Some(Self(base))
        } else {
            None
        }
    }

    /// The first address of the /48.
    #[must_use]
    pub const fn base(self) -> u128 {
        self.0
    }

    /// Whether `address` lies in this /48.
    #[must_use]
    pub const fn contains(self, address: u128) -> bool {
        address & Self::MASK == self.0
    }

    /// The address of `name`.
    #[must_use]
    pub const fn encode(self, name: Name6) -> u128 {
        match name {
            Name6::Endpoint { node, endpoint } => {
                self.0 | ((node as u128) << 32) | endpoint as u128
            }
            Name6::Vip {
                policy,
                service,
                instance,
            } => {
                self.0
                    | (1 << 76)
                    | ((policy.code() as u128) << 72)
                    | ((service as u128) << 32)
                    | instance as u128
            }
        }
    }

    /// What `address` names; `None` outside the mesh, and for kinds, policies and zero bits not in use.
    #[must_use]
    pub const fn decode(self, address: u128) -> Option<Name6> {
        if !self.contains(address) || (address >> 64) & 0xff != 0 {
            return None;
        }
        let high = ((address >> 32) & 0xffff_ffff) as u32;
        let low = (address & 0xffff_ffff) as u32;
        let policy = ((address >> 72) & 0xf) as u8;
        match (address >> 76) & 0xf {
            0 if policy == 0 => Some(Name6::Endpoint {
                node: high,
                endpoint: low,
            }),
            1 => match Policy::from_code(policy) {
                Some(Policy::Instance) => Some(Name6::Vip {
                    policy: Policy::Instance,
                    service: high,
                    instance: low,
                }),
                Some(policy) if low == 0 => Some(Name6::Vip {
                    policy,
                    service: high,
                    instance: 0,
                }),
                _ => None,
            },
            _ => None,
        }
    }

    /// The first address of a node's endpoints, a prefix of [`Mesh6::NODE_LEN`] bits.
    #[must_use]
    pub const fn node_base(self, node: u32) -> u128 {
        self.encode(Name6::Endpoint { node, endpoint: 0 })
    }
}

/// What an address of the mesh's IPv4 space names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Name4 {
    /// An endpoint: its offset in the endpoint half.
    Endpoint {
        /// Offset from the first endpoint address; the /27 block's number is `offset >> 5`.
        offset: u32,
    },
    /// A semantic service IP.
    Vip {
        /// How it picks a backend.
        policy: Policy,
        /// The number in that policy's space: a service's, or for [`Policy::Instance`] one of its own space.
        number: u32,
    },
}

/// A mesh's IPv4 space: a /12 to /16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mesh4 {
    base: u32,
    len: u8,
}

/// The prefix length of the IPv4 blocks that nodes are given.
pub const BLOCK4_LEN: u8 = 27;
/// Addresses in one IPv4 block.
pub const BLOCK4_SIZE: u32 = 1 << (32 - BLOCK4_LEN);

impl Mesh4 {
    /// The mesh space `base/len`; `None` unless `len` is 12 to 16 and no bit of `base` is set below it.
    #[must_use]
    pub const fn new(base: u32, len: u8) -> Option<Self> {
        if len < 12 || len > 16 || base & (u32::MAX >> len) != 0 {
            return None;
        }
        Some(Self { base, len })
    }

    /// The first address.
    #[must_use]
    pub const fn base(self) -> u32 {
        self.base
    }

    /// The prefix length, 12 to 16.
    #[must_use]
    pub const fn prefix_len(self) -> u8 {
        self.len
    }

    /// Bits of a VIP's number: 16 for a /12, 12 for a /16.
    #[must_use]
    pub const fn number_bits(self) -> u8 {
        28 - self.len
    }

    /// How many /27 blocks the endpoint half holds.
    #[must_use]
    pub const fn blocks(self) -> u32 {
        1 << (BLOCK4_LEN - self.len - 1)
    }

    /// The first address of a /27 block; `None` past the last block.
    #[must_use]
    pub const fn block_base(self, block: u32) -> Option<u32> {
        if block < self.blocks() {
            Some(self.base + block * BLOCK4_SIZE)
        } else {
            None
        }
    }

    /// Whether `address` lies in the space.
    #[must_use]
    pub const fn contains(self, address: u32) -> bool {
        (address ^ self.base) & !(u32::MAX >> self.len) == 0
    }

    /// The address of `name`; `None` where the number does not fit.
    #[must_use]
    pub const fn encode(self, name: Name4) -> Option<u32> {
        let half = 1 << (31 - self.len);
        match name {
            Name4::Endpoint { offset } if offset < half => Some(self.base + offset),
            Name4::Vip { policy, number } if number >> self.number_bits() == 0 => {
                Some(self.base + half + ((policy.code() as u32) << self.number_bits()) + number)
            }
            _ => None,
        }
    }

    /// What `address` names; `None` outside the space and for reserved policy codes.
    #[must_use]
    pub const fn decode(self, address: u32) -> Option<Name4> {
        if !self.contains(address) {
            return None;
        }
        let half = 1 << (31 - self.len);
        let offset = address - self.base;
        if offset < half {
            return Some(Name4::Endpoint { offset });
        }
        let vip = offset - half;
        match Policy::from_code((vip >> self.number_bits()) as u8) {
            Some(policy) => Some(Name4::Vip {
                policy,
                number: vip & ((1 << self.number_bits()) - 1),
            }),
            None => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MESH6: Mesh6 = Mesh6(0xfd12_3456_789a << 80);

    fn octets(address: u32) -> [u8; 4] {
        address.to_be_bytes()
    }

    #[test]
    fn the_second_octet_of_a_vip_is_24_plus_its_policy() {
        let mesh = Mesh4::new(u32::from_be_bytes([10, 16, 0, 0]), 12).unwrap();
        let cases = [
            (Policy::Balanced, 0x0102, [10, 24, 1, 2]),
            (Policy::Closest, 0x0102, [10, 25, 1, 2]),
            (Policy::LeastLoaded, 1, [10, 26, 0, 1]),
            (Policy::Greenest, 1, [10, 27, 0, 1]),
            (Policy::Sticky, 0xffff, [10, 28, 255, 255]),
            (Policy::Instance, 7, [10, 31, 0, 7]),
        ];
        for (policy, number, want) in cases {
            assert_eq!(
                mesh.encode(Name4::Vip { policy, number }).map(octets),
                Some(want),
                "{policy:?}"
            );
        }
        assert_eq!(mesh.decode(u32::from_be_bytes([10, 29, 0, 1])), None);
        assert_eq!(mesh.decode(u32::from_be_bytes([10, 30, 0, 1])), None);
        assert_eq!(mesh.decode(u32::from_be_bytes([10, 32, 0, 1])), None);
        assert_eq!(
            mesh.encode(Name4::Vip {
                policy: Policy::Balanced,
                number: 0x1_0000
            }),
            None
        );
    }

    #[test]
    fn a_shorter_space_shrinks_the_layout() {
        let mesh = Mesh4::new(u32::from_be_bytes([172, 20, 0, 0]), 16).unwrap();
        assert_eq!(mesh.number_bits(), 12);
        assert_eq!(mesh.blocks(), 1024);
        let vip = mesh
            .encode(Name4::Vip {
                policy: Policy::Closest,
                number: 5,
            })
            .unwrap();
        assert_eq!(octets(vip), [172, 20, 0x80 | 0x10, 5]);
        assert_eq!(mesh.block_base(1023).map(octets), Some([172, 20, 127, 224]));
        assert_eq!(mesh.block_base(1024), None);
        for len in [0, 8, 11, 17, 32] {
            assert_eq!(Mesh4::new(0, len), None, "/{len}");
        }
        assert_eq!(Mesh4::new(u32::from_be_bytes([10, 17, 0, 0]), 12), None);
    }

    #[test]
    fn an_ipv6_mesh_is_a_48_of_fd00() {
        assert!(Mesh6::new(0xfd12_3456_789a << 80).is_some());
        assert_eq!(Mesh6::new(0xfc12_3456_789a << 80), None);
        assert_eq!(Mesh6::new((0xfd12_3456_789a << 80) | 1), None);
        let name = Name6::Vip {
            policy: Policy::Closest,
            service: 3,
            instance: 0,
        };
        assert_eq!(
            MESH6.encode(name),
            0xfd12_3456_789a_1100_0000_0003_0000_0000
        );
        assert_eq!(
            MESH6.node_base(9),
            0xfd12_3456_789a_0000_0000_0009_0000_0000
        );
    }

    fn policy() -> impl Strategy<Value = Policy> {
        prop::sample::select(Policy::ALL.to_vec())
    }

    proptest! {
        #[test]
        fn an_ipv6_name_survives_its_address(policy in policy(), high: u32, low: u32) {
            let instance = if policy == Policy::Instance { low } else { 0 };
            for name in [
                Name6::Endpoint { node: high, endpoint: low },
                Name6::Vip { policy, service: high, instance },
            ] {
                prop_assert_eq!(MESH6.decode(MESH6.encode(name)), Some(name));
            }
        }

        #[test]
        fn an_ipv6_address_that_decodes_is_the_address_of_its_name(low in 0u128..(1 << 80)) {
            let address = MESH6.base() | low;
            if let Some(name) = MESH6.decode(address) {
                prop_assert_eq!(MESH6.encode(name), address);
            }
        }

        #[test]
        fn an_ipv4_address_that_decodes_is_the_address_of_its_name(len in 12u8..=16, low: u32) {
            let mesh = Mesh4::new(u32::from_be_bytes([10, 16, 0, 0]), len).unwrap();
            let address = mesh.base() | (low & (u32::MAX >> len));
            if let Some(name) = mesh.decode(address) {
                prop_assert_eq!(mesh.encode(name), Some(address));
            }
        }
    }
}
