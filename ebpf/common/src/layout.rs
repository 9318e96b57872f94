//! The bytes of every map key and value.
//!
//! ```text
//!  CONFIG     array 1      Config      what the mesh and this node are
//!  ENDPOINTS  hash         ifindex  -> Endpoint   who sits behind a host-side link (anti-spoof, flow key)
//!  LOCAL      hash         Addr     -> Endpoint   where a local endpoint address is delivered
//!  ENDPOINTS_DIRECT  array Endpoint               the same by `direct_link`, for those that have a place of their own
//!  LOCAL_DIRECT      array Endpoint               the same by `Addr::direct`
//!  VIPS       hash         VipKey   -> Vip        a declared port; (address, 0, ICMP) stands for the VIP itself
//!  SLOTS      array        u32                    backend indexes; a Vip owns one run of them
//!  BACKENDS   array        Backend                by backend index
//!  FLOWS_DIRECT  array     Connection             TCP whose place by `direct_flow` was free when it was opened
//!  FLOWS      hash         FlowKey  -> Flow       other TCP; full means refused, what is established is never evicted
//!  FLOWS_LRU  LRU hash     FlowKey  -> Flow       UDP, ICMP echo, datagrams delivered untranslated
//!  AGEING     queue        FlowKey                TCP that opens or has closed, oldest first: it gives way
//!  ACCOUNTS   hash         number   -> Account    flows by endpoint number, as the programs count them
//!  SETTLED    hash         number   -> Settled    what user space corrects of that
//!  VIP_COUNTS      per-CPU arr  Count   by a Vip's counter
//!  BACKEND_COUNTS  per-CPU arr  Count   by backend index
//!  REFUSED    per-CPU hash RefusedKey -> u64   packets refused by VIP and reason; full: REASONS counts alone
//!  LOG        ring buffer  Event                  the flow log
//!  LOG_CONFIG array 1      LogConfig              how much of it
//!  LOG_STATE  per-CPU arr  LogState               its bound, and what it lost
//!  FRAGMENTS  LRU hash     FragmentKey -> Fragment  where the first fragment of a datagram went
//!  PEERS      hash         Addr     -> Peer       what the path to a node carries, by the prefix of its endpoints
//!  ANSWERS    LRU hash     u32      -> u64        when an endpoint has earned its next answer (`bpf_ktime_get_ns`)
//!  REASONS    per-CPU arr  u64                    packets by Reason
//!  PROGRAMS   prog array   one tail-call slot per PROGRAM_... constant, the same for every link of the node
//!  SCRATCH    per-CPU arr  a program's working memory: no state, private to one load, not to be pinned
//! ```
//!
//! Every struct is `repr(C)` without implicit padding and without `bool`; fields that hold network byte order
//! end in `_be`, addresses are [`Addr`] and always in network byte order. A change to any of this raises
//! [`LAYOUT_VERSION`], which is part of the pin path.

use crate::addr::BLOCK4_SIZE;

/// The version of everything in this file; programs and maps are pinned under it.
pub const LAYOUT_VERSION: u32 = 2;

/// The VIP's own entry in `VIPS` has this port; together with the family's ICMP protocol number.
pub const VIP_ITSELF_PORT: u16 = 0;
/// IANA protocol numbers.
pub const PROTO_ICMP: u8 = 1;
/// TCP.
pub const PROTO_TCP: u8 = 6;
/// UDP.
pub const PROTO_UDP: u8 = 17;
/// ICMPv6.
pub const PROTO_ICMP6: u8 = 58;

/// `PROGRAMS` slot of the program for packets that come from an endpoint.
pub const PROGRAM_POD: u32 = 0;
/// `PROGRAMS` slot of the program for packets that come out of the tunnel.
pub const PROGRAM_TUNNEL: u32 = 1;
/// How many slots `PROGRAMS` has; the rest is for later stages of the two.
pub const PROGRAM_SLOTS: u32 = 16;

