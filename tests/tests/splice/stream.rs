//! One direction of a connection: chunks of random size, read in pieces of random size.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    thread,
    time::{Duration, Instant},
};

/// Bytes of one direction.
const BYTES: usize = 6 << 20;
/// Sizes of most chunks and pieces, bytes.
const SMALL: usize = 3_000;
/// Sizes of some.
const LARGE: usize = 200_000;
/// How long a reader waits for more.
const PATIENCE: Duration = Duration::from_secs(10);

/// `SplitMix64` (Steele, Lea, Flood 2014).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn size(&mut self) -> usize {
        let limit = if self.next().is_multiple_of(20) {
            LARGE
        } else {
            SMALL
        };
        1 + self.next() as usize % limit
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}

/// Who writes, who reads, and what.
pub(crate) struct Direction {
    from: TcpStream,
    to: TcpStream,
    seed: u64,
}

impl Direction {
    pub(crate) fn new(from: &TcpStream, to: &TcpStream, seed: u64) -> Self {
        Self {
            from: from.try_clone().unwrap(),
            to: to.try_clone().unwrap(),
            seed,
        }
    }
}

/// Writes and reads at the same time; what is read is what was written, to the last byte.
pub(crate) fn run(direction: Direction) {
    let Direction { from, to, seed } = direction;
    let content = Random::new(seed).bytes(BYTES);
    thread::scope(|scope| {
        scope.spawn(|| write(from, &content, seed + 1_000));
        let read = read(to, seed + 2_000);
        assert_eq!(read.len(), content.len(), "seed {seed}");
        let other = read.iter().zip(&content).position(|(a, b)| a != b);
        assert_eq!(other, None, "seed {seed}: the first byte that differs");
    });
}

fn write(mut stream: TcpStream, content: &[u8], seed: u64) {
    let mut random = Random::new(seed);
    let mut rest = content;
    while !rest.is_empty() {
        let (now, later) = rest.split_at(random.size().min(rest.len()));
        stream.write_all(now).unwrap();
        rest = later;
    }
    stream.shutdown(Shutdown::Write).unwrap();
}

fn read(mut stream: TcpStream, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut all = Vec::with_capacity(BYTES);
    let mut piece = vec![0; LARGE];
    loop {
        let room = random.size();
        match read_some(&mut stream, &mut piece[..room]) {
            0 => return all,
            read => all.extend(&piece[..read]),
        }
        // Now and then the writer is left to fill the buffers.
        if random.next().is_multiple_of(500) {
            thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Reads as a program must that is spliced: a socket that was woken for nothing says that there is nothing.
pub(crate) fn read_some(stream: &mut TcpStream, room: &mut [u8]) -> usize {
    let start = Instant::now();
    loop {
        match stream.read(room) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let waited = start.elapsed();
                assert!(waited < PATIENCE, "nothing came for {waited:?}");
            }
            read => return read.unwrap(),
        }
    }
}
