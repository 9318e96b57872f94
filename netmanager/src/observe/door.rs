//! The observe door: a unix socket for root, beside the CNI door's.

use std::{io, sync::Arc, time::Duration};

use netmanager_api::observe::{FlowsRequest, MAX_LINE, Request, Said, TraceRequest};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{broadcast, mpsc, oneshot},
    task::{JoinSet, spawn_blocking},
    time::{Instant, timeout, timeout_at},
};

use super::{
    Ask,
    follow::{Order, Reader},
    probe::{self, Plan},
};
use crate::{
    datapath::{FlowLog, LogCounters},
    door::Door,
    follow::chain,
};

/// How long a client may take to ask, and to take a line.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a probe's hops are waited for; longer than any round trip that is of use.
const PROBE: Duration = Duration::from_secs(2);
/// How many clients may be connected at once.
const MAX_CLIENTS: usize = 32;

/// Serves until the daemon is gone, which aborts it.
pub async fn serve(door: Door, log: FlowLog, counters: LogCounters, asks: mpsc::Sender<Ask>) {
    let (orders, ordered) = mpsc::unbounded_channel();
    let reader = match Reader::new(log, counters, asks.clone(), orders.clone()) {
        Ok(reader) => reader,
        Err(error) => {
            tracing::error!(%error, "no flow log: its ring cannot be waited for");
            return;
        }
    };
    // Ends with this task, as its clients do.
    let mut reading = JoinSet::new();
    reading.spawn(reader.run(ordered));
    let mut clients = JoinSet::new();
    loop {
        tokio::select! {
            accepted = door.accept() => match accepted {
                Ok(stream) if clients.len() < MAX_CLIENTS => {
                    clients.spawn(serve_one(stream, orders.clone(), asks.clone()));
                }
                // Dropped: the client reads an end.
                Ok(_) => tracing::warn!(MAX_CLIENTS, "too many clients at the observe door"),
                Err(error) => {
                    tracing::warn!(%error, "failed to accept at the observe door");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = clients.join_next() => {}
            _ = reading.join_next() => return,
        }
    }
}

async fn serve_one(
    stream: UnixStream,
    orders: mpsc::UnboundedSender<Order>,
    asks: mpsc::Sender<Ask>,
) {
    let is_root = stream
        .peer_cred()
        .is_ok_and(|credentials| credentials.uid() == 0);
    let (reader, writer) = stream.into_split();
    let mut client = Client { writer };
    let served = if is_root {
        match request(reader).await {
            Ok((Request::Flows(wish), gone)) => flows(&mut client, wish, gone, &orders).await,
            Ok((Request::Trace(wish), _)) => trace(&mut client, wish, &orders, &asks).await,
            Err(message) => client.say(&Said::Refused { message }).await,
        }
    } else {
        let message = "only root may use the observe door".to_owned();
        client.say(&Said::Refused { message }).await
    };
    if let Err(error) = served {
        tracing::debug!(%error, "an observer went away");
    }
}

/// What the client asks, and its end, which says when it is gone.
async fn request(reader: OwnedReadHalf) -> Result<(Request, OwnedReadHalf), String> {
    let mut line = Vec::new();
    let mut reader = BufReader::new(reader.take(MAX_LINE as u64));
    match timeout(PATIENCE, reader.read_until(b'\n', &mut line)).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => return Err(format!("failed to read the request: {error}")),
        Err(_) => return Err(format!("no request came within {PATIENCE:?}")),
    }
    let request = serde_json::from_slice(&line)
        .map_err(|error| format!("failed to decode the request: {error}"))?;
    Ok((request, reader.into_inner().into_inner()))
}

/// A client's end.
struct Client {
    writer: OwnedWriteHalf,
}

impl Client {
    /// Says one line; fails where it is not taken in time.
    async fn say(&mut self, said: &Said) -> io::Result<()> {
        let mut line = serde_json::to_vec(said).expect("every key is a string");
        line.push(b'\n');
        timeout(PATIENCE, self.writer.write_all(&line)).await?
    }

    /// Says why it is cut off, if there is room for that.
    async fn cut(&mut self, why: String) -> io::Result<()> {
        self.say(&Said::Cut { why }).await
    }
}

async fn flows(
    client: &mut Client,
    wish: FlowsRequest,
    mut gone: OwnedReadHalf,
    orders: &mpsc::UnboundedSender<Order>,
) -> io::Result<()> {
    let filter = wish.filter.clone();
    let (sender, receiver) = oneshot::channel();
    let _ = orders.send(Order::Join(wish, sender));
    let mut joined = match receiver.await {
        Ok(Ok(joined)) => joined,
        Ok(Err(message)) => return client.say(&Said::Refused { message }).await,
        Err(_) => return client.cut("the flow log has ended".to_owned()).await,
    };
    client.say(&joined.following).await?;
    let mut nothing = [0];
    loop {
        let received = tokio::select! {
            received = joined.messages.recv() => received,
            // The client has nothing more to say: it is gone.
            _ = gone.read(&mut nothing) => return Ok(()),
        };
        match received {
            Ok(said) => {
                let is_wanted = match &*said {
                    Said::Flow(event) => filter.fits(event),
                    _ => true,
                };
                if is_wanted {
                    client.say(&said).await?;
                }
            }
            Err(broadcast::error::RecvError::Lagged(missed)) => {
                return client
                    .cut(format!(
                        "cut off: {missed} messages behind; ask for less (--sample, --per-second) or read faster"
                    ))
                    .await;
            }
            Err(broadcast::error::RecvError::Closed) => {
                return client.cut("the flow log has ended".to_owned()).await;
            }
        }
    }
}

async fn trace(
    client: &mut Client,
    wish: TraceRequest,
    orders: &mpsc::UnboundedSender<Order>,
    asks: &mpsc::Sender<Ask>,
) -> io::Result<()> {
    let (sender, receiver) = oneshot::channel();
    let _ = asks.send(Ask::Trace(wish, sender)).await;
    let stopping = || Err("the NetManager is stopping: try again".to_owned());
    let traced = match receiver.await.unwrap_or_else(|_| stopping()) {
        Ok(traced) => traced,
        Err(message) => return client.say(&Said::Refused { message }).await,
    };
    client.say(&Said::Trace(Box::new(traced.trace))).await?;
    let Some(plan) = traced.probe else {
        return Ok(());
    };
    let (sender, receiver) = oneshot::channel();
    let _ = orders.send(Order::Listen(sender));
    let Ok(events) = receiver.await else {
        return client.cut("the flow log has ended".to_owned()).await;
    };
    let sent = {
        let plan = plan.clone();
        spawn_blocking(move || probe::send(&plan)).await
    };
    match sent.map_err(io::Error::other)? {
        Ok(()) => hops(client, events, &plan).await,
        Err(error) => {
            let message = chain(&error);
            client.say(&Said::Refused { message }).await
        }
    }
}

/// Tells the hops of a probe as they are seen, until its answer was, or nothing comes any more.
async fn hops(
    client: &mut Client,
    mut events: broadcast::Receiver<Arc<Said>>,
    plan: &Plan,
) -> io::Result<()> {
    let deadline = Instant::now() + PROBE;
    let mut answered = false;
    while !answered {
        match timeout_at(deadline, events.recv()).await {
            Ok(Ok(said)) => {
                if let Said::Flow(event) = &*said
                    && plan.is_seen_in(event)
                {
                    client.say(&said).await?;
                    answered = plan.is_answered_by(event);
                }
            }
            Ok(Err(broadcast::error::RecvError::Lagged(_))) => {}
            Ok(Err(broadcast::error::RecvError::Closed)) | Err(_) => break,
        }
    }
    let note = plan.note(answered);
    client.say(&Said::Probed { answered, note }).await
}
