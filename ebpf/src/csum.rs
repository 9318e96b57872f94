//! The Internet checksum (RFC 1071) as arithmetic on native words.
//!
//! One's complement sums do not depend on byte order as long as every word is taken from memory the same way,
//! so nothing here swaps. A *difference* is what must be added to the sum of a packet when words change
//! (RFC 1624, equation 3); it does not touch memory.

/// The difference that replacing `old` by `new` makes.
#[inline(always)]
pub(crate) fn difference(old: u32, new: u32) -> u64 {
    u64::from(!old) + u64::from(new)
}

/// The difference that replacing an address by another makes.
#[inline(always)]
pub(crate) fn difference_of(old: &[u32; 4], new: &[u32; 4]) -> u64 {
    difference(old[0], new[0])
        + difference(old[1], new[1])
        + difference(old[2], new[2])
        + difference(old[3], new[3])
}

/// The difference that one hop less makes in an IPv4 header: the time to live is the first octet of its word.
pub(crate) const HOP: u64 = !u16::from_ne_bytes([1, 0]) as u64;

/// A sum as the 32 bits that the kernel's helpers take.
#[inline(always)]
pub(crate) fn fold32(sum: u64) -> u32 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    ((sum & 0xffff_ffff) + (sum >> 32)) as u32
}

/// A sum as 16 bits, not complemented.
#[inline(always)]
pub(crate) fn fold16(sum: u64) -> u16 {
    let sum = fold32(sum);
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// The checksum field after `difference`.
#[inline(always)]
pub(crate) fn updated(check: u16, difference: u64) -> u16 {
    !fold16(u64::from(!check) + difference)
}

/// The sum of an IPv6 address.
#[inline(always)]
pub(crate) fn sum(address: &[u32; 4]) -> u64 {
    u64::from(address[0]) + u64::from(address[1]) + u64::from(address[2]) + u64::from(address[3])
}
