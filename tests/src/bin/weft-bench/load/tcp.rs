//! Over one connection, and one connection after the other.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::sys::{
    socket::{setsockopt, sockopt::ReceiveTimeout},
    time::TimeVal,
};

use super::{Metric, PATIENCE, Path, pin};

/// How much is written or read at once, bytes.
const CHUNK: usize = 256 * 1024;
/// How long a server waits for its client.
const PATIENCE_OF_SERVER: TimeVal = TimeVal::new(10, 0);

/// Loads the path for `time` and returns the value in the metric's unit.
pub(super) fn measure(path: &Path<'_>, metric: Metric, time: Duration) -> Result<f64> {
    let listener = path
        .server
        .run(|| TcpListener::bind(path.listen(metric)))
        .with_context(|| format!("failed to listen on port {}", metric.port()))?;
    // It bounds accept, so that a client that failed does not leave its server waiting (socket(7)).
    setsockopt(&listener, ReceiveTimeout, &PATIENCE_OF_SERVER)
        .context("failed to set a timeout")?;
    let target = path.target(metric);
    thread::scope(|scope| {
        let server = scope.spawn(|| {
            path.server.run(|| {
                pin(metric.cpus()[1])?;
                match metric {
                    Metric::Throughput => drain(&listener),
                    Metric::Connections | Metric::ConnectionsOneCpu => accept(&listener),
                    _ => answer(&listener),
                }
            })
        });
        let client = path.client.run(|| {
            pin(metric.cpus()[0])?;
            match metric {
                Metric::Throughput => pour(target, time),
                Metric::Connections | Metric::ConnectionsOneCpu => connect(target, time),
                Metric::Latency => ask_timed(target, time),
                _ => ask(target, time),
            }
        });
        let client = client?;
        let served = server.join().expect("the server returns its errors")?;
        match metric {
            Metric::Throughput => {
                let (bytes, lasted) = served.context("the server saw no stream")?;
                Ok(bytes as f64 * 8.0 / lasted.as_secs_f64() / 1e9)
            }
            _ => Ok(client),
        }
    })
}

fn open(target: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, PATIENCE).context("failed to connect")?;
    stream
        .set_nodelay(true)
        .context("failed to set TCP_NODELAY")?;
    stream
        .set_read_timeout(Some(PATIENCE))
        .context("failed to set a timeout")?;
    stream
        .set_write_timeout(Some(PATIENCE))
        .context("failed to set a timeout")?;
    Ok(stream)
}

fn next(listener: &TcpListener) -> Result<TcpStream> {
    let (stream, _) = listener.accept().context("failed to accept")?;
    stream
        .set_nodelay(true)
        .context("failed to set TCP_NODELAY")?;
    stream
        .set_read_timeout(Some(PATIENCE))
        .context("failed to set a timeout")?;
    Ok(stream)
}

/// Bytes and time that the server saw of a stream, where it is the one who measures.
type Served = Option<(u64, Duration)>;

fn pour(target: SocketAddr, time: Duration) -> Result<f64> {
    let mut stream = open(target)?;
    let chunk = vec![0; CHUNK];
    let start = Instant::now();
    while start.elapsed() < time {
        stream.write_all(&chunk).context("failed to write")?;
    }
    Ok(start.elapsed().as_secs_f64())
}

fn drain(listener: &TcpListener) -> Result<Served> {
    let mut stream = next(listener)?;
    let mut chunk = vec![0; CHUNK];
    let mut bytes = 0;
    let start = Instant::now();
    loop {
        match stream.read(&mut chunk).context("failed to read")? {
            0 => return Ok(Some((bytes, start.elapsed()))),
            read => bytes += read as u64,
        }
    }
}

fn ask(target: SocketAddr, time: Duration) -> Result<f64> {
    let mut stream = open(target)?;
    let mut count = 0_u32;
    let start = Instant::now();
    while start.elapsed() < time {
        ping(&mut stream)?;
        count += 1;
    }
    Ok(f64::from(count) / start.elapsed().as_secs_f64())
}

/// The median time of one ping-pong, microseconds.
fn ask_timed(target: SocketAddr, time: Duration) -> Result<f64> {
    let mut stream = open(target)?;
    let mut times = Vec::new();
    let start = Instant::now();
    while start.elapsed() < time {
        let sent = Instant::now();
        ping(&mut stream)?;
        times.push(sent.elapsed());
    }
    times.sort_unstable();
    let median = times.get(times.len() / 2).context("nothing was answered")?;
    Ok(median.as_secs_f64() * 1e6)
}

fn ping(stream: &mut TcpStream) -> Result<()> {
    let mut byte = [0];
    stream.write_all(&byte).context("failed to write")?;
    stream.read_exact(&mut byte).context("failed to read")
}

fn answer(listener: &TcpListener) -> Result<Served> {
    let mut stream = next(listener)?;
    let mut byte = [0];
    loop {
        match stream.read(&mut byte) {
            Ok(0) => return Ok(None),
            Ok(_) => stream.write_all(&byte).context("failed to write")?,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(None),
            Err(error) => return Err(error).context("failed to read"),
        }
    }
}

/// The last connection carries another byte: it tells the server to end.
const LAST: u8 = 0xff;

fn connect(target: SocketAddr, time: Duration) -> Result<f64> {
    let mut count = 0_u32;
    let start = Instant::now();
    while start.elapsed() < time {
        hand_over(target, 0)?;
        count += 1;
    }
    let lasted = start.elapsed();
    hand_over(target, LAST)?;
    Ok(f64::from(count) / lasted.as_secs_f64())
}

/// One connection: a byte there, and the server's end of it. Without waiting for that the client would measure how
/// fast a full backlog is drained.
fn hand_over(target: SocketAddr, byte: u8) -> Result<()> {
    let mut stream = open(target)?;
    stream.write_all(&[byte]).context("failed to write")?;
    let read = stream.read(&mut [0]).context("failed to read")?;
    ensure!(read == 0, "the server answered a byte where it should end");
    Ok(())
}

fn accept(listener: &TcpListener) -> Result<Served> {
    loop {
        let mut stream = next(listener)?;
        let mut byte = [0; 2];
        let read = stream.read(&mut byte).context("failed to read")?;
        ensure!(read == 1, "a connection carried {read} bytes, not 1");
        if byte[0] == LAST {
            return Ok(None);
        }
    }
}
