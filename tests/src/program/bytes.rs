//! Map keys and values as bytes, field by field.
//!
//! Written out a second time on purpose: what the layout's structs look like in memory is what a test compares
//! them with. Integers are in native order, as the kernel reads them.

use ebpf_common::layout::{
    Account, Addr, Backend, Config, Connection, Count, Endpoint, Event, Flow, FlowKey, LogConfig,
    LogState, Peer, RefusedKey, Settled, Vip, VipKey,
};

/// A value that stands in map memory.
pub trait Bytes: Sized {
    /// Appends the value.
    fn put(&self, out: &mut Vec<u8>);
    /// Takes the value off the front.
    fn take(from: &mut &[u8]) -> Self;

    /// The value as `N` bytes; panics where its size is another.
    fn to_array<const N: usize>(&self) -> [u8; N] {
        let mut out = Vec::with_capacity(N);
        self.put(&mut out);
        out.try_into().expect("the size of the layout's struct")
    }

    /// The value that stands in `bytes`; panics where it is longer or shorter.
    fn from_slice(mut bytes: &[u8]) -> Self {
        let value = Self::take(&mut bytes);
        assert!(bytes.is_empty(), "{} bytes left over", bytes.len());
        value
    }
}

macro_rules! integers {
    ($($type:ty)*) => {$(
        impl Bytes for $type {
            fn put(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_ne_bytes());
            }
            fn take(from: &mut &[u8]) -> Self {
                let (head, rest) = from.split_first_chunk().expect("enough bytes");
                *from = rest;
                Self::from_ne_bytes(*head)
            }
        }
    )*};
}
integers!(u8 u16 u32 u64);

impl<T: Bytes, const N: usize> Bytes for [T; N] {
    fn put(&self, out: &mut Vec<u8>) {
        self.iter().for_each(|item| item.put(out));
    }
    fn take(from: &mut &[u8]) -> Self {
        std::array::from_fn(|_| T::take(from))
    }
}

macro_rules! structs {
    ($($type:ident { $($field:ident),* })*) => {$(
        impl Bytes for $type {
            fn put(&self, out: &mut Vec<u8>) {
                $(self.$field.put(out);)*
            }
            fn take(from: &mut &[u8]) -> Self {
                Self { $($field: Bytes::take(from)),* }
            }
        }
    )*};
}
structs! {
    Addr { words }
    Connection { state, key, spilled_s, forward, reverse }
    Config { seed, mesh6, mesh4, node6, node4, mesh4_len, node, tunnel_ifindex, tunnel_mtu, flags, hold_until_s }
    Endpoint { addr6, addr4, number, ifindex, flags, quota, mac, host_mac, pad }
    VipKey { addr, port_be, proto, pad }
    Vip { slot_base, slot_count, service, target_port_be, policy, flags, counter }
    Peer { node, mtu }
    Backend { addr6, addr4, node, generation, flags, pad }
    FlowKey { src, dst, sport_be, dport_be, endpoint, proto, direction, pad }
    Flow { last_seen_ns, addr, port_be, client_port_be, flags, backend, generation, isn_be, service, born_s, counter }
    Count { packets, bytes, flows }
    RefusedKey { counter, reason }
    LogConfig { sample_every, per_second }
    LogState { since_ns, used, used_marked, written, limited, lost }
    Event { time_ns, src, dst, to_src, to_dst, sport_be, dport_be, to_sport_be, to_dport_be, counter, backend, sender, detail, kind, proto, marked, direction, pad }
    Account { opened, closed }
    Settled { gone }
}
