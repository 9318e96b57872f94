//! The packet at hand, and the only place that touches its memory.
//!
//! A header is handed out as a reference that borrows the [`Skb`]; what may move the packet (every helper that
//! changes it) takes the [`Skb`] mutably. So the compiler keeps the verifier's rule that no packet pointer
//! lives across such a call.

use aya_ebpf::{
    bindings::{BPF_F_INGRESS, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, TC_ACT_REDIRECT},
    helpers::generated::{
        bpf_csum_diff, bpf_l4_csum_replace, bpf_redirect, bpf_redirect_peer, bpf_skb_change_head,
        bpf_skb_change_tail, bpf_skb_change_type, bpf_skb_load_bytes, bpf_skb_store_bytes,
    },
    programs::TcContext,
};
use ebpf_common::reason::Reason;

use crate::{
    header::{Ethernet, Icmp, Ipv4, Ipv6, Tcp, Udp},
    maps,
};

/// Plain data that every byte pattern is a value of.
///
/// # Safety
///
/// `repr(C)`, no padding, no pointers, no `bool`.
pub(crate) unsafe trait Header: Copy {}
// SAFETY: integers and arrays of them, without padding (see `header.rs`).
unsafe impl Header for Ethernet {}
// SAFETY: as above.
unsafe impl Header for Ipv4 {}
// SAFETY: as above.
unsafe impl Header for Ipv6 {}
// SAFETY: as above.
unsafe impl Header for Tcp {}
// SAFETY: as above.
unsafe impl Header for Udp {}
// SAFETY: as above.
unsafe impl Header for Icmp {}
// SAFETY: an array of integers.
unsafe impl<const N: usize> Header for [u8; N] {}
// SAFETY: an array of integers.
unsafe impl<const N: usize> Header for [u16; N] {}
// SAFETY: an array of integers.
unsafe impl<const N: usize> Header for [u32; N] {}

/// Whether a transport checksum covers the pseudo header that changes with the addresses, and how UDP says "none".
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Covers {
    /// Only what follows the IP header.
    Payload,
    /// The pseudo header.
    Pseudo,
}

/// `pkt_type` of a frame that is for this host (`PACKET_HOST`, linux/if_packet.h).
const PACKET_HOST: u32 = 0;
/// The packet at hand.
pub(crate) struct Skb(TcContext);

impl Skb {
    #[inline(always)]
    pub(crate) fn new(context: TcContext) -> Self {
        Self(context)
    }

    /// Bytes from the first header on, with what is not linear.
    #[inline(always)]
    pub(crate) fn len(&self) -> u32 {
        self.0.len()
    }

    /// The device whose hook this is.
    #[inline(always)]
    pub(crate) fn ifindex(&self) -> u32 {
        // SAFETY: the context is valid for the run of the program.
        unsafe { (*self.0.skb.skb).ifindex }
    }

    /// Payload bytes of each segment of an aggregate; 0 for a packet that is one.
    #[inline(always)]
    pub(crate) fn segment_len(&self) -> u32 {
        // SAFETY: as for `ifindex`.
        unsafe { (*self.0.skb.skb).gso_size }
    }

    /// How many packets an aggregate is of; 0 or 1 for a packet that is one.
    #[inline(always)]
    pub(crate) fn segments(&self) -> u32 {
        // SAFETY: as for `ifindex`.
        unsafe { (*self.0.skb.skb).gso_segs }
    }

    /// The header at `offset`; `None` where the packet's linear part is shorter.
    #[inline(always)]
    pub(crate) fn header<T: Header>(&self, offset: usize) -> Option<&T> {
        let start = self.0.data() + offset;
        if start + size_of::<T>() > self.0.data_end() {
            return None;
        }
        // SAFETY: `offset..offset + size` lies in the packet, `T` is plain data, and the borrow of `self` ends
        // before anything can move the packet. For the alignment see `header.rs`.
        Some(unsafe { &*(start as *const T) })
    }

    /// The octet at `offset`. It is copied: from a comparison that leaves one octet before the packet's end the
    /// verifier learns nothing.
    #[inline(always)]
    pub(crate) fn octet(&self, offset: usize) -> Option<u8> {
        let mut octet = [0];
        self.load(offset, &mut octet)?;
        Some(octet[0])
    }

    /// The header at `offset`, to be written.
    #[inline(always)]
    pub(crate) fn header_mut<T: Header>(&mut self, offset: usize) -> Option<&mut T> {
        let start = self.0.data() + offset;
        if start + size_of::<T>() > self.0.data_end() {
            return None;
        }
        // SAFETY: as for `header`; the kernel makes the linear part writable before a program that writes runs.
        Some(unsafe { &mut *(start as *mut T) })
    }

    /// Makes `depth` bytes from the first header on linear, or all where there are fewer. Pulling more than the
    /// headers would copy the head of every packet whose payload is in fragments.
    #[inline(always)]
    pub(crate) fn pull(&mut self, depth: usize) {
        let depth = depth as u32;
        let want = if self.len() < depth {
            self.len()
        } else {
            depth
        };
        let linear = self.0.data_end() - self.0.data();
        if (linear as u32) < want {
            // A failure shows as a header that is not there.
            let _ = self.0.pull_data(want);
        }
    }

