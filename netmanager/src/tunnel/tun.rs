//! The inner side of the userspace tunnel: a TUN device with offloads.
//!
//! ```text
//! kernel --read: virtio_net_hdr + one packet of up to 64 KiB--> split into MTU-sized packets --> encrypt
//! decrypt --> coalesce consecutive segments of a flow --write: virtio_net_hdr + up to 64 KiB--> kernel
//! ```
//!
//! With `IFF_VNET_HDR` the kernel hands over packets whose checksum is not yet computed (`CHECKSUM_PARTIAL`)
//! and TCP and UDP trains whole (GSO), also those that a program redirects into the device; the split
//! finishes both. A packet that cannot be split is dropped and counted; it never ends the tunnel, because
//! a pod could send one. Only the kernel's own error on read or write does.

use std::{io, sync::Arc, time::Duration};

use gotatun::{
    packet::{Ip, Packet, PacketBufPool},
    tun::{IpRecv, IpSend, MtuWatcher},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use tun_rs::{AsyncDevice, DeviceBuilder, ExpandBuffer, GROTable, Layer, VIRTIO_NET_HDR_LEN};

use super::{BUFFER, POOL_BUFFERS, PacketPool};

/// Packets that one read may be split into: a train of 64 KiB at the smallest segment that TCP stacks use
/// without being told to (536 bytes, RFC 9293 section 3.7.1) is 123.
const MAX_SEGMENTS: usize = 128;
/// Packets written at once; 48 full ones make one train.
const BATCH: usize = 64;
/// Bytes of the largest read and of the largest coalesced write.
const TRAIN: usize = VIRTIO_NET_HDR_LEN + 65_535;
/// Queue between decryption and the writer: two batches, so that one fills while the other is written.
const QUEUE: usize = 2 * BATCH;

/// How often the device is asked for its MTU: the daemon changes it when the underlay's changes.
const MTU_LOOK: Duration = Duration::from_secs(3);

/// An open device: what gotatun reads from and writes to, and the tasks behind them, which end only when the
/// device is gone.
pub(super) struct Tun {
    pub(super) reader: TunReader,
    pub(super) writer: TunWriter,
    pub(super) tasks: JoinSet<io::Result<()>>,
}

/// Makes the device `name`, up, with `mtu`.
///
/// # Errors
/// When the name is taken, the capability is missing or the kernel has no TUN.
pub(super) fn open(name: &str, mtu: u16) -> io::Result<Tun> {
    let device = DeviceBuilder::new()
        .name(name)
        .layer(Layer::L3)
        .mtu(mtu)
        .offload(true)
        .enable(false)
        .build_async()?;
    without_link_local(name);
    device.enabled(true)?;
    let device = Arc::new(device);
    let (queue, packets) = mpsc::channel(QUEUE);
    let (mtu, followed) = watch::channel(mtu);
    let mut tasks = JoinSet::new();
    tasks.spawn(write(Arc::clone(&device), packets));
    tasks.spawn(follow_mtu(Arc::clone(&device), mtu));
    Ok(Tun {
        reader: TunReader::new(device, followed),
        writer: TunWriter { queue },
        tasks,
    })
}

/// Tells the reader when the device's MTU changes; ends with the device.
async fn follow_mtu(device: Arc<AsyncDevice>, mtu: watch::Sender<u16>) -> io::Result<()> {
    loop {
        tokio::time::sleep(MTU_LOOK).await;
        let now = device.mtu()?;
        mtu.send_if_modified(|mtu| std::mem::replace(mtu, now) != now);
    }
}

/// Asks the kernel not to give the device link-local addresses, before it is up: nobody speaks them, and each
/// would send router solicitations into the tunnel. A host without IPv6 has no such setting.
pub(crate) fn without_link_local(name: &str) {
    let path = format!("/proc/sys/net/ipv6/conf/{name}/addr_gen_mode");
    let _ = std::fs::write(path, "1");
}

/// A packet buffer that the split can write into.
struct Slot(Packet);

impl AsRef<[u8]> for Slot {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl AsMut<[u8]> for Slot {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

/// Reads packets that the kernel routed or redirected into the device.
pub(super) struct TunReader {
    device: Arc<AsyncDevice>,
    mtu: watch::Receiver<u16>,
    room: usize,
    pool: PacketPool,
    train: Vec<u8>,
    slots: Vec<Slot>,
    sizes: Vec<usize>,
    ready: Vec<Packet<Ip>>,
    dropped: u64,
}

impl TunReader {
    fn new(device: Arc<AsyncDevice>, mtu: watch::Receiver<u16>) -> Self {
        let pool = PacketPool::new(POOL_BUFFERS);
        let room = room(&mtu);
        Self {
            slots: (0..MAX_SEGMENTS).map(|_| slot(&pool, room)).collect(),
            device,
            mtu,
            room,
            pool,
            train: vec![0; TRAIN],
            sizes: vec![0; MAX_SEGMENTS],
            ready: Vec::with_capacity(MAX_SEGMENTS),
            dropped: 0,
        }
    }

    /// Moves the first `count` packets out of their slots; what is not an IP packet is left out.
    fn take(&mut self, count: usize) {
        for (slot_, size) in self.slots.iter_mut().zip(&self.sizes).take(count) {
            let Slot(mut packet) = std::mem::replace(slot_, slot(&self.pool, self.room));
            packet.truncate(*size);
            match packet.try_into_ip() {
                Ok(packet) => self.ready.push(packet),
                Err(_) => self.dropped += 1,
            }
        }
    }
}

/// Bytes that a slot needs at this MTU.
fn room(mtu: &watch::Receiver<u16>) -> usize {
    BUFFER.max(usize::from(*mtu.borrow()))
}

/// A buffer with `room` for one packet.
fn slot(pool: &PacketPool, room: usize) -> Slot {
    let mut packet = pool.get();
    packet.buf_mut().resize(room, 0);
    Slot(packet)
}

impl IpRecv for TunReader {
    async fn recv<'a>(
        &'a mut self,
        _: &mut PacketBufPool,
    ) -> io::Result<impl Iterator<Item = Packet<Ip>> + Send + 'a> {
        while self.ready.is_empty() {
            let room = room(&self.mtu);
            if room != self.room {
                self.room = room;
                self.slots.fill_with(|| slot(&self.pool, room));
            }
            let read = self
                .device
                .recv_multiple(&mut self.train, &mut self.slots, &mut self.sizes, 0)
                .await;
            match read {
                Ok(count) => self.take(count),
                Err(error) if error.raw_os_error().is_some() => return Err(gone(&error)),
                Err(error) => {
                    self.dropped += 1;
                    tracing::debug!(%error, dropped = self.dropped, "dropped an unsplittable packet");
                }
            }
        }
        Ok(self.ready.drain(..))
    }

    fn mtu(&self) -> MtuWatcher {
        self.mtu.clone().into()
    }
}

/// The kernel's error as the one that ends the device: the supervisor then makes a new one.
fn gone(error: &io::Error) -> io::Error {
    io::Error::new(
        io::ErrorKind::BrokenPipe,
        format!("the TUN device failed: {error}"),
    )
}

/// Hands decrypted packets to the writer.
pub(super) struct TunWriter {
    queue: mpsc::Sender<Packet<Ip>>,
}

impl IpSend for TunWriter {
    async fn send(&mut self, packet: Packet<Ip>) -> io::Result<()> {
        self.queue
            .send(packet)
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the TUN writer ended"))
    }
}

/// A write buffer of fixed capacity: coalescing stops at its end instead of growing it.
struct Train(Vec<u8>);

impl AsRef<[u8]> for Train {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl AsMut<[u8]> for Train {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl ExpandBuffer for Train {
    fn buf_capacity(&self) -> usize {
        self.0.capacity()
    }

    fn buf_resize(&mut self, len: usize, value: u8) {
        self.0.resize(len, value);
    }

    fn buf_extend_from_slice(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }
}

/// Writes packets in batches until the device or the queue ends.
async fn write(
    device: Arc<AsyncDevice>,
    mut packets: mpsc::Receiver<Packet<Ip>>,
) -> io::Result<()> {
    let mut gro = GROTable::new();
    let mut batch = Vec::with_capacity(BATCH);
    let mut trains: Vec<Train> = (0..BATCH)
        .map(|_| Train(Vec::with_capacity(TRAIN)))
        .collect();
    while packets.recv_many(&mut batch, BATCH).await > 0 {
        let count = batch.len();
        for (train, packet) in trains.iter_mut().zip(batch.drain(..)) {
            train.0.clear();
            train.0.resize(VIRTIO_NET_HDR_LEN, 0);
            train.0.extend_from_slice(&packet.into_bytes());
        }
        match device
            .send_multiple(&mut gro, &mut trains[..count], VIRTIO_NET_HDR_LEN)
            .await
        {
            Ok(_) => {}
            Err(error) if is_gone(&error) => return Err(gone(&error)),
            Err(error) => tracing::debug!(%error, "dropped a packet that the kernel refused"),
        }
    }
    Ok(())
}

/// Whether the descriptor no longer leads to a device; any other refusal concerns one packet.
fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EBADF | libc::EBADFD | libc::ENODEV)
    )
}
