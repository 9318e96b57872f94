//! The maps, and the only place that touches their memory.
//!
//! Lookups hand out references into map memory, which lives as long as the map does. User space and other CPUs
//! write the same memory: a value that is being replaced may be read half old, half new. Every reader lives
//! with that: what is read is checked again where it is used as an index, and the worst case is one packet to
//! a place that was right a moment ago.

use core::{mem::offset_of, ptr::NonNull};

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_F_NO_PREALLOC, BPF_NOEXIST},
    helpers::generated::bpf_ktime_get_coarse_ns,
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray, ProgramArray, Queue},
    programs::TcContext,
};
use ebpf_common::{
    layout::{
        ACCOUNT_KINDS, Account, Addr, Backend, Config, DIRECT_PLACES, Endpoint, FLOW_REVERSE, Flow,
        FlowKey, Fragment, FragmentKey, PROGRAM_SLOTS, PROTO_TCP, Peer, Settled, Vip, VipKey,
        direct_link,
    },
    reason::Reason,
};

mod place;

use self::place::Found;
pub(crate) use self::place::{Place, Taken};
use crate::{atomic, parse::Packet};

// The sizes are what one node of a few hundred pods needs; the loader may set others.
#[map]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);
#[map]
static ENDPOINTS: HashMap<u32, Endpoint> = HashMap::with_max_entries(1024, 0);
#[map]
static LOCAL: HashMap<Addr, Endpoint> = HashMap::with_max_entries(2048, 0);
#[map]
static ENDPOINTS_DIRECT: Array<Endpoint> = Array::with_max_entries(DIRECT_PLACES, 0);
#[map]
static LOCAL_DIRECT: Array<Endpoint> = Array::with_max_entries(DIRECT_PLACES, 0);
#[map]
static VIPS: HashMap<VipKey, Vip> = HashMap::with_max_entries(16_384, 0);
#[map]
static SLOTS: Array<u32> = Array::with_max_entries(262_144, 0);
#[map]
static BACKENDS: Array<Backend> = Array::with_max_entries(16_384, 0);
#[map]
static FLOWS: HashMap<FlowKey, Flow> = HashMap::with_max_entries(131_072, 0);
#[map]
static FLOWS_LRU: LruHashMap<FlowKey, Flow> = LruHashMap::with_max_entries(65_536, 0);
#[map]
static FRAGMENTS: LruHashMap<FragmentKey, Fragment> = LruHashMap::with_max_entries(8192, 0);
#[map]
static PEERS: HashMap<Addr, Peer> = HashMap::with_max_entries(16_384, 0);
#[map]
static ANSWERS: LruHashMap<u32, u64> = LruHashMap::with_max_entries(4096, 0);
#[map]
static AGEING: Queue<FlowKey> = Queue::with_max_entries(32_768, 0);
#[map]
static ACCOUNTS: HashMap<u32, Account> = HashMap::with_max_entries(131_072, BPF_F_NO_PREALLOC);
#[map]
static SETTLED: HashMap<u32, Settled> = HashMap::with_max_entries(131_072, BPF_F_NO_PREALLOC);
#[map]
static REASONS: PerCpuArray<u64> = PerCpuArray::with_max_entries(64, 0);
#[map]
static SCRATCH: PerCpuArray<Packet> = PerCpuArray::with_max_entries(1, 0);
#[map]
static PROGRAMS: ProgramArray = ProgramArray::with_max_entries(PROGRAM_SLOTS, 0);

/// What the mesh and this node are.
#[inline(always)]
pub(crate) fn config() -> Result<&'static Config, Reason> {
    CONFIG.get(0).ok_or(Reason::Internal)
}