/// An address in network byte order; IPv4 as IPv4-mapped (`::ffff:a.b.c.d`, RFC 4291 2.5.5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(C)]
pub struct Addr {
    /// The sixteen octets as four words, each as it stands in memory.
    pub words: [u32; 4],
}

impl Addr {
    /// The third word of every IPv4-mapped address.
    pub const V4_MARK: u32 = 0x0000_ffff_u32.to_be();

    /// An IPv4 address given as its four octets in memory order.
    #[must_use]
    #[inline(always)]
    pub const fn from_v4_be(address_be: u32) -> Self {
        Self {
            words: [0, 0, Self::V4_MARK, address_be],
        }
    }

    /// An IPv4 address as an integer in host byte order.
    #[must_use]
    pub const fn from_v4(address: u32) -> Self {
        Self::from_v4_be(address.to_be())
    }

    /// An IPv6 address as an integer in host byte order.
    #[must_use]
    pub const fn from_v6(address: u128) -> Self {
        Self {
            words: [
                ((address >> 96) as u32).to_be(),
                ((address >> 64) as u32).to_be(),
                ((address >> 32) as u32).to_be(),
                (address as u32).to_be(),
            ],
        }
    }

    /// Whether this is IPv4.
    #[must_use]
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == Self::V4_MARK
    }

    /// The IPv4 octets in memory order; meaningful only where [`Addr::is_v4`].
    #[must_use]
    #[inline(always)]
    pub const fn v4_be(&self) -> u32 {
        self.words[3]
    }

    /// The place in `LOCAL_DIRECT` of an endpoint address: by the last eleven bits, IPv4 in the upper half.
    #[must_use]
    #[inline(always)]
    pub const fn direct(&self) -> u32 {
        const HALF: u32 = DIRECT_PLACES / 2;
        let half = if self.is_v4() { HALF } else { 0 };
        u32::from_be(self.words[3]) & (HALF - 1) | half
    }

    /// The key of `PEERS` for an endpoint address: IPv6 without the endpoint's number, IPv4 the first address of its
    /// /27 block.
    #[must_use]
    #[inline(always)]
    pub const fn of_peer(&self) -> Self {
        let [first, second, third, last] = self.words;
        let mask = if self.is_v4() {
            (!(BLOCK4_SIZE - 1)).to_be()
        } else {
            0
        };
        Self {
            words: [first, second, third, last & mask],
        }
    }

    /// The address as an IPv6 integer in host byte order (IPv4 stays mapped).
    #[must_use]
    pub const fn to_bits(&self) -> u128 {
        ((u32::from_be(self.words[0]) as u128) << 96)
            | ((u32::from_be(self.words[1]) as u128) << 64)
            | ((u32::from_be(self.words[2]) as u128) << 32)
            | u32::from_be(self.words[3]) as u128
    }
}

/// Packets that would begin a flow wait, while flows are moved to other maps.
pub const CONFIG_HOLD_NEW: u32 = 1 << 0;
/// Packets that belong to no known flow wait, while the last flows are brought from older maps.
pub const CONFIG_HOLD_UNKNOWN: u32 = 1 << 1;

/// What the mesh and this node are. One element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Config {
    /// Seed of the flow hash; the same on every node of a mesh.
    pub seed: u64,
    /// First address of the mesh's IPv6 /48.
    pub mesh6: Addr,
    /// First address of the mesh's IPv4 space; all zero words where IPv4 is off.
    pub mesh4: Addr,
    /// The node endpoint's addresses.
    pub node6: Addr,
    /// All zero words where IPv4 is off.
    pub node4: Addr,
    /// Prefix length of `mesh4`, 12 to 16; 0 where IPv4 is off.
    pub mesh4_len: u32,
    /// This node's number.
    pub node: u32,
    /// The tunnel device; 0 while there is none.
    pub tunnel_ifindex: u32,
    /// The largest inner packet (L3 bytes) the tunnel device takes; 0 while there is none.
    pub tunnel_mtu: u32,
    /// `CONFIG_...` flags.
    pub flags: u32,
    /// Nothing waits from this second of kernel monotonic time on.
    pub hold_until_s: u32,
}

