//! The bytes of the maps by which connections within a node are spliced.
//!
//! ```text
//!  SPLICES         hash      socket   -> Splice   what is known of a spliced socket, by its address in the kernel
//!  SPLICE_HALVES   LRU hash  FlowKey  -> Half     the client's end, until the backend's finds it by its tuple
//!  SPLICE_SOCKETS  sock hash cookie   -> socket   where a message is handed over; a cookie is never given twice
//!  SPLICE_OFFSETS  array 1   Offsets              where the running kernel keeps what the programs read
//! ```
//!
//! They belong to the layout of `layout`, but no forwarding depends on them.

use crate::layout::FlowKey;

/// How many sockets can be spliced at a time; a connection has two.
pub const SPLICED_SOCKETS: u32 = 32_768;

/// Bytes that may wait unread at a receiver: beyond it the direction goes by TCP, whose window a reader holds back.
pub const UNREAD_LIMIT: u32 = 256 * 1024;

/// Messages are handed over.
pub const SPLICE_ON: u32 = 0;
/// Messages go by TCP, for the rest of the connection.
pub const SPLICE_OVER: u32 = 1;

/// One end of a spliced connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Splice {
    /// This socket's address in the kernel, also the key.
    pub socket: u64,
    /// Its cookie.
    pub cookie: u64,
    /// The other end's address; 0 while it is not there.
    pub peer: u64,
    /// The other end's cookie; 0 while it is not there.
    pub peer_cookie: u64,
    /// Kernel monotonic time when the flow's entries were last touched, ns.
    pub touched_ns: u64,
    /// Messages that were handed over from this end.
    pub messages: u64,
    /// Bytes that were handed over from this end.
    pub bytes: u64,
    /// The flow, as the client's node knows it.
    pub flow: FlowKey,
    /// The sequence number of the first byte that this end would send by TCP.
    pub birth: u32,
    /// `SPLICE_...`.
    pub state: u32,
    /// The backend's index.
    pub backend: u32,
    /// The backend's generation.
    pub generation: u32,
    /// The VIP's index in `VIP_COUNTS`.
    pub counter: u32,
    /// `FLOW_FORWARD` at the client's end, `FLOW_REVERSE` at the backend's.
    pub direction: u32,
    /// [`Offsets::maps`] when it was established.
    pub maps: u32,
}

/// The client's end of a connection whose backend's end is not established yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Half {
    /// The client's socket's address in the kernel.
    pub socket: u64,
    /// Its cookie.
    pub cookie: u64,
    /// The sequence number of its first byte: a secret of the two ends and of this node.
    pub birth: u32,
    /// Zero.
    pub pad: u32,
}

/// Where fields are within the running kernel's structs, from its BTF, bytes; all zero where nothing is spliced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Offsets {
    /// `tcp_sock.write_seq`.
    pub write_seq: u32,
    /// `sock.sk_backlog.rmem_alloc`.
    pub rmem_alloc: u32,
    /// `inet_connection_sock.icsk_ulp_ops`.
    pub ulp: u32,
    /// A number for the tables that the programs of the running daemon read.
    pub maps: u32,
}

const _: () = {
    assert!(size_of::<Splice>() == 128);
    assert!(size_of::<Half>() == 24);
    assert!(size_of::<Offsets>() == 16);
};