/// Room for the packet at hand. Stack is scarce, and what the verifier does not follow it need not try in every
/// combination. A program takes it at its start; who answers, counts and tells of what it refused takes it again, each
/// after the one before is done with it.
#[inline(always)]
pub(crate) fn scratch() -> Result<&'static mut Packet, Reason> {
    let packet = SCRATCH.get_ptr_mut(0).ok_or(Reason::Internal)?;
    // SAFETY: this CPU's own; a program runs to its end before the next one on this CPU starts (softirq), and who
    // takes it again does so where the reference before is not used any more: what refuses has returned by then. Zero,
    // which the map starts with, is a value of each of its enums.
    Ok(unsafe { &mut *packet })
}

// Two look-ups by hash were half of what a packet of a known flow cost (measured: 170 of 350 ns).

/// Who sits behind a host-side link.
#[inline(always)]
pub(crate) fn endpoint(ifindex: u32) -> Option<&'static Endpoint> {
    match ENDPOINTS_DIRECT.get(direct_link(ifindex)) {
        Some(endpoint) if endpoint.is_at(ifindex) => Some(endpoint),
        // SAFETY: the value is plain data in map memory; a torn read is harmless, see the module's text.
        _ => unsafe { ENDPOINTS.get(ifindex) },
    }
}

/// Where a local endpoint address is delivered.
#[inline(always)]
pub(crate) fn local(address: &Addr) -> Option<&'static Endpoint> {
    match LOCAL_DIRECT.get(address.direct()) {
        Some(endpoint) if endpoint.has(address) => Some(endpoint),
        // SAFETY: as for `endpoint`.
        _ => unsafe { LOCAL.get(address) },
    }
}

/// A declared port.
#[inline(always)]
pub(crate) fn vip(key: &VipKey) -> Option<&'static Vip> {
    // SAFETY: as for `endpoint`.
    unsafe { VIPS.get(key) }
}

/// The backend index in a slot.
#[inline(always)]
pub(crate) fn slot(index: u32) -> Option<u32> {
    SLOTS.get(index).copied()
}

/// A backend by its index.
#[inline(always)]
pub(crate) fn backend(index: u32) -> Option<&'static Backend> {
    BACKENDS.get(index)
}

/// Continues in a program of `PROGRAMS`; comes back, always with `None`, only where the slot is empty.
#[inline(always)]
pub(crate) fn call(context: &TcContext, slot: u32) -> Option<i32> {
    // SAFETY: nothing here has a destructor that a call without return would skip.
    unsafe { PROGRAMS.tail_call(context, slot) }
    None
}

/// Counts one packet.
#[inline(always)]
pub(crate) fn count(reason: Reason) {
    if let Some(counter) = REASONS.get_ptr_mut(reason as u32) {
        // SAFETY: the pointer is to this CPU's own counter, and nothing interrupts a program with itself.
        unsafe { *counter += 1 }
    }
}

/// Kernel monotonic time at the resolution of the timer tick, ns; a tenth of the cost of the exact one.
#[inline(always)]
pub(crate) fn now_ns() -> u64 {
    // SAFETY: the helper takes nothing and reads the kernel's clock.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// Whole seconds of a time of [`now_ns`].
#[inline(always)]
pub(crate) const fn seconds(ns: u64) -> u32 {
    (ns / 1_000_000_000) as u32
}

/// What the first fragment of a datagram became.
#[inline(always)]
pub(crate) fn fragment(key: &FragmentKey) -> Option<&'static Fragment> {
    // SAFETY: as for `endpoint`.
    unsafe { FRAGMENTS.get(key) }
}

/// Notes what the first fragment of a datagram became.
#[inline(always)]
pub(crate) fn put_fragment(key: &FragmentKey, fragment: &Fragment) {
    // Where the map cannot take it, the later fragments are dropped with their reason.
    let _ = FRAGMENTS.insert(key, fragment, u64::from(BPF_ANY));
}

/// The peer that an endpoint address belongs to.
#[inline(always)]
pub(crate) fn peer(address: &Addr) -> Option<&'static Peer> {
    // SAFETY: as for `endpoint`.
    unsafe { PEERS.get(&address.of_peer()) }
}

/// How many answers a second one endpoint may make the programs give, and how many at once.
const ANSWERS_PER_SECOND: u64 = 10_000;
const ANSWERS_AT_ONCE: u64 = 2_000;