/// Delivery of this endpoint is a plain redirect to `ifindex` (the node endpoint); else redirect to its peer.
pub const ENDPOINT_PLAIN_REDIRECT: u32 = 1;
/// Its service asked that its connections within the node be spliced.
pub const ENDPOINT_SPLICE: u32 = 2;

/// One attached interface: what stands behind a host-side link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Endpoint {
    /// The endpoint's IPv6 address.
    pub addr6: Addr,
    /// The endpoint's IPv4 address; all zero words where it has none.
    pub addr4: Addr,
    /// The endpoint's number on this node.
    pub number: u32,
    /// The host-side link.
    pub ifindex: u32,
    /// `ENDPOINT_...` flags.
    pub flags: u32,
    /// How many TCP connections it may have, and half as many of each other kind: `FLOWS_LRU` has half of the
    /// entries. 0 is no limit.
    pub quota: u32,
    /// The interface's own MAC address (inside the pod).
    pub mac: [u8; 6],
    /// The host-side link's MAC address, the source of delivered frames.
    pub host_mac: [u8; 6],
    /// Zero.
    pub pad: u32,
}

/// How many places `ENDPOINTS_DIRECT` and `LOCAL_DIRECT` have. They answer what `ENDPOINTS` and `LOCAL` know without a
/// hash: where a place is empty, or another's, the hash map is asked.
pub const DIRECT_PLACES: u32 = 4096;

/// The place of a host-side link in `ENDPOINTS_DIRECT`.
#[must_use]
#[inline(always)]
pub const fn direct_link(ifindex: u32) -> u32 {
    ifindex & (DIRECT_PLACES - 1)
}

impl Endpoint {
    /// Whether this is what `ENDPOINTS` has of the link `ifindex`. An empty place is nobody's.
    #[must_use]
    #[inline(always)]
    pub const fn is_at(&self, ifindex: u32) -> bool {
        self.ifindex == ifindex && ifindex != 0
    }

    /// Whether this is what `LOCAL` has of `address`. An empty place, and one that is being written, is nobody's.
    #[must_use]
    #[inline(always)]
    pub fn has(&self, address: &Addr) -> bool {
        let own = if address.is_v4() {
            &self.addr4
        } else {
            &self.addr6
        };
        self.ifindex != 0 && own == address
    }
}

/// A declared port of a VIP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(C)]
pub struct VipKey {
    /// The VIP.
    pub addr: Addr,
    /// The port; [`VIP_ITSELF_PORT`] for the VIP itself.
    pub port_be: u16,
    /// The protocol; the family's ICMP for the VIP itself.
    pub proto: u8,
    /// Zero.
    pub pad: u8,
}

/// Its UDP flows move to another backend at once when theirs drains or dies; else they end with it.
pub const VIP_FOLLOW: u8 = 1;

/// Where the flows of a declared port go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Vip {
    /// First slot of its run in `SLOTS`.
    pub slot_base: u32,
    /// Length of the run; 0 is "no backend now".
    pub slot_count: u32,
    /// The service's number, for counters.
    pub service: u32,
    /// The port on the backend; 0 for the VIP itself.
    pub target_port_be: u16,
    /// The policy's code, as in the address.
    pub policy: u8,
    /// `VIP_...` flags.
    pub flags: u8,
    /// Its element of `VIP_COUNTS`, the same for every entry of a service's policy; 0 is shared by what has none.
    pub counter: u32,
}

/// New flows may pick it, and its flows go on.
pub const BACKEND_LIVE: u32 = 1;
/// Its flows go on; no slot points at it.
pub const BACKEND_DRAINING: u32 = 2;

