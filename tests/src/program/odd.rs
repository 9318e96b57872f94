//! Packets that are not plain, made of plain ones and made plain again: options, extension headers, fragments.

use super::packet::{fold, sum};

/// IPv6 extension headers (IANA).
pub const HOP_BY_HOP: u8 = 0;
/// Routing.
pub const ROUTING: u8 = 43;
/// Fragment.
pub const FRAGMENT: u8 = 44;
/// Destination options.
pub const DESTINATION: u8 = 60;
/// Authentication.
pub const AUTHENTICATION: u8 = 51;

/// An extension header of `len` bytes that holds padding (RFC 8200 section 4.2); `next` is filled in later.
#[must_use]
pub fn padding(len: usize) -> Vec<u8> {
    let mut header = vec![0; len];
    header[1] = u8::try_from(len / 8 - 1).expect("a header of at most 2048 bytes");
    header[2] = 1;
    header[3] = u8::try_from(len - 4).expect("one padding option");
    header
}

/// An IPv4 packet with `options`, whose length is a multiple of four.
#[must_use]
pub fn with_options(packet: &[u8], options: &[u8]) -> Vec<u8> {
    let mut out = packet[..20].to_vec();
    out.extend(options);
    out.extend(&packet[20..]);
    out[0] = 0x40 | u8::try_from((20 + options.len()) / 4).expect("at most 60 bytes");
    set_length4(&mut out);
    out
}

/// An IPv6 packet with extension headers, each with its kind.
#[must_use]
pub fn with_headers(packet: &[u8], headers: &[(u8, Vec<u8>)]) -> Vec<u8> {
    let mut out = packet[..40].to_vec();
    let mut next = packet[6];
    let mut chain = Vec::new();
    for (kind, header) in headers.iter().rev() {
        let mut header = header.clone();
        header[0] = next;
        next = *kind;
        chain.splice(0..0, header);
    }
    out[6] = next;
    out.extend(chain);
    out.extend(&packet[40..]);
    set_length6(&mut out);
    out
}

/// A packet without its options or extension headers, and those.
#[must_use]
pub fn plain(packet: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let end = transport(packet);
    let header = if packet[0] >> 4 == 4 { 20 } else { 40 };
    let mut out = packet[..header].to_vec();
    out.extend(&packet[end..]);
    if header == 20 {
        out[0] = 0x45;
        set_length4(&mut out);
    } else {
        out[6] = next_of(packet);
        set_length6(&mut out);
    }
    (out, packet[header..end].to_vec())
}

/// Where a packet's transport header is.
fn transport(packet: &[u8]) -> usize {
    walk(packet).0
}

fn next_of(packet: &[u8]) -> u8 {
    walk(packet).1
}

fn walk(packet: &[u8]) -> (usize, u8) {
    if packet[0] >> 4 == 4 {
        return (usize::from(packet[0] & 15) * 4, packet[9]);
    }
    let (mut at, mut next) = (40, packet[6]);
    while matches!(next, HOP_BY_HOP | ROUTING | DESTINATION | FRAGMENT) {
        let len = if next == FRAGMENT {
            8
        } else {
            (usize::from(packet[at + 1]) + 1) * 8
        };
        next = packet[at];
        at += len;
    }
    (at, next)
}

/// The packet in pieces that hold `size` bytes each, as its sender would make them.
#[must_use]
pub fn fragments(packet: &[u8], size: usize, id: u16) -> Vec<Vec<u8>> {
    let header = if packet[0] >> 4 == 4 { 20 } else { 40 };
    let payload = &packet[header..];
    let count = payload.chunks(size).count();
    payload
        .chunks(size)
        .enumerate()
        .map(|(number, piece)| piece_of(packet, number * size, piece, number + 1 < count, id))
        .collect()
}

/// One piece: `bytes` at `offset` of what follows the IP header of `packet`.
#[must_use]
pub fn piece_of(packet: &[u8], offset: usize, bytes: &[u8], more: bool, id: u16) -> Vec<u8> {
    let place = u16::try_from(offset).expect("a datagram's length");
    if packet[0] >> 4 == 4 {
        let mut out = packet[..20].to_vec();
        out.extend(bytes);
        out[4..6].copy_from_slice(&id.to_be_bytes());
        let word = (place / 8) | if more { 0x2000 } else { 0 };
        out[6..8].copy_from_slice(&word.to_be_bytes());
        set_length4(&mut out);
        return out;
    }
    let mut out = packet[..40].to_vec();
    let [high, low] = (place | u16::from(more)).to_be_bytes();
    let [id_high, id_low] = id.to_be_bytes();
    out.extend([packet[6], 0, high, low, 0, 7, id_high, id_low]);
    out[6] = FRAGMENT;
    out.extend(bytes);
    set_length6(&mut out);
    out
}

/// The packet that whole pieces in their order are.
#[must_use]
pub fn reassembled(pieces: &[Vec<u8>]) -> Vec<u8> {
    let v4 = pieces[0][0] >> 4 == 4;
    let header = if v4 { 20 } else { 40 };
    let mut out = pieces[0][..header].to_vec();
    for piece in pieces {
        out.extend(&piece[if v4 { 20 } else { 48 }..]);
    }
    if v4 {
        // As the test's packets are: not to be fragmented, and with their own identification.
        out[4..8].copy_from_slice(&[0x12, 0x34, 0x40, 0]);
        set_length4(&mut out);
    } else {
        out[6] = pieces[0][40];
        set_length6(&mut out);
    }
    out
}

fn set_length4(packet: &mut [u8]) {
    let total = u16::try_from(packet.len()).expect("a packet's length");
    packet[2..4].copy_from_slice(&total.to_be_bytes());
    let header = usize::from(packet[0] & 15) * 4;
    packet[10..12].fill(0);
    let check = !fold(sum(&packet[..header]));
    packet[10..12].copy_from_slice(&check.to_be_bytes());
}

fn set_length6(packet: &mut [u8]) {
    let payload = u16::try_from(packet.len() - 40).expect("a packet's length");
    packet[4..6].copy_from_slice(&payload.to_be_bytes());
}

/// Whether an IPv4 header sums to what it says; true of any IPv6 header.
#[must_use]
pub fn has_right_header(packet: &[u8]) -> bool {
    packet[0] >> 4 == 6 || fold(sum(&packet[..usize::from(packet[0] & 15) * 4])) == 0xffff
}
