//! A steady load: requests leave at their time whether or not earlier ones were answered (open loop), so that
//! a stall of the service shows as failures and gaps and not as a slower load.
//!
//! Standard output has one JSON object a line: one for every second, and the sum as the last.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use axum::http::Uri;
use clap::Args;
use serde_json::json;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{Semaphore, mpsc},
    time::{MissedTickBehavior, interval},
};

use crate::{
    fetch,
    load_record::{Outcome, Record},
};

/// The most requests under way at once; a request that finds no place is counted as failed.
const UNDER_WAY: usize = 4096;

#[derive(Clone, Debug, Args)]
pub(crate) struct LoadArgs {
    /// What to ask for, `http://ADDRESS:PORT/PATH`.
    url: Uri,
    /// Requests per second.
    #[arg(long, default_value_t = 250)]
    rate: u32,
    /// How long, seconds; SIGTERM ends it earlier.
    #[arg(long, default_value_t = 300)]
    seconds: u64,
}

/// Loads until the time is over or SIGTERM, waits for what is under way, prints the sum.
pub(crate) async fn run(args: LoadArgs) -> Result<()> {
    anyhow::ensure!(args.rate > 0, "--rate 0 is no load: at least 1 is needed");
    let stop = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
    let started = Instant::now();
    let (sender, mut outcomes) = mpsc::channel(UNDER_WAY);
    let generator = tokio::spawn(generate(args, started, stop, sender));
    let mut record = Record::default();
    let mut clock = interval(Duration::from_secs(1));
    clock.tick().await;
    loop {
        tokio::select! {
            outcome = outcomes.recv() => match outcome {
                Some(outcome) => record.add(outcome),
                None => break,
            },
            _ = clock.tick() => {
                println!("{}", json!({ "unix_ms": unix_ms(), "second": record.take_second() }));
            }
        }
    }
    generator.await.context("the generator failed")?;
    println!(
        "{}",
        json!({ "unix_ms": unix_ms(), "sum": record.sum(started.elapsed()) })
    );
    Ok(())
}

/// Sends each request at its time; ends when the channel's last copy does.
async fn generate(
    args: LoadArgs,
    started: Instant,
    mut stop: Signal,
    outcomes: mpsc::Sender<Outcome>,
) {
    let places = Arc::new(Semaphore::new(UNDER_WAY));
    let mut pace = interval(Duration::from_secs(1) / args.rate);
    pace.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let end = tokio::time::sleep(Duration::from_secs(args.seconds));
    tokio::pin!(end);
    loop {
        tokio::select! {
            _ = pace.tick() => {}
            () = &mut end => return,
            _ = stop.recv() => return,
        }
        let (places, outcomes, url) = (places.clone(), outcomes.clone(), args.url.clone());
        tokio::spawn(async move {
            let sent = started.elapsed();
            let result = match places.try_acquire() {
                Ok(_place) => fetch::fetch(&url)
                    .await
                    .map(|answer| answer.servers().iter().map(|s| s.place()).collect())
                    .map_err(|failure| failure.to_string()),
                Err(_) => Err(format!("{UNDER_WAY} requests are under way")),
            };
            let outcome = Outcome {
                sent,
                ended: started.elapsed(),
                result,
            };
            // The receiver ends after the last sender.
            let _ = outcomes.send(outcome).await;
        });
    }
}

fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|since| u64::try_from(since.as_millis()).ok())
        .unwrap_or(0)
}
