//! The outer side of the userspace tunnel: one UDP socket for both families, in large strides.
//!
//! Encrypted packets to one peer are nearly all of one size, so a run of them leaves in one system call and
//! crosses the stack as one packet (`UDP_SEGMENT`, udp(7)); the receiver is given such runs whole (`UDP_GRO`)
//! and splits them. Where the device under it cannot, the kernel says so once and packets go one by one.
//!
//! A packet that is too large for the underlay's path is lost, not fragmented (the do-not-fragment bit is set and
//! what the kernel believes of the path does not count): that is what the path probes measure. Only a packet that
//! holds no more than every path must carry may be fragmented, where the underlay is narrower than IPv6's minimum
//! with the tunnel's overhead on top ([`Pieces`]).

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use ebpf_common::layout::PATH_FLOOR;
use gotatun::{
    packet::{Packet, PacketBufPool},
    udp::{
        UdpRecv, UdpSend, UdpTransportFactory, UdpTransportFactoryParams,
        socket::{SockOpt, UdpSocket},
    },
};
use nix::{
    cmsg_space,
    errno::Errno,
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg,
        sendmsg, setsockopt, sockopt,
    },
};
use rustix::net::sockopt::{
    Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover,
};
use tokio::io::Interest;

use super::{POOL_BUFFERS, PacketPool};

/// Segments in one send: what every kernel that knows `UDP_SEGMENT` takes (`UDP_MAX_SEGMENTS`).
const MAX_SEGMENTS: usize = 64;
/// Bytes in one send: the largest IP packet without its IPv6 and UDP headers.
const MAX_BYTES: usize = 65_535 - 40 - 8;
/// Packets that are handed to one send at most; longer runs only add delay.
const MAX_PACKETS: usize = 128;
/// Messages in one receive; each may be a run of up to 64 KiB.
const MESSAGES: usize = 16;
/// Bytes of one received run.
const RUN_BYTES: usize = 65_536;
/// Socket buffers: 10 ms at 2 Gbit/s, because the reader shares its CPU with the encryption.
const SOCKET_BUFFER: usize = 4 << 20;

/// Binds the tunnel's socket.
pub(super) struct Udp;

impl UdpTransportFactory for Udp {
    type Send = UdpTx;
    type Recv = UdpRx;

    async fn bind(&mut self, params: &UdpTransportFactoryParams) -> io::Result<(UdpTx, UdpRx)> {
        let both = SockOpt {
            fwmark: params.fwmark,
            only_v6: Some(params.addr.is_some()),
            ..SockOpt::default()
        };
        let address = params.addr.unwrap_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED));
        let socket = match UdpSocket::bind((address, params.port).into(), both) {
            Err(error) if params.addr.is_none() && is_without_ipv6(&error) => {
                tracing::info!("no IPv6 on this host, the tunnel listens on IPv4 only");
                UdpSocket::bind((Ipv4Addr::UNSPECIFIED, params.port).into(), both)?
            }
            bound => bound?,
        };
        for forced in [
            setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER),
            setsockopt(&socket, sockopt::SndBufForce, &SOCKET_BUFFER),
        ] {
            if let Err(error) = forced {
                tracing::warn!(%error, "failed to enlarge the tunnel's socket buffers");
            }
        }
        if let Err(error) = setsockopt(&socket, sockopt::UdpGroSegment, &true) {
            tracing::info!(%error, "the kernel hands over packets one by one");
        }
        let tx = UdpTx {
            socket: socket.clone(),
            segments: Arc::new(AtomicBool::new(true)),
            pieces: Arc::new(Pieces::default()),
        };
        tx.pieces.set(&tx.socket, false);
        Ok((tx, UdpRx { socket }))
    }
}

/// Whether a socket of family INET6 cannot be had at all (`ipv6.disable=1` and its like).
fn is_without_ipv6(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL)
    )
}

/// Sends encrypted packets.
#[derive(Clone)]
pub(super) struct UdpTx {
    socket: UdpSocket,
    /// Whether runs may be sent; cleared when the kernel or the device refuses them.
    segments: Arc<AtomicBool>,
    pieces: Arc<Pieces>,
}

/// UDP bytes that fit every link with IPv6 whole: nothing has to be done for them.
const ALWAYS_FITS: usize = 1_280 - 40 - 8;
/// UDP bytes of a packet of [`PATH_FLOOR`] bytes, with WireGuard's header and tag.
const FLOOR: usize = PATH_FLOOR as usize + 32;

/// Whether the socket's packets may be fragmented: those between the two sizes above may, larger ones never. The
/// socket is told when that changes; a packet of another task that is sent meanwhile is lost or fragmented, and
/// either is repaired.
#[derive(Default)]
struct Pieces {
    allowed: AtomicBool,
}

impl Pieces {
    /// Prepares the socket for packets of `len` bytes.
    fn prepare(&self, socket: &UdpSocket, len: usize) {
        if len <= ALWAYS_FITS {
            return;
        }
        let allowed = len <= FLOOR;
        if self.allowed.swap(allowed, Ordering::Relaxed) != allowed {
            self.set(socket, allowed);
        }
    }