/// One backend: an instance's endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Backend {
    /// Its IPv6 address.
    pub addr6: Addr,
    /// Its IPv4 address; all zero words where it has none.
    pub addr4: Addr,
    /// The number of its node.
    pub node: u32,
    /// Raised whenever the index names another backend; a flow that remembers an older one is dead.
    pub generation: u32,
    /// `BACKEND_...` flags; 0 is dead: its flows are ended.
    pub flags: u32,
    /// Zero.
    pub pad: u32,
}

/// The largest packet (L3 bytes) that every path carries, if need be in pieces of the tunnel's own packet: the
/// smallest MTU of a link with IPv6 (RFC 8200 section 5).
pub const PATH_FLOOR: u32 = 1280;

/// UDP port of the path probes on every node endpoint. What the node endpoint sends there may be larger than the path
/// is known to carry: that is how it is measured.
pub const PATH_PORT: u16 = 9339;

/// What is known of the path to another node. The key in `PEERS` is what all its endpoint addresses have in common,
/// see [`Addr::of_peer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Peer {
    /// The node's number.
    pub node: u32,
    /// The largest inner packet (L3 bytes) that reaches it, at least [`PATH_FLOOR`].
    pub mtu: u32,
}

/// The fragments of one datagram: those of one (source, destination, identification, protocol) (RFC 791; RFC 8200
/// section 4.5, where the protocol does not count and is zero) that come from one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(C)]
pub struct FragmentKey {
    /// Source address, before translation.
    pub src: Addr,
    /// Destination address, before translation.
    pub dst: Addr,
    /// Identification, as it stands in the packet (IPv4: in the first two bytes).
    pub id_be: u32,
    /// The number of the endpoint that sends; 0 for the tunnel.
    pub endpoint: u32,
    /// IPv4's protocol; 0 for IPv6.
    pub proto: u8,
    /// Zero.
    pub pad: [u8; 3],
}

/// What the first fragment of a datagram became; the later ones, which have no ports, become the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Fragment {
    /// Kernel monotonic time of the first fragment, ns.
    pub seen_ns: u64,
    /// Source address after translation.
    pub src: Addr,
    /// Destination address after translation.
    pub dst: Addr,
    /// Bytes of the datagram that the first fragment holds: no later one may begin before.
    pub length: u32,
    /// For whom the datagram is counted: the VIP's counter and the backend's index; 0 for nobody.
    pub counter: u32,
    /// See `counter`.
    pub backend: u32,
    /// `FLOW_...` direction of the first fragment.
    pub direction: u32,
}

/// From the client toward the backend.
pub const FLOW_FORWARD: u8 = 0;
/// From the backend toward the client.
pub const FLOW_REVERSE: u8 = 1;
/// Not translated: notes that a UDP datagram was delivered to a local endpoint, so that its answer may leave.
pub const FLOW_INBOUND: u8 = 2;

/// A flow as it is seen on the wire at the hook, before translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(C)]
pub struct FlowKey {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Source port; the identifier of an ICMP echo request, 0 for a reply.
    pub sport_be: u16,
    /// Destination port; the identifier of an ICMP echo reply, 0 for a request.
    pub dport_be: u16,
    /// The client's endpoint number on this node (for [`FLOW_INBOUND`]: the local endpoint's; for the reverse
    /// entry of a [`FLOW_HAIRPIN`] flow: the node endpoint's, because that is whom the backend answers).
    pub endpoint: u32,
    /// Protocol.
    pub proto: u8,
    /// `FLOW_FORWARD`, `FLOW_REVERSE` or `FLOW_INBOUND`.
    pub direction: u8,
    /// Zero. In `AGEING`: which connection of this tuple is meant ([`age_tag`]).
    pub pad: u16,
}

