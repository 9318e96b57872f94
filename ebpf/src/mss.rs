//! The maximum segment size of a connection through the tunnel (RFC 9293, 3.7.1): clamped to what the path carries,
//! in the SYN and in the SYN and ACK, on the way into the tunnel and out of it.
//!
//! On the way in it bounds what the other side will send, on the way out what this side will; both nodes know the
//! path in the direction in which they send. Without the option nothing is added: its absence means 536 or 1220
//! bytes, which every path carries. Between local endpoints nothing is clamped.

use ebpf_common::reason::Reason;

use crate::{
    csum,
    header::TCP_LEN,
    parse::{Family, Packet},
    skb::{Covers, Skb},
};

/// Options are what a data offset of 15 words leaves (RFC 9293).
const OPTIONS_MOST: usize = 60;
/// End of options, no operation, maximum segment size (IANA).
const END: u8 = 0;
const NOTHING: u8 = 1;
const SEGMENT: u8 = 2;

/// Clamps the option of the segment at hand, which opens or accepts a connection with a peer.
#[inline(never)]
pub(crate) fn clamp(skb: &mut Skb, packet: &mut Packet, most: u32) -> Result<(), Reason> {
    let l4 = packet.l4();
    let header = packet.l4_len as usize;
    skb.pull(l4 + OPTIONS_MOST);
    packet.at.set(TCP_LEN);
    for _ in TCP_LEN..OPTIONS_MOST {
        let at = packet.at.get() & 0x3f;
        if at >= header {
            return Ok(());
        }
        let kind = skb.octet(l4 + at).ok_or(Reason::Malformed)?;
        match kind {
            END => return Ok(()),
            NOTHING => packet.at.set(at + 1),
            SEGMENT => return write(skb, l4, l4 + at, most as u16),
            _ => {
                // A receiver that goes by an option without a length finds no segment size either.
                let Some(len) = skb.octet(l4 + at + 1).filter(|len| *len >= 2) else {
                    return Ok(());
                };
                packet.at.set(at + usize::from(len));
            }
        }
    }
    Ok(())
}

/// Puts `most` into the option at `at` where that is less.
#[inline(always)]
fn write(skb: &mut Skb, l4: usize, at: usize, most: u16) -> Result<(), Reason> {
    const CHECK: usize = 16;
    let Some([_, len, high, low]) = skb.header::<[u8; 4]>(at).copied() else {
        return Ok(());
    };
    if len != 4 || u16::from_be_bytes([high, low]) <= most {
        return Ok(());
    }
    let [new_high, new_low] = most.to_be_bytes();
    // The sum is of words from the header's start: at an odd place the two bytes are halves of two words.
    let (old, new) = if at & 1 == l4 & 1 {
        ([high, low], [new_high, new_low])
    } else {
        ([low, high], [new_low, new_high])
    };
    let difference = csum::difference(
        u32::from(u16::from_ne_bytes(old)),
        u32::from(u16::from_ne_bytes(new)),
    );
    skb.add_to_checksum(l4 + CHECK, csum::fold32(difference), Covers::Payload, 0)?;
    let option = skb.header_mut::<[u8; 4]>(at).ok_or(Reason::Internal)?;
    [option[2], option[3]] = [new_high, new_low];
    Ok(())
}

/// The largest segment in packets of `mtu` bytes.
#[inline(always)]
pub(crate) const fn most(family: Family, mtu: u32) -> u32 {
    mtu - (family.len() + TCP_LEN) as u32
}