/// Whether an endpoint (0: the tunnel) is answered once more: a bucket of [`ANSWERS_AT_ONCE`] that fills with
/// [`ANSWERS_PER_SECOND`], kept as the time at which it would be full.
#[inline(always)]
pub(crate) fn spend_answer(endpoint: u32) -> bool {
    const COST_NS: u64 = 1_000_000_000 / ANSWERS_PER_SECOND;
    let now = now_ns();
    let Some(full) = ANSWERS.get_ptr_mut(endpoint) else {
        // A table that takes no entry leaves an endpoint unbounded, not unanswered.
        let _ = ANSWERS.insert(endpoint, now + COST_NS, u64::from(BPF_ANY));
        return true;
    };
    // SAFETY: the lookup returned it, so it is an aligned word of map memory; two CPUs that race lose one answer's
    // cost.
    let at = unsafe { full.read_volatile() };
    if at > now + ANSWERS_AT_ONCE * COST_NS {
        return false;
    }
    let from = if at > now { at } else { now };
    // SAFETY: as above.
    unsafe { full.write_volatile(from + COST_NS) }
    true
}

/// Zeroes words one by one: of zeroes side by side the compiler makes a call that loops over octets.
#[inline(always)]
pub(crate) fn clear<const N: usize>(words: [&mut u32; N]) {
    for word in words {
        // SAFETY: a valid reference.
        unsafe { (word as *mut u32).write_volatile(0) }
    }
}

/// A number that a loop carries in map memory, so that the verifier sees the same state at every step of it: some
/// number. What is read is bounded where it is used.
#[repr(transparent)]
pub(crate) struct Cursor(u32);

impl Cursor {
    /// The number.
    #[inline(always)]
    pub(crate) fn get(&self) -> usize {
        // SAFETY: a valid reference; volatile keeps the compiler from carrying the number in a register.
        unsafe { (&raw const self.0).read_volatile() as usize }
    }

    /// Makes it another.
    #[inline(always)]
    pub(crate) fn set(&mut self, value: usize) {
        // SAFETY: as for `get`.
        unsafe { (&raw mut self.0).write_volatile(value as u32) }
    }
}

/// A flow entry in map memory.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    flow: NonNull<Flow>,
    /// The other entry of its connection, where both share a place.
    other: Option<NonNull<Flow>>,
}

/// How old `last_seen_ns` may become while a flow is used.
const REFRESH_NS: u64 = 1_000_000_000;

impl Entry {
    #[inline(always)]
    fn new(flow: *mut Flow) -> Option<Self> {
        NonNull::new(flow).map(|flow| Self { flow, other: None })
    }

    /// The other entry of the connection, where both share a place.
    #[inline(always)]
    pub(crate) fn other(self) -> Option<Self> {
        self.other.map(|other| Self {
            flow: other,
            other: Some(self.flow),
        })
    }