/// What tells a connection from others that had or will have its tuple: a part of its client's initial sequence number,
/// which is another each time. 0 stands for any.
#[must_use]
#[inline(always)]
pub const fn age_tag(isn_be: u32) -> u16 {
    (isn_be ^ isn_be >> 16) as u16
}

/// The client's SYN was seen.
pub const FLOW_SYN: u32 = 1 << 0;
/// The backend's SYN and ACK were seen.
pub const FLOW_SYN_ACK: u32 = 1 << 1;
/// The client has answered the backend's SYN and ACK; without it, a TCP flow gives way to others.
pub const FLOW_ESTABLISHED: u32 = 1 << 2;
/// The client's FIN was seen.
pub const FLOW_FIN_CLIENT: u32 = 1 << 3;
/// The backend's FIN was seen.
pub const FLOW_FIN_BACKEND: u32 = 1 << 4;
/// A RST was seen.
pub const FLOW_RST: u32 = 1 << 5;
/// The client is its own backend: its source is the node endpoint's address on the way to itself.
pub const FLOW_HAIRPIN: u32 = 1 << 6;
/// Forward, TCP: its key has been in `AGEING` since it was opened. Without it the key is put there when it ends.
pub const FLOW_QUEUED: u32 = 1 << 7;
/// Only the acknowledgement of the last FIN is to come, through this entry; the reverse entry's [`Flow::isn_be`] is its
/// number.
pub const FLOW_LAST_ACK: u32 = 1 << 8;

/// What to write into a packet of a flow, and what is known of the flow. Its first 48 bytes are the whole of layout version 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Flow {
    /// Kernel monotonic time of the last packet, ns (`bpf_ktime_get_ns`), refreshed at least once a second while it is used.
    pub last_seen_ns: u64,
    /// Forward: the backend's address (new destination). Reverse: the VIP (new source).
    pub addr: Addr,
    /// Forward: the backend's port (new destination port). Reverse: the VIP's port (new source port).
    pub port_be: u16,
    /// Forward: the source port on the wire to the backend. Reverse: the client's own source port.
    pub client_port_be: u16,
    /// `FLOW_...` bits.
    pub flags: u32,
    /// The backend's index.
    pub backend: u32,
    /// The backend's generation when it was picked.
    pub generation: u32,
    /// Initial sequence number of the client's SYN. In the reverse entry, once a side has ended: the number that
    /// acknowledges its FIN, then the number that acknowledges the other's.
    pub isn_be: u32,
    /// The service's number, for counters.
    pub service: u32,
    /// Kernel monotonic time of its first packet, seconds.
    pub born_s: u32,
    /// The VIP's element of `VIP_COUNTS`; 0 is shared by what has none.
    pub counter: u32,
}

/// How many places `FLOWS_DIRECT` has.
pub const DIRECT_FLOWS: u32 = 16_384;

/// The place in `FLOWS_DIRECT` of the connection with this key, of either direction: by the client and its port on this side
/// of the translation. Clients take every second port in turn (Linux: the even ones first), so that a client's
/// connections come to lie side by side.
#[must_use]
#[inline(always)]
pub const fn direct_flow(key: &FlowKey) -> u32 {
    /// 2 to the power of 16, divided by the golden ratio: spreads numbers that follow each other.
    const SPREAD: u32 = 40_503;
    let port_be = match key.direction {
        FLOW_REVERSE => key.dport_be,
        _ => key.sport_be,
    };
    let port = u16::from_be(port_be);
    (port.rotate_right(1) as u32).wrapping_add(key.endpoint.wrapping_mul(SPREAD))
        & (DIRECT_FLOWS - 1)
}

/// [`Connection::state`]: nothing is here. The other bits are a number that is another each time the place is taken.
pub const PLACE_EMPTY: u64 = 0;
/// Somebody writes a connection here.
pub const PLACE_TAKEN: u64 = 1;
/// There is a connection here.
pub const PLACE_LIVE: u64 = 2;
/// The bits of [`Connection::state`] that say which of these.
pub const PLACE_BITS: u64 = 3;