    fn set(&self, socket: &UdpSocket, allowed: bool) {
        let (v4, v6) = if allowed {
            (Ipv4PathMtuDiscovery::DONT, Ipv6PathMtuDiscovery::WANT)
        } else {
            (Ipv4PathMtuDiscovery::PROBE, Ipv6PathMtuDiscovery::PROBE)
        };
        let socket = socket.socket();
        // A socket of one family knows the other's option or refuses it; packets of the other never leave it.
        let told = [
            set_ip_mtu_discover(socket, v4),
            set_ipv6_mtu_discover(socket, v6),
        ];
        if let [Err(error), Err(_)] = told {
            tracing::warn!(%error, allowed, "failed to say whether packets may be fragmented");
        }
    }
}

impl UdpTx {
    /// Sends one run of packets in one call.
    async fn send_run(&self, run: &[(Packet, SocketAddr)], to: SocketAddr) -> io::Result<()> {
        let iov: Vec<IoSlice<'_>> = run.iter().map(|(packet, _)| IoSlice::new(packet)).collect();
        let size = u16::try_from(run[0].0.len()).expect("a run is at most 64 KiB");
        let to = SockaddrStorage::from(to);
        let fd = self.socket.socket().as_raw_fd();
        self.socket
            .socket()
            .async_io(Interest::WRITABLE, || {
                sendmsg(
                    fd,
                    &iov,
                    &[ControlMessage::UdpGsoSegments(&size)],
                    MsgFlags::MSG_DONTWAIT,
                    Some(&to),
                )
                .map_err(io::Error::from)
            })
            .await
            .map(drop)
    }
}

impl UdpSend for UdpTx {
    type SendManyBuf = ();

    async fn send_to(&self, packet: Packet, to: SocketAddr) -> io::Result<()> {
        self.pieces.prepare(&self.socket, packet.len());
        self.socket.socket().send_to(&packet, to).await.map(drop)
    }

    fn max_number_of_packets_to_send(&self) -> usize {
        MAX_PACKETS
    }

    async fn send_many_to(
        &self,
        (): &mut (),
        packets: &mut Vec<(Packet, SocketAddr)>,
    ) -> io::Result<()> {
        let mut rest = &packets[..];
        while let Some((first, to)) = rest.first() {
            let run = if self.segments.load(Ordering::Relaxed) {
                run_len(rest.iter().map(|(packet, to)| (packet.len(), *to)))
            } else {
                1
            };
            self.pieces.prepare(&self.socket, first.len());
            let whole = if run > 1 {
                self.send_run(&rest[..run], *to).await
            } else {
                self.socket.socket().send_to(first, *to).await.map(drop)
            };
            match whole {
                // One peer that cannot be reached must not cost the packets to the others.
                Err(error) if run > 1 && refuses_segments(&error) => {
                    if error.raw_os_error() == Some(Errno::EIO as i32) {
                        tracing::info!("the underlay device has no UDP segmentation");
                        self.segments.store(false, Ordering::Relaxed);
                    }
                    for (packet, to) in &rest[..run] {
                        if let Err(error) = self.socket.socket().send_to(packet, *to).await {
                            tracing::trace!(%to, %error, "failed to send");
                        }
                    }
                }
                Err(error) => tracing::trace!(%to, %error, "failed to send"),
                Ok(()) => {}
            }
            rest = &rest[run..];
        }
        packets.clear();
        Ok(())
    }

    fn local_addr(&self) -> io::Result<Option<SocketAddr>> {
        self.socket.local_addr().map(Some)
    }

    fn set_fwmark(&self, mark: u32) -> io::Result<()> {
        setsockopt(&self.socket, sockopt::Mark, &mark).map_err(io::Error::from)
    }
}

/// Whether the same packets may pass one by one: no checksum offload under the socket (`EIO`), a segment over
/// the path's MTU (`EMSGSIZE`, `EINVAL`), a kernel that does not know the option.
fn refuses_segments(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(Errno::EIO | Errno::EINVAL | Errno::EMSGSIZE | Errno::EOPNOTSUPP | Errno::ENOPROTOOPT)
    )
}

/// How many of the first packets can leave as one: to one peer, of one size, the last may be shorter.
fn run_len(mut packets: impl Iterator<Item = (usize, SocketAddr)>) -> usize {
    let Some((size, to)) = packets.next() else {
        return 0;
    };
    let (mut count, mut bytes) = (1, size);
    for (len, next) in packets {
        if next != to || len > size || bytes + len > MAX_BYTES || count == MAX_SEGMENTS {
            break;
        }
        count += 1;
        bytes += len;
        if len < size {
            break;
        }
    }
    count
}

/// Receives encrypted packets.
pub(super) struct UdpRx {
    socket: UdpSocket,
}

/// What one receive needs; lives as long as its task.
pub(super) struct Runs {
    buffers: Vec<Vec<u8>>,
    pool: PacketPool,
}

impl Default for Runs {
    fn default() -> Self {
        Self {
            buffers: vec![vec![0; RUN_BYTES]; MESSAGES],
            pool: PacketPool::new(POOL_BUFFERS),
        }
    }
}

