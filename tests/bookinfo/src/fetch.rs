//! One request on one connection, so that nothing of a service's past keeps a client with it.

use std::{fmt, io, time::Duration};

use axum::{
    body::{Body, to_bytes},
    http::{Request, StatusCode, Uri, header},
};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};

use crate::answer::Answer;

/// How long one call may take.
pub(crate) const DEADLINE: Duration = Duration::from_secs(2);
/// The largest answer that is read, bytes.
const LARGEST: usize = 1 << 20;

/// Why a call failed: a few words that failures can be counted by.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The URL has no host.
    Url(String),
    /// No connection.
    Connect(io::ErrorKind),
    /// The connection broke.
    Broken(String),
    /// Another status than 200, with what the server says.
    Status(StatusCode, String),
    /// The answer is not one of ours.
    Content(String),
    /// Not within the deadline.
    Deadline,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Url(url) => write!(f, "{url:?} is not http://HOST:PORT/PATH"),
            Self::Connect(kind) => write!(f, "connect: {kind}"),
            Self::Broken(why) => write!(f, "connection: {why}"),
            Self::Status(status, why) if why.is_empty() => write!(f, "status {status}"),
            Self::Status(status, why) => write!(f, "status {status}: {why}"),
            Self::Content(why) => write!(f, "answer: {why}"),
            Self::Deadline => write!(f, "no answer within {DEADLINE:?}"),
        }
    }
}

/// Asks `url` once, on a connection of its own, within [`DEADLINE`].
pub(crate) async fn fetch(url: &Uri) -> Result<Answer, Failure> {
    timeout(DEADLINE, exchange(url))
        .await
        .unwrap_or(Err(Failure::Deadline))
}

async fn exchange(url: &Uri) -> Result<Answer, Failure> {
    let authority = url
        .authority()
        .ok_or_else(|| Failure::Url(url.to_string()))?;
    let host = authority.host().trim_matches(['[', ']']);
    let stream = TcpStream::connect((host, authority.port_u16().unwrap_or(80)))
        .await
        .map_err(|error| Failure::Connect(error.kind()))?;
    let broken = |error: hyper::Error| Failure::Broken(error.to_string());
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(broken)?;
    let path = url.path_and_query().map_or("/", |path| path.as_str());
    let request = Request::get(path)
        .header(header::HOST, authority.as_str())
        .header(header::CONNECTION, "close")
        .body(Body::empty())
        .map_err(|error| Failure::Url(error.to_string()))?;
    let respond = async {
        let response = sender.send_request(request).await.map_err(broken)?;
        let status = response.status();
        let bytes = to_bytes(Body::new(response.into_body()), LARGEST)
            .await
            .map_err(|error| Failure::Broken(error.to_string()))?;
        Ok((status, bytes))
    };
    // The connection's own error shows in the response's.
    let (outcome, _) = tokio::join!(respond, connection);
    let (status, bytes) = outcome?;
    let answer: Result<Answer, _> = serde_json::from_slice(&bytes);
    match answer {
        Ok(answer) if status == StatusCode::OK => Ok(answer),
        Ok(answer) => Err(Failure::Status(status, answer.failures.join("; "))),
        Err(_) if status != StatusCode::OK => Err(Failure::Status(status, String::new())),
        Err(error) => Err(Failure::Content(error.to_string())),
    }
}