/// A place of `FLOWS_DIRECT`: both entries of a connection whose client port is the same on both sides and that is no
/// hairpin. They come and go together, by one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Connection {
    /// `PLACE_...`, and which connection it is of those that the place has had.
    pub state: u64,
    /// The key of the forward entry.
    pub key: FlowKey,
    /// Kernel monotonic time at which an entry whose place this is was last put into `FLOWS`, seconds, at least 1; 0: `FLOWS` has
    /// none, and need not be asked.
    pub spilled_s: u32,
    /// The forward entry.
    pub forward: Flow,
    /// The reverse entry.
    pub reverse: Flow,
}

impl Connection {
    /// Whether the forward entry's key is this one.
    #[must_use]
    #[inline(always)]
    pub fn is_asked_by(&self, key: &FlowKey) -> bool {
        key.sport_be == self.key.sport_be
            && key.dport_be == self.key.dport_be
            && key.endpoint == self.key.endpoint
            && key.dst == self.key.dst
            && key.src == self.key.src
    }

    /// Whether the reverse entry's key is this one.
    #[must_use]
    #[inline(always)]
    pub fn is_answered_by(&self, key: &FlowKey) -> bool {
        key.sport_be == self.forward.port_be
            && key.dport_be == self.forward.client_port_be
            && key.endpoint == self.key.endpoint
            && key.src == self.forward.addr
            && key.dst == self.key.src
    }

    /// The key of the reverse entry.
    #[must_use]
    pub const fn reverse_key(&self) -> FlowKey {
        FlowKey {
            src: self.forward.addr,
            dst: self.key.src,
            sport_be: self.forward.port_be,
            dport_be: self.forward.client_port_be,
            endpoint: self.key.endpoint,
            proto: self.key.proto,
            direction: FLOW_REVERSE,
            pad: 0,
        }
    }
}

/// What one CPU counted of a VIP or of a backend. The packets of an aggregate (GSO, GRO) count one by one, its
/// bytes as it is: IP header and payload, one header per aggregate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Count {
    /// Packets that passed, by [`FLOW_FORWARD`] and [`FLOW_REVERSE`].
    pub packets: [u64; 2],
    /// Their bytes.
    pub bytes: [u64; 2],
    /// Flows that were opened.
    pub flows: u64,
}

/// Event: a flow was opened. The values of [`Event::kind`]; 0 is none.
pub const EVENT_OPENED: u32 = 1;
/// Event: both directions of a connection have ended, or it was reset; `detail` is its age in seconds.
pub const EVENT_ENDED: u32 = 2;
/// Event: a packet was refused; `detail` is the [`Reason`](crate::reason::Reason).
pub const EVENT_REFUSED: u32 = 3;
/// Event: a marked packet was handed to a local endpoint; `detail` is its number.
pub const EVENT_DELIVERED: u32 = 4;
/// Event: a marked packet was sent into the tunnel.
pub const EVENT_TUNNELLED: u32 = 5;

/// The mark of a probe, which survives tunnels and translation: the upper half of a TCP SYN's sequence number (so
/// of the acknowledgement number of what answers it), or the sequence number of an ICMP echo. Whoever sends it by
/// chance or on purpose is in the log, within [`LOG_MARKED_PER_SECOND`].
pub const LOG_MARK: u16 = 0x57ef;
/// How many events of marked packets a CPU writes in a second.
pub const LOG_MARKED_PER_SECOND: u32 = 100;

/// What the flow log shall hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct LogConfig {
    /// One flow in so many; 0 is none.
    pub sample_every: u32,
    /// How many events a CPU writes in a second.
    pub per_second: u32,
}

/// What one CPU knows of its log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct LogState {
    /// When the second began, kernel monotonic time, ns.
    pub since_ns: u64,
    /// Events in it.
    pub used: u32,
    /// Events of marked packets in it.
    pub used_marked: u32,
    /// Events written.
    pub written: u64,
    /// Events not written because the second had its share.
    pub limited: u64,
    /// Events not written because the ring was full.
    pub lost: u64,
}