    /// The entry's value.
    #[inline(always)]
    pub(crate) fn flow(&self) -> &'static Flow {
        // SAFETY: the lookup returned it, so it is map memory; torn reads as in the module's text.
        unsafe { self.flow.as_ref() }
    }

    /// The `FLOW_...` bits now.
    #[inline(always)]
    pub(crate) fn flags(&self) -> u32 {
        // SAFETY: as for `flow`; volatile, because the other direction's CPU sets bits too.
        unsafe { (&raw const (*self.flow.as_ptr()).flags).read_volatile() }
    }

    /// Sets bits; what they were before. Of two CPUs that set the last bit of something, one sees that it did.
    #[inline(always)]
    pub(crate) fn set(&self, bits: u32) -> u32 {
        // SAFETY: as for `flow`; an aligned word of map memory, whose lower half no bit is set in. BPF has no
        // smaller atomic operation that tells the old value.
        let before = unsafe { atomic::or(self.flags_word(), u64::from(bits) << 32) };
        (before >> 32) as u32
    }

    /// Clears bits; what they were before.
    #[inline(always)]
    pub(crate) fn clear(&self, bits: u32) -> u32 {
        // SAFETY: as for `set`; no bit of the lower half is cleared.
        let before = unsafe { atomic::and(self.flags_word(), !(u64::from(bits) << 32)) };
        (before >> 32) as u32
    }

    /// The aligned word whose upper half are the flags, in the byte order that all our machines have.
    #[inline(always)]
    fn flags_word(&self) -> *mut u64 {
        const WORD: usize = offset_of!(Flow, port_be);
        const {
            assert!(WORD.is_multiple_of(8) && offset_of!(Flow, flags) == WORD + 4);
            assert!(cfg!(target_endian = "little"));
        }
        // SAFETY: within the value that `new` was given.
        unsafe { self.flow.as_ptr().byte_add(WORD).cast() }
    }

    /// The number that is awaited, or was first ([`Flow::isn_be`]).
    #[inline(always)]
    pub(crate) fn number_be(&self) -> u32 {
        // SAFETY: as for `flow`; volatile, because the other direction's CPU writes it too.
        unsafe { (&raw const (*self.flow.as_ptr()).isn_be).read_volatile() }
    }

    /// Notes which number is awaited.
    #[inline(always)]
    pub(crate) fn await_number(&self, number_be: u32) {
        // SAFETY: as for `flow`; an aligned word of map memory.
        unsafe { (&raw mut (*self.flow.as_ptr()).isn_be).write_volatile(number_be) }
    }

    /// Makes the entry another flow's. Cheaper than an insert, which takes a new element even where there is one.
    #[inline(always)]
    pub(crate) fn replace(&self, flow: &Flow) {
        // SAFETY: as for `flow`; whoever reads it meanwhile reads of both, see the module's text.
        unsafe { self.flow.as_ptr().write(*flow) }
    }

    /// Notes that the flow is used; true when that was more than a second ago.
    #[inline(always)]
    pub(crate) fn touch(&self) -> bool {
        let now = now_ns();
        let stale = now.wrapping_sub(self.flow().last_seen_ns) > REFRESH_NS;
        if stale {
            // SAFETY: as for `flow`; an aligned word of map memory.
            unsafe { (&raw mut (*self.flow.as_ptr()).last_seen_ns).write_volatile(now) }
        }
        stale
    }
}

/// The two flow tables.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Table {
    /// `FLOWS`.
    Connections,
    /// `FLOWS_LRU`.
    Datagrams,
}

/// What became of an insert.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Inserted {
    Yes,
    /// There is an entry with that key.
    Exists,
    /// The table is full.
    Full,
}

impl Table {
    /// The table of a protocol.
    #[inline(always)]
    pub(crate) const fn of(proto: u8) -> Self {
        match proto {
            PROTO_TCP => Self::Connections,
            _ => Self::Datagrams,
        }
    }

    /// The entry of `key`.
    #[inline(always)]
    pub(crate) fn get(self, key: &FlowKey) -> Option<Entry> {
        match self {
            Self::Connections => match place::find(key) {
                Found::Here(entry) => return Some(entry),
                Found::Nowhere => return None,
                Found::Elsewhere => FLOWS.get_ptr_mut(key),
            },
            Self::Datagrams => FLOWS_LRU.get_ptr_mut(key),
        }
        .and_then(Entry::new)
    }

    /// Writes an entry where there is none.
    #[inline(always)]
    pub(crate) fn insert(self, key: &FlowKey, flow: &Flow) -> Inserted {
        /// `EEXIST` of errno(3).
        const EXISTS: i32 = -17;
        let inserted = match self {
            Self::Connections => {
                if let Found::Here(_) = place::find(key) {
                    return Inserted::Exists;
                }
                place::spill(key, flow.last_seen_ns);
                let inserted = FLOWS.insert(key, flow, u64::from(BPF_NOEXIST));
                // Who takes the place looks here once it is taken, and who comes here looks there: one of them sees the other.
                if inserted.is_ok() && key.direction == FLOW_REVERSE && place::is_contended(key) {
                    let _ = FLOWS.remove(key);
                    return Inserted::Exists;
                }
                inserted
            }
            Self::Datagrams => FLOWS_LRU.insert(key, flow, u64::from(BPF_NOEXIST)),
        };
        match inserted {
            Ok(()) => Inserted::Yes,
            Err(EXISTS) => Inserted::Exists,
            Err(_) => Inserted::Full,
        }
    }

