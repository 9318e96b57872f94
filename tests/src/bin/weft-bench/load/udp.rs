//! Small datagrams, one system call each, as fast as one client sends them.
//!
//! What counts is what the server read: a client that sends faster than the server reads gains nothing. On few CPUs it keeps
//! a userspace tunnel from them for tens of milliseconds, so it sends until something has arrived.

use std::{
    io::ErrorKind,
    net::{SocketAddr, UdpSocket},
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use super::{CPUS, Metric, PATIENCE, Path, pin};

/// Bytes of a datagram, as a telemetry sample has.
const PAYLOAD: usize = 64;
/// How often an idle server looks whether its client is done.
const LOOK: Duration = Duration::from_millis(20);

/// Loads the path for `time`; datagrams read per second.
pub(super) fn measure(path: &Path<'_>, time: Duration) -> Result<f64> {
    let socket = path
        .server
        .run(|| UdpSocket::bind(path.listen(Metric::Datagrams)))
        .context("failed to bind the server")?;
    socket
        .set_read_timeout(Some(LOOK))
        .context("failed to set a timeout")?;
    let target = path.target(Metric::Datagrams);
    let (done, received) = (AtomicBool::new(false), AtomicU32::new(0));
    thread::scope(|scope| {
        let server = scope.spawn(|| {
            path.server.run(|| {
                pin(CPUS[1])?;
                count(&socket, &done, &received)
            })
        });
        let client = path.client.run(|| {
            let sent = pin(CPUS[0]).and_then(|()| pour(target, time, &received));
            done.store(true, Ordering::Release);
            sent
        });
        server.join().expect("the server returns its errors")?;
        let lasted = client?;
        let received = received.load(Ordering::Relaxed);
        ensure!(received > 0, "no datagram arrived");
        Ok(f64::from(received) / lasted.as_secs_f64())
    })
}

fn pour(target: SocketAddr, time: Duration, received: &AtomicU32) -> Result<Duration> {
    let any = match target {
        SocketAddr::V4(_) => "0.0.0.0:0",
        SocketAddr::V6(_) => "[::]:0",
    };
    let socket = UdpSocket::bind(any).context("failed to bind the client")?;
    socket.connect(target).context("failed to connect")?;
    let start = Instant::now();
    let is_over =
        |lasted| lasted >= PATIENCE || (lasted >= time && received.load(Ordering::Relaxed) > 0);
    while !is_over(start.elapsed()) {
        socket.send(&[0; PAYLOAD]).context("failed to send")?;
    }
    Ok(start.elapsed())
}

/// Counts the datagrams that arrive until the client is done.
fn count(socket: &UdpSocket, done: &AtomicBool, received: &AtomicU32) -> Result<()> {
    let mut datagram = [0; PAYLOAD];
    let mut count = 0;
    while !done.load(Ordering::Acquire) {
        match socket.recv(&mut datagram) {
            Ok(_) => {
                count += 1;
                // Nobody else writes it.
                received.store(count, Ordering::Relaxed);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("failed to receive"),
        }
    }
    Ok(())
}