/// One event of the flow log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Event {
    /// Kernel monotonic time, ns, of the timer tick's resolution.
    pub time_ns: u64,
    /// The packet as it came: source.
    pub src: Addr,
    /// Destination.
    pub dst: Addr,
    /// What it became: source; zero where it was not translated, as are the next three.
    pub to_src: Addr,
    /// Destination.
    pub to_dst: Addr,
    /// The packet as it came: source port.
    pub sport_be: u16,
    /// Destination port.
    pub dport_be: u16,
    /// What it became: source port.
    pub to_sport_be: u16,
    /// Destination port.
    pub to_dport_be: u16,
    /// The VIP's element of `VIP_COUNTS`; 0 where it is not known.
    pub counter: u32,
    /// The backend's index; 0 where there is none.
    pub backend: u32,
    /// The number of the endpoint that sent it; 0 is the tunnel.
    pub sender: u32,
    /// What the kind says.
    pub detail: u32,
    /// `EVENT_...`.
    pub kind: u8,
    /// The protocol.
    pub proto: u8,
    /// Whether the packet carried [`LOG_MARK`]: 0 or 1.
    pub marked: u8,
    /// [`FLOW_FORWARD`] or [`FLOW_REVERSE`], of a translated packet.
    pub direction: u8,
    /// Zero.
    pub pad: u32,
}

/// Whose refused packets an element of `REFUSED` counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(C)]
pub struct RefusedKey {
    /// The VIP's element of `VIP_COUNTS`.
    pub counter: u32,
    /// The [`Reason`](crate::reason::Reason).
    pub reason: u32,
}

/// TCP connections that an endpoint opened.
pub const ACCOUNT_TCP: usize = 0;
/// UDP flows and echoes that an endpoint began.
pub const ACCOUNT_DATAGRAM: usize = 1;
/// Notes of datagrams that were delivered to an endpoint untranslated ([`FLOW_INBOUND`]).
pub const ACCOUNT_INBOUND: usize = 2;
/// How many kinds of flows are counted; one is spare.
pub const ACCOUNT_KINDS: usize = 4;

/// How many flows an endpoint opened and closed, by kind. Only the programs write it, so that nothing that they
/// count is lost between two readers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Account {
    /// Flows that got an entry.
    pub opened: [u64; ACCOUNT_KINDS],
    /// Flows that ended, or whose entry a program removed.
    pub closed: [u64; ACCOUNT_KINDS],
}

/// How many flows of an endpoint ended without a program's doing, by kind: collected by user space, evicted from
/// `FLOWS_LRU`. Only user space writes it. An endpoint has `opened - closed - gone` flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Settled {
    /// Flows that are gone.
    pub gone: [u64; ACCOUNT_KINDS],
}

impl Endpoint {
    /// How many flows of a kind it may have; 0 is no limit.
    #[must_use]
    #[inline(always)]
    pub const fn quota_of(&self, kind: usize) -> u32 {
        match kind {
            ACCOUNT_TCP => self.quota,
            _ => self.quota.div_ceil(2),
        }
    }
}

impl Account {
    /// How many flows of a kind there are; `gone` is [`Settled`]'s word. Less than none counts as none: a
    /// correction may be ahead for a moment.
    #[must_use]
    #[inline(always)]
    pub const fn used(opened: u64, closed: u64, gone: u64) -> u64 {
        let used = opened.wrapping_sub(closed).wrapping_sub(gone);
        if used > u64::MAX / 2 { 0 } else { used }
    }
}

