//! The layout's types as the plain bytes that maps hold.

use ebpf_common::{layout, splice};

/// A layout type, so that it can be `Pod` (neither the trait nor the types are ours to join).
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Raw<T>(pub(super) T);

macro_rules! plain {
    ($module:ident: $($name:ident),*) => {$(
        // SAFETY: `repr(transparent)` over a `repr(C)` struct of integers without padding (asserted by size in
        // `ebpf_common`), so every byte is initialized and every bit pattern is a value.
        unsafe impl aya::Pod for Raw<$module::$name> {}
    )*};
}
plain!(
    layout: Account, Addr, Backend, Config, Count, Endpoint, Flow, FlowKey, LogConfig, LogState, Peer,
    RefusedKey, Settled, Vip, VipKey
);
plain!(splice: Offsets);

/// The bytes of a layout type.
pub(super) fn bytes_of<T, const N: usize>(value: &T) -> [u8; N]
where
    Raw<T>: aya::Pod,
{
    const { assert!(size_of::<T>() == N) }
    // SAFETY: of that size, and plain initialized bytes (`Pod`).
    unsafe { std::ptr::from_ref(value).cast::<[u8; N]>().read() }
}