    /// Adds `difference` to the transport checksum at `offset`, right for offloaded and finished checksums.
    #[inline(always)]
    pub(crate) fn add_to_checksum(
        &mut self,
        offset: usize,
        difference: u32,
        covers: Covers,
        udp: u64,
    ) -> Result<(), Reason> {
        let flags = udp
            | match covers {
                Covers::Payload => 0,
                Covers::Pseudo => u64::from(BPF_F_PSEUDO_HDR),
            };
        // SAFETY: the context is valid; the kernel checks the offset.
        let result = unsafe {
            bpf_l4_csum_replace(
                self.0.skb.skb,
                offset as u32,
                0,
                u64::from(difference),
                flags,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(Reason::Internal)
        }
    }

    /// Cuts or grows the packet's end.
    #[inline(always)]
    pub(crate) fn resize(&mut self, len: usize) -> Result<(), Reason> {
        // SAFETY: the context is valid; the kernel checks the length.
        match unsafe { bpf_skb_change_tail(self.0.skb.skb, len as u32, 0) } {
            0 => Ok(()),
            _ => Err(Reason::Internal),
        }
    }

    /// Copies `to.len()` bytes of the packet from `offset` on.
    #[inline(always)]
    pub(crate) fn load(&self, offset: usize, to: &mut [u8]) -> Option<()> {
        // SAFETY: the context is valid; `to` is writable for its length; the kernel checks offset and length.
        let result = unsafe {
            bpf_skb_load_bytes(
                self.0.skb.skb.cast(),
                offset as u32,
                to.as_mut_ptr().cast(),
                to.len() as u32,
            )
        };
        (result == 0).then_some(())
    }

    /// Writes bytes into the packet from `offset` on.
    #[inline(always)]
    pub(crate) fn store(&mut self, offset: usize, from: &[u8]) -> Option<()> {
        // SAFETY: the context is valid; `from` is readable for its length; the kernel checks offset and length.
        let result = unsafe {
            bpf_skb_store_bytes(
                self.0.skb.skb,
                offset as u32,
                from.as_ptr().cast(),
                from.len() as u32,
                0,
            )
        };
        (result == 0).then_some(())
    }

    /// Makes room for `len` bytes before the first header.
    #[inline(always)]
    pub(crate) fn grow_head(&mut self, len: usize) -> Result<(), Reason> {
        // SAFETY: the context is valid; the kernel checks the length.
        match unsafe { bpf_skb_change_head(self.0.skb.skb, len as u32, 0) } {
            0 => Ok(()),
            _ => Err(Reason::Internal),
        }
    }

    /// Marks a frame that was addressed to another MAC as the receiver's own.
    #[inline(always)]
    pub(crate) fn accept(&mut self) {
        // SAFETY: the context is valid.
        unsafe {
            if (*self.0.skb.skb).pkt_type != PACKET_HOST {
                bpf_skb_change_type(self.0.skb.skb, PACKET_HOST);
            }
        }
    }

    /// Runs the program in a slot of `PROGRAMS` instead; comes back only where that is not possible.
    #[inline(always)]
    pub(crate) fn start_over(&self, slot: u32) {
        maps::call(&self.0, slot);
    }

    /// Sends the packet out of a device.
    #[inline(always)]
    pub(crate) fn redirect(&self, ifindex: u32) -> i32 {
        // SAFETY: takes numbers only.
        unsafe { bpf_redirect(ifindex, 0) as i32 }
    }

    /// Hands the packet to a veth's other end, in its own network namespace.
    /// Puts the packet at the end of the queue of what arrives on its own link.
    #[inline(always)]
    pub(crate) fn requeue(&self) -> i32 {
        // SAFETY: the helper only notes where the packet goes; an index that is no link drops it.
        unsafe { bpf_redirect(self.ifindex(), BPF_F_INGRESS as u64) as i32 }
    }

    #[inline(always)]
    pub(crate) fn redirect_peer(&self, ifindex: u32) -> i32 {
        // SAFETY: takes numbers only.
        unsafe { bpf_redirect_peer(ifindex, 0) as i32 }
    }
}

/// Copies an address word by word: a copy as a whole, of places that may overlap, is a call that loops over octets.
#[inline(always)]
pub(crate) fn copy_address(to: &mut [u32; 4], from: &[u32; 4]) {
    let [a, b, c, d] = *from;
    for (to, from) in to.iter_mut().zip([a, b, c, d]) {
        // SAFETY: a valid reference.
        unsafe { (to as *mut u32).write_volatile(from) }
    }
}

/// The same for a hardware address, which stands at an even place wherever it stands.
#[inline(always)]
pub(crate) fn copy_mac(to: &mut [u8; 6], from: &[u8; 6]) {
    let from = from.as_ptr().cast::<u16>();
    let to = to.as_mut_ptr().cast::<u16>();
    for at in 0..3 {
        // SAFETY: three words are the six octets of each; in a frame, an `Ethernet` and an `Endpoint` they are at even
        // offsets of what is aligned to two at least.
        unsafe { to.add(at).write_volatile(from.add(at).read()) }
    }
}

/// The sum of `bytes`, whose length is a multiple of four.
#[inline(always)]
pub(crate) fn sum_of(bytes: &[u8]) -> u64 {
    // SAFETY: `bytes` is readable for its length, and the helper writes nothing.
    let sum = unsafe {
        bpf_csum_diff(
            core::ptr::null_mut(),
            0,
            bytes.as_ptr().cast_mut().cast(),
            bytes.len() as u32,
            0,
        )
    };
    sum as u64 & 0xffff_ffff
}

/// For [`Skb::add_to_checksum`]: a zero UDP checksum is none and stays so, and none becomes zero (RFC 768).
pub(crate) const UDP_CHECKSUM: u64 = BPF_F_MARK_MANGLED_0 as u64;

const _: () = assert!(TC_ACT_REDIRECT == 7);