const _: () = {
    assert!(size_of::<Count>() == 40);
    assert!(size_of::<RefusedKey>() == 8);
    assert!(size_of::<LogConfig>() == 8);
    assert!(size_of::<LogState>() == 40);
    assert!(size_of::<Event>() == 104);
    assert!(size_of::<Addr>() == 16);
    assert!(size_of::<Config>() == 96);
    assert!(size_of::<Endpoint>() == 64);
    assert!(size_of::<VipKey>() == 20);
    assert!(size_of::<Vip>() == 20);
    assert!(size_of::<Backend>() == 48);
    assert!(size_of::<FlowKey>() == 44);
    assert!(size_of::<Flow>() == 56);
    assert!(size_of::<Connection>() == 168);
    assert!(size_of::<Peer>() == 8);
    assert!(size_of::<FragmentKey>() == 44);
    assert!(size_of::<Fragment>() == 56);
    assert!(size_of::<Account>() == 64);
    assert!(size_of::<Settled>() == 32);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_address_is_mapped() {
        let addr = Addr::from_v4(u32::from_be_bytes([10, 24, 1, 2]));
        assert!(addr.is_v4());
        assert_eq!(addr.v4_be().to_ne_bytes(), [10, 24, 1, 2]);
        assert_eq!(addr.to_bits(), 0xffff_0a18_0102);
        assert_eq!(addr, Addr::from_v6(0xffff_0a18_0102));
    }

    #[test]
    fn an_ipv6_address_keeps_its_octets() {
        let bits = 0xfd12_3456_789a_1100_0000_0003_0000_0001;
        let addr = Addr::from_v6(bits);
        assert!(!addr.is_v4());
        assert_eq!(addr.to_bits(), bits);
        assert_eq!(addr.words[0].to_ne_bytes(), [0xfd, 0x12, 0x34, 0x56]);
    }

    #[test]
    fn a_place_belongs_to_who_has_the_address_and_an_empty_one_to_nobody() {
        let (v4, v6) = (Addr::from_v4(0x0a10_0021), Addr::from_v6((0xfd << 120) | 1));
        let whole = Endpoint {
            addr4: v4,
            addr6: v6,
            ifindex: 7,
            ..Endpoint::default()
        };
        assert!(whole.has(&v4) && whole.has(&v6) && whole.is_at(7));
        assert!(!whole.has(&Addr::from_v4(0x0a10_0022)) && !whole.is_at(8));
        // No IPv4, or half written, or never.
        let six = Endpoint {
            addr4: Addr::default(),
            ..whole
        };
        assert!(!six.has(&Addr::default()) && !six.has(&Addr::from_v4(0)));
        let half = Endpoint {
            ifindex: 0,
            ..whole
        };
        assert!(!half.has(&v6) && !half.is_at(0));
        assert!(!Endpoint::default().has(&Addr::default()));
    }

    #[test]
    fn the_families_have_their_own_half_of_the_places() {
        let half = DIRECT_PLACES / 2;
        assert_eq!(Addr::from_v6(u128::from(half) | 5).direct(), 5);
        assert_eq!(Addr::from_v4(half | 5).direct(), half | 5);
        assert_eq!(Addr::from_v4(u32::MAX).direct(), DIRECT_PLACES - 1);
        assert_eq!(direct_link(DIRECT_PLACES + 3), 3);
    }

    #[test]
    fn all_endpoints_of_a_node_share_a_peer_and_no_others_do() {
        let v6 = |node: u128, endpoint| {
            Addr::from_v6(0xfd12_3456_789a_0000_0000 << 48 | node << 32 | endpoint).of_peer()
        };
        assert_eq!(v6(7, 1), v6(7, u128::from(u32::MAX)));
        assert_ne!(v6(7, 1), v6(8, 1));
        let v4 = |d| Addr::from_v4(u32::from_be_bytes([10, 16, 3, d])).of_peer();
        assert_eq!(v4(32), v4(63));
        assert_eq!(v4(63), Addr::from_v4(u32::from_be_bytes([10, 16, 3, 32])));
        assert_ne!(v4(31), v4(32));
    }
}
