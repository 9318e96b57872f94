//! Splicing: what one end of a connection within the node writes is put into the other end's receive queue, past
//! TCP, where both ends' services asked for it.
//!
//! ```text
//!  established, client   flow entry, both ends local and willing  -> SPLICES, SPLICE_HALVES, SPLICE_SOCKETS
//!  established, backend  half found by its tuple                  -> the two know each other
//!  sendmsg               handed over, or by TCP for the rest of the connection in this direction
//!  closed                forgotten
//! ```
//!
//! A receiver reads what was handed over before what came by TCP, so a direction may change from splice to TCP at
//! any time, and never back: a message is handed over only while its end has not written one byte by TCP
//! (`write_seq` is where it was born). A client that writes before the backend's end is there therefore goes
//! by TCP. A socket is taken for the flow's end only by the flow's initial sequence number, which no
//! other socket can know: tuples can be forged in a pod's own namespace. SYN, FIN, RST and all that
//! keeps a connection alive go by TCP as ever. What is between a socket and its TCP (MPTCP, TLS of the kernel: an
//! upper layer protocol) would be passed by, so such a socket takes no part.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_F_INGRESS, BPF_NOEXIST, sk_action::SK_PASS},
    helpers::{bpf_get_socket_cookie, bpf_probe_read_kernel},
    macros::{map, sk_msg, sock_ops},
    maps::{Array, HashMap, LruHashMap, SockHash},
    programs::{SkMsgContext, SockOpsContext},
};
use ebpf_common::{
    layout::{
        Addr, ENDPOINT_SPLICE, Endpoint, FLOW_FORWARD, FLOW_HAIRPIN, FLOW_REVERSE, FlowKey,
        PROTO_TCP,
    },
    splice::{Half, Offsets, SPLICE_ON, SPLICE_OVER, SPLICED_SOCKETS, Splice, UNREAD_LIMIT},
};

use crate::{count, flow, maps};

/// `enum` of `linux/bpf.h`, `BPF_SOCK_OPS_...`.
const ACTIVE_ESTABLISHED: u32 = 4;
const PASSIVE_ESTABLISHED: u32 = 5;
const STATE: u32 = 10;
/// `BPF_SOCK_OPS_STATE_CB_FLAG`.
const STATE_FLAG: i32 = 1 << 2;
/// `BPF_TCP_CLOSE`.
const TCP_CLOSE: u32 = 7;
/// `AF_INET`.
const AF_INET: u32 = 2;
/// `BPF_F_NO_PREALLOC`: costs nothing while nothing is spliced.
const NO_PREALLOC: u32 = 1;
/// How often the flow of a spliced connection is touched, so that it does not count as idle.
const TOUCH_NS: u64 = 1_000_000_000;

#[map]
static SPLICES: HashMap<u64, Splice> = HashMap::with_max_entries(SPLICED_SOCKETS, NO_PREALLOC);
#[map]
static SPLICE_HALVES: LruHashMap<FlowKey, Half> = LruHashMap::with_max_entries(1024, 0);
#[map]
static SPLICE_SOCKETS: SockHash<u64> = SockHash::with_max_entries(SPLICED_SOCKETS, 0);
#[map]
static SPLICE_OFFSETS: Array<Offsets> = Array::with_max_entries(1, 0);

/// What becomes of a socket of the cgroup.
#[sock_ops]
pub(crate) fn weft_splice_sock(context: SockOpsContext) -> u32 {
    match context.op() {
        ACTIVE_ESTABLISHED => client(&context),
        PASSIVE_ESTABLISHED => backend(&context),
        STATE => state(&context),
        _ => None,
    };
    1
}

/// Which way a message of a spliced socket goes.
#[sk_msg]
pub(crate) fn weft_splice_message(context: SkMsgContext) -> u32 {
    if let Some(splice) = own(&context) {
        send(&context, splice);
    }
    SK_PASS
}

/// The addresses and ports of a socket, as its own namespace sees them.
struct Ends {
    local: Addr,
    remote: Addr,
    local_port_be: u16,
    remote_port_be: u16,
}

impl Ends {
    #[inline(always)]
    fn of(context: &SockOpsContext) -> Self {
        let ops = context.ops.cast_const();
        // SAFETY: fields of the context, which the kernel reads as zero or anything where the family has none. Volatile, and
        // before the family is asked: else the compiler makes one load of an offset that it computes, which the
        // verifier does not take from a context.
        let (local4, remote4, local6, remote6, local_port, remote_port) = unsafe {
            (
                (&raw const (*ops).local_ip4).read_volatile(),
                (&raw const (*ops).remote_ip4).read_volatile(),
                words(&raw const (*ops).local_ip6),
                words(&raw const (*ops).remote_ip6),
                (&raw const (*ops).local_port).read_volatile(),
                (&raw const (*ops).remote_port).read_volatile(),
            )
        };
        let (local, remote) = if context.family() == AF_INET {
            (Addr::from_v4_be(local4), Addr::from_v4_be(remote4))
        } else {
            (Addr { words: local6 }, Addr { words: remote6 })
        };
        Self {
            local,
            remote,
            local_port_be: (local_port as u16).to_be(),
            // In the upper half of the word (linux/bpf.h, struct bpf_sock_ops).
            remote_port_be: (remote_port >> 16) as u16,
        }
    }
}

