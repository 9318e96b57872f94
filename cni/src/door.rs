//! The client's side of the CNI door: one connection per question, all of them before one deadline.

use std::{io, path::PathBuf};

use netmanager_api::cni::{MAX_LINE, Reply, Request, Reserve, Reserved};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    time::{Instant, timeout_at},
};

use crate::error::Error;

/// The NetManager's CNI door.
#[derive(Debug)]
pub(crate) struct Door {
    pub(crate) socket: PathBuf,
    pub(crate) deadline: Instant,
}

impl Door {
    /// Reserves addresses; the same ones when asked again.
    pub(crate) async fn reserve(&self, reserve: Reserve) -> Result<Reserved, Error> {
        match self.ask(&Request::Reserve(reserve)).await? {
            Reply::Reserved(reserved) => Ok(reserved),
            other => Err(self.strange(&other)),
        }
    }

    /// Asks for something that is answered by "done".
    pub(crate) async fn request(&self, request: &Request) -> Result<(), Error> {
        match self.ask(request).await? {
            Reply::Done => Ok(()),
            other => Err(self.strange(&other)),
        }
    }

    async fn ask(&self, request: &Request) -> Result<Reply, Error> {
        let line = match timeout_at(self.deadline, self.exchange(request)).await {
            Ok(Ok(line)) => line,
            Ok(Err(source)) => {
                return Err(Error::TryAgain(format!(
                    "no NetManager at {}: {source}; is weft-netmanager running on this node?",
                    self.socket.display()
                )));
            }
            Err(_) => {
                return Err(Error::TryAgain(format!(
                    "the NetManager at {} did not answer in time",
                    self.socket.display()
                )));
            }
        };
        match serde_json::from_slice(&line) {
            Ok(Reply::Refused(refused)) => Err(Error::Refused(refused)),
            Ok(reply) => Ok(reply),
            Err(error) => Err(Error::Protocol(format!(
                "the answer of {} is none of a NetManager: {error}",
                self.socket.display()
            ))),
        }
    }

    async fn exchange(&self, request: &Request) -> io::Result<Vec<u8>> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        let mut stream = UnixStream::connect(&self.socket).await?;
        stream.write_all(&line).await?;
        let mut answer = Vec::new();
        BufReader::new(stream.take(MAX_LINE as u64))
            .read_until(b'\n', &mut answer)
            .await?;
        if answer.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "it hung up without an answer",
            ));
        }
        Ok(answer)
    }

    fn strange(&self, reply: &Reply) -> Error {
        Error::Protocol(format!(
            "{} answered another question: {reply:?}",
            self.socket.display()
        ))
    }
}
