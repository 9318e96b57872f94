//! Asking this node's NetManager over its observe socket.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use clap::Args;
use netmanager_api::observe::{DEFAULT_SOCKET, Request, Said};

/// Where to ask and how to answer.
#[derive(Debug, Args)]
pub(crate) struct Door {
    /// The observe socket of this node's NetManager.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// One JSON object per line.
    #[arg(long)]
    json: bool,
}

impl Door {
    /// Asks, and writes every answer until the door closes, or `until` has passed.
    pub(crate) fn ask(&self, request: &Request, until: Option<Duration>) -> anyhow::Result<()> {
        let stream = connect(&self.socket, request)?;
        let deadline = until.map(|until| Instant::now() + until);
        let mut lines = BufReader::new(Timed { stream, deadline });
        tell(&mut lines, self.json, &mut io::stdout())
    }
}

fn connect(socket: &Path, request: &Request) -> anyhow::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket).with_context(|| {
        format!(
            "no NetManager answers at {}: run this on a node, as root, or name its socket (--socket)",
            socket.display()
        )
    })?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream
        .write_all(&line)
        .context("the NetManager did not take the request")?;
    Ok(stream)
}

/// A stream that ends at a deadline.
struct Timed {
    stream: UnixStream,
    deadline: Option<Instant>,
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(deadline) = self.deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(0);
            }
            self.stream.set_read_timeout(Some(left))?;
        }
        match self.stream.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            result => result,
        }
    }
}

/// Writes what the door says, line by line.
fn tell(lines: &mut impl BufRead, json: bool, out: &mut impl Write) -> anyhow::Result<()> {
    let mut line = String::new();
    loop {
        line.clear();
        lines
            .read_line(&mut line)
            .context("failed to read what the NetManager says")?;
        if !line.ends_with('\n') {
            return Ok(());
        }
        let said: Said = serde_json::from_str(&line)
            .context("the NetManager's answer cannot be read: is it another version?")?;
        if let Said::Refused { message } | Said::Cut { why: message } = &said {
            bail!("{message}");
        }
        let text = if json {
            line.trim_end().to_owned()
        } else {
            said.to_string()
        };
        match writeln!(out, "{text}").and_then(|()| out.flush()) {
            // Whoever reads has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            written => written.context("failed to write the answer")?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(lines: &str, json: bool) -> anyhow::Result<String> {
        let mut out = Vec::new();
        tell(&mut lines.as_bytes(), json, &mut out)?;
        Ok(String::from_utf8(out)?)
    }

    #[test]
    fn answers_are_lines_for_people_or_as_they_came() {
        let line = "{\"kind\":\"lost\",\"limited\":3,\"full\":0}\n";
        assert!(
            told(line, false)
                .unwrap()
                .starts_with("not shown: 3 events")
        );
        assert_eq!(told(line, true).unwrap(), line);
        assert_eq!(told(&line[..10], false).unwrap(), "", "half a line is none");
    }

    #[test]
    fn a_refusal_and_a_cut_are_errors() {
        for line in [
            "{\"kind\":\"refused\",\"message\":\"only root\"}\n",
            "{\"kind\":\"cut\",\"why\":\"only root\"}\n",
        ] {
            assert_eq!(told(line, true).unwrap_err().to_string(), "only root");
        }
    }
}