/// An address of the context, word by word.
///
/// # Safety
/// `field` is one of the context's.
#[inline(always)]
unsafe fn words(field: *const [u32; 4]) -> [u32; 4] {
    let first = field.cast::<u32>();
    // SAFETY: four words, by the type.
    unsafe {
        [
            first.read_volatile(),
            first.add(1).read_volatile(),
            first.add(2).read_volatile(),
            first.add(3).read_volatile(),
        ]
    }
}

/// The pod with this address, where its service asked to be spliced.
#[inline(always)]
fn willing(address: &Addr) -> Option<&'static Endpoint> {
    maps::local(address).filter(|endpoint| endpoint.flags & ENDPOINT_SPLICE != 0)
}

#[inline(always)]
fn socket(context: &SockOpsContext) -> u64 {
    // SAFETY: a field of the context.
    unsafe { (*context.ops).__bindgen_anon_2.sk as u64 }
}

/// The client's end is established: the flow table knows where the connection goes.
#[inline(always)]
fn client(context: &SockOpsContext) -> Option<()> {
    let ends = Ends::of(context);
    let own = willing(&ends.local)?;
    let config = maps::config().ok()?;
    let key = FlowKey {
        src: ends.local,
        dst: ends.remote,
        sport_be: ends.local_port_be,
        dport_be: ends.remote_port_be,
        endpoint: own.number,
        proto: PROTO_TCP,
        direction: FLOW_FORWARD,
        pad: 0,
    };
    let found = flow::find(&key)?;
    let entry = found.flow();
    // SAFETY: fields of the context.
    let birth = unsafe { (*context.ops).snd_nxt };
    let is_its_syn = birth == u32::from_be(entry.isn_be).wrapping_add(1);
    if !is_its_syn || entry.flags & FLOW_HAIRPIN != 0 {
        return None;
    }
    flow::live_backend(entry)?;
    willing(&entry.addr)?;
    let half = Half {
        socket: socket(context),
        cookie: cookie(context),
        birth,
        pad: 0,
    };
    let splice = Splice {
        socket: half.socket,
        cookie: half.cookie,
        peer: 0,
        peer_cookie: 0,
        touched_ns: maps::now_ns(),
        messages: 0,
        bytes: 0,
        flow: key,
        birth,
        state: SPLICE_ON,
        backend: entry.backend,
        generation: entry.generation,
        counter: entry.counter,
        direction: u32::from(FLOW_FORWARD),
        maps: SPLICE_OFFSETS.get(0)?.maps,
    };
    enter(context, &splice)?;
    let reverse = flow::reverse_key(config, &key, entry);
    SPLICE_HALVES.insert(reverse, half, u64::from(BPF_ANY)).ok()
}

/// The backend's end is established: the client's waits under the tuple that the backend sees.
#[inline(always)]
fn backend(context: &SockOpsContext) -> Option<()> {
    let ends = Ends::of(context);
    willing(&ends.local)?;
    let client = willing(&ends.remote)?;
    let key = FlowKey {
        src: ends.local,
        dst: ends.remote,
        sport_be: ends.local_port_be,
        dport_be: ends.remote_port_be,
        endpoint: client.number,
        proto: PROTO_TCP,
        direction: FLOW_REVERSE,
        pad: 0,
    };
    // SAFETY: plain data in map memory, copied at once.
    let half = unsafe { SPLICE_HALVES.get(key) }.copied()?;
    // SAFETY: fields of the context.
    let (birth, received) = unsafe { ((*context.ops).snd_nxt, (*context.ops).rcv_nxt) };
    if received != half.birth {
        return None;
    }
    let _ = SPLICE_HALVES.remove(key);
    let peer = SPLICES.get_ptr_mut(half.socket)?;
    // SAFETY: map memory; only this connection's callbacks write the fields that are read here, and they come one after
    // the other: the backend is established by what the client sends once it is.
    let peer = unsafe { &mut *peer };
    if peer.cookie != half.cookie {
        return None;
    }
    let splice = Splice {
        socket: socket(context),
        cookie: cookie(context),
        peer: half.socket,
        peer_cookie: half.cookie,
        birth,
        direction: u32::from(FLOW_REVERSE),
        messages: 0,
        bytes: 0,
        ..*peer
    };
    enter(context, &splice)?;
    peer.peer = splice.socket;
    peer.peer_cookie = splice.cookie;
    Some(())
}