impl UdpRecv for UdpRx {
    type RecvManyBuf = Runs;

    async fn recv_from(&mut self, pool: &mut PacketBufPool) -> io::Result<(Packet, SocketAddr)> {
        let mut packet = pool.get();
        let (len, from) = self.socket.socket().recv_from(&mut packet).await?;
        packet.truncate(len);
        Ok((
            packet,
            SocketAddr::new(from.ip().to_canonical(), from.port()),
        ))
    }

    async fn recv_many_from(
        &mut self,
        runs: &mut Runs,
        _: &mut PacketBufPool,
        packets: &mut Vec<(Packet, SocketAddr)>,
    ) -> io::Result<()> {
        let socket = self.socket.socket();
        socket
            .async_io(Interest::READABLE, || {
                receive(socket.as_raw_fd(), runs, packets)
            })
            .await
    }
}

/// Takes what waits in the socket and splits each run into its packets.
fn receive(
    fd: std::os::fd::RawFd,
    runs: &mut Runs,
    packets: &mut Vec<(Packet, SocketAddr)>,
) -> io::Result<()> {
    let pool = &runs.pool;
    let mut headers =
        MultiHeaders::<SockaddrStorage>::preallocate(MESSAGES, Some(cmsg_space!(i32)));
    let mut slices: Vec<[IoSliceMut<'_>; 1]> = runs
        .buffers
        .iter_mut()
        .map(|buffer| [IoSliceMut::new(buffer)])
        .collect();
    let messages = recvmmsg(fd, &mut headers, &mut slices, MsgFlags::MSG_DONTWAIT, None)?;
    for message in messages {
        let Some(from) = message.address.as_ref().and_then(socket_addr) else {
            continue;
        };
        let Some(bytes) = message.iovs().next() else {
            continue;
        };
        let size = message
            .cmsgs()?
            .find_map(|cmsg| match cmsg {
                ControlMessageOwned::UdpGroSegments(size) => usize::try_from(size).ok(),
                _ => None,
            })
            .filter(|size| *size > 0)
            .unwrap_or(RUN_BYTES);
        for segment in bytes.chunks(size) {
            let mut packet = pool.get();
            packet.buf_mut().clear();
            packet.buf_mut().extend_from_slice(segment);
            packets.push((packet, from));
        }
    }
    Ok(())
}

/// The sender of a message; IPv4 in IPv6 form is IPv4.
fn socket_addr(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(SocketAddr::from((v4.ip(), v4.port())));
    }
    let v6 = address.as_sockaddr_in6()?;
    match v6.ip().to_ipv4_mapped() {
        Some(v4) => Some(SocketAddr::from((v4, v6.port()))),
        None => Some(SocketAddr::V6(std::net::SocketAddrV6::new(
            v6.ip(),
            v6.port(),
            0,
            v6.scope_id(),
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(host: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, host], 7000))
    }

    #[test]
    fn a_run_is_packets_of_one_size_to_one_peer_with_a_short_last() {
        let one = |len| (len, peer(1));
        let cases = [
            ("none", vec![], 0),
            ("one", vec![one(100)], 1),
            ("equal", vec![one(100); 5], 5),
            ("short last", vec![one(100), one(100), one(60), one(60)], 3),
            ("longer next", vec![one(60), one(100)], 1),
            ("another peer", vec![one(100), one(100), (100, peer(2))], 2),
            ("many", vec![one(32); 100], MAX_SEGMENTS),
        ];
        for (name, packets, len) in cases {
            assert_eq!(run_len(packets.into_iter()), len, "{name}");
        }
        let large = vec![(1472, peer(1)); 60];
        assert_eq!(run_len(large.into_iter()), MAX_BYTES / 1472);
    }

    async fn pair() -> ((UdpTx, UdpRx), SocketAddr) {
        let params = UdpTransportFactoryParams {
            addr: None,
            port: 0,
            fwmark: None,
        };
        let bound = Udp.bind(&params).await.unwrap();
        let port = bound.0.local_addr().unwrap().unwrap().port();
        (bound, SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
    }

    #[tokio::test]
    async fn packets_arrive_as_they_were_sent_with_an_ipv4_sender() {
        let ((tx, _), tx_addr) = pair().await;
        let ((_, mut rx), rx_addr) = pair().await;
        let sent: Vec<Vec<u8>> = [1000, 1000, 1000, 400, 1000, 1000]
            .iter()
            .enumerate()
            .map(|(index, len)| vec![index as u8; *len])
            .collect();
        let mut packets = sent
            .iter()
            .map(|bytes| (Packet::copy_from(&bytes[..]), rx_addr))
            .collect();
        tx.send_many_to(&mut (), &mut packets).await.unwrap();
        assert!(packets.is_empty());

        let (mut runs, mut received) = (Runs::default(), Vec::new());
        while received.len() < sent.len() {
            rx.recv_many_from(&mut runs, &mut PacketBufPool::new(1), &mut received)
                .await
                .unwrap();
        }
        for ((packet, from), bytes) in received.iter().zip(&sent) {
            assert_eq!(&packet[..], &bytes[..]);
            assert_eq!(*from, tx_addr);
        }
    }
}