    /// Removes an entry; false where there was none.
    #[inline(always)]
    pub(crate) fn remove(self, key: &FlowKey) -> bool {
        match self {
            Self::Connections => match place::remove(key) {
                Some(removed) => return removed,
                None => FLOWS.remove(key),
            },
            Self::Datagrams => FLOWS_LRU.remove(key),
        }
        .is_ok()
    }
}

/// Whether the connections' table that all share has an entry of `key`.
#[inline(never)]
pub(crate) fn is_shared(key: &FlowKey) -> bool {
    FLOWS.get_ptr(key).is_some()
}

/// Puts a connection at the end of `AGEING`; false where there is no room.
#[inline(always)]
pub(crate) fn age(key: &FlowKey) -> bool {
    AGEING.push(key, 0).is_ok()
}

/// Takes the oldest connection out of `AGEING`.
#[inline(always)]
pub(crate) fn oldest() -> Option<FlowKey> {
    AGEING.pop().ok().flatten()
}

/// The count of an endpoint's flows.
#[derive(Clone, Copy)]
pub(crate) struct Tally(NonNull<Account>);

impl Tally {
    /// An endpoint's; it is made where there is none yet, and `None` where there is no room for it.
    #[inline(always)]
    pub(crate) fn of(endpoint: u32) -> Option<Self> {
        const NONE: Account = Account {
            opened: [0; ACCOUNT_KINDS],
            closed: [0; ACCOUNT_KINDS],
        };
        if let Some(tally) = Self::find(endpoint) {
            return Some(tally);
        }
        // Another CPU may be first, which is as good.
        let _ = ACCOUNTS.insert(endpoint, NONE, u64::from(BPF_NOEXIST));
        Self::find(endpoint)
    }

    /// An endpoint's, if it ever opened a flow.
    #[inline(always)]
    pub(crate) fn find(endpoint: u32) -> Option<Self> {
        ACCOUNTS
            .get_ptr_mut(endpoint)
            .and_then(NonNull::new)
            .map(Self)
    }

    /// The count, if the endpoint may have one more of `kind`.
    #[inline(always)]
    pub(crate) fn with_room(self, endpoint: &Endpoint, kind: usize) -> Option<Self> {
        let quota = u64::from(endpoint.quota_of(kind));
        if quota == 0 {
            return Some(self);
        }
        // SAFETY: the lookup returned it; aligned words that other CPUs add to.
        let (opened, closed) = unsafe {
            let account = self.0.as_ptr();
            (
                (&raw const (*account).opened[kind]).read_volatile(),
                (&raw const (*account).closed[kind]).read_volatile(),
            )
        };
        if Account::used(opened, closed, 0) < quota {
            return Some(self);
        }
        // SAFETY: as for `endpoint`.
        let gone = unsafe { SETTLED.get(endpoint.number) }.map_or(0, |settled| settled.gone[kind]);
        (Account::used(opened, closed, gone) < quota).then_some(self)
    }

    /// Counts a flow that was opened.
    #[inline(always)]
    pub(crate) fn opened(&self, kind: usize) {
        // SAFETY: the lookup returned it; an aligned word of map memory.
        unsafe { atomic::add(&raw mut (*self.0.as_ptr()).opened[kind], 1) };
    }

    /// Counts a flow that ended.
    #[inline(always)]
    pub(crate) fn closed(&self, kind: usize) {
        // SAFETY: as for `opened`.
        unsafe { atomic::add(&raw mut (*self.0.as_ptr()).closed[kind], 1) };
    }
}