/// From now on the socket's messages pass the program, and others can be handed to it.
#[inline(always)]
fn enter(context: &SockOpsContext, splice: &Splice) -> Option<()> {
    // Another's program may have asked for other events of this socket.
    let flags = context.cb_flags() as i32 | STATE_FLAG;
    context.set_cb_flags(flags).ok()?;
    SPLICES
        .insert(splice.socket, splice, u64::from(BPF_ANY))
        .ok()?;
    let entered = join(context, splice);
    if entered.is_none() {
        let _ = SPLICES.remove(splice.socket);
    }
    entered
}

/// Puts a socket that is known among those to which messages are handed, if nothing is between it and its TCP.
#[inline(always)]
fn join(context: &SockOpsContext, splice: &Splice) -> Option<()> {
    let known = SPLICES.get_ptr_mut(splice.socket)?;
    // SAFETY: map memory. Volatile: what comes out of a map is a number to the verifier, with which it lets us count.
    let address = unsafe { (&raw const (*known).socket).read_volatile() };
    plain(SPLICE_OFFSETS.get(0)?, address)?;
    // SAFETY: the context is the kernel's and lives through the call.
    let ops = unsafe { &mut *context.ops };
    SPLICE_SOCKETS
        .update(splice.cookie, ops, u64::from(BPF_NOEXIST))
        .ok()
}

#[inline(always)]
fn cookie(context: &SockOpsContext) -> u64 {
    // SAFETY: the helper reads the socket of the context.
    unsafe { bpf_get_socket_cookie(context.ops.cast()) }
}

/// A closed socket is forgotten; the kernel takes it out of `SPLICE_SOCKETS` by itself.
#[inline(always)]
fn state(context: &SockOpsContext) -> Option<()> {
    if context.arg(1) == TCP_CLOSE {
        let _ = SPLICES.remove(socket(context));
    }
    Some(())
}

/// What is known of the socket that sends.
#[inline(always)]
fn own(context: &SkMsgContext) -> Option<&'static mut Splice> {
    // SAFETY: a field of the context.
    let socket = unsafe { (*context.msg).__bindgen_anon_3.sk as u64 };
    let splice = SPLICES.get_ptr_mut(socket)?;
    // SAFETY: map memory; a socket sends one message at a time, under its lock.
    Some(unsafe { &mut *splice })
}

/// Hands the message over, or gives the direction to TCP for good.
#[inline(always)]
fn send(context: &SkMsgContext, splice: &mut Splice) {
    if splice.state != SPLICE_ON {
        return;
    }
    if may(splice).is_none()
        || SPLICE_SOCKETS.redirect_msg(context, splice.peer_cookie, u64::from(BPF_F_INGRESS))
            != i64::from(SK_PASS)
    {
        splice.state = SPLICE_OVER;
        return;
    }
    let bytes = u64::from(context.size());
    splice.messages += 1;
    splice.bytes += bytes;
    count::handed_over(splice, bytes);
}

/// Whether the next message may be handed over.
#[inline(always)]
fn may(splice: &mut Splice) -> Option<()> {
    let offsets = SPLICE_OFFSETS.get(0)?;
    if splice.peer_cookie == 0 || offsets.write_seq == 0 || offsets.maps != splice.maps {
        return None;
    }
    let backend = maps::backend(splice.backend)?;
    if backend.generation != splice.generation || backend.flags == 0 {
        return None;
    }
    let written: u32 = read(splice.socket, offsets.write_seq)?;
    let unread: u32 = read(splice.peer, offsets.rmem_alloc)?;
    if written != splice.birth || unread > UNREAD_LIMIT {
        return None;
    }
    plain(offsets, splice.socket)?;
    plain(offsets, splice.peer)?;
    touch(splice)
}

/// Nothing is between the socket and its TCP.
#[inline(always)]
fn plain(offsets: &Offsets, socket: u64) -> Option<()> {
    let protocol: u64 = read(socket, offsets.ulp)?;
    (protocol == 0).then_some(())
}

/// A field of a socket.
#[inline(always)]
fn read<T>(socket: u64, offset: u32) -> Option<T> {
    let address = socket + u64::from(offset);
    // SAFETY: the helper checks the address itself; a socket that is gone reads as anything, and a message to it is not
    // handed over because its cookie is gone too.
    unsafe { bpf_probe_read_kernel(address as *const T) }.ok()
}

/// Keeps the flow from counting as idle; `None` where somebody has ended it.
#[inline(always)]
fn touch(splice: &mut Splice) -> Option<()> {
    let now = maps::now_ns();
    if now.wrapping_sub(splice.touched_ns) < TOUCH_NS {
        return Some(());
    }
    splice.touched_ns = now;
    let forward = flow::find(&splice.flow)?;
    forward.touch();
    let config = maps::config().ok()?;
    let reverse = flow::reverse_key(config, &splice.flow, forward.flow());
    flow::find(&reverse)?.touch();
    Some(())
}
