//! Asks for pages one after the other and says who answered.

use std::{collections::BTreeMap, time::Instant};

use anyhow::{Context, Result};
use axum::http::Uri;
use clap::Args;
use serde::Serialize;

use crate::fetch;

#[derive(Debug, Args)]
pub(crate) struct ClientArgs {
    /// What to ask for, `http://ADDRESS:PORT/PATH`.
    url: Uri,
    /// How often.
    #[arg(long, default_value_t = 1)]
    count: u32,
}

/// What came of it, as JSON on standard output.
#[derive(Debug, Default, Serialize)]
struct Summary {
    /// Requests that were answered.
    ok: u32,
    /// Requests that failed.
    failed: u32,
    /// How often each place served, `service@node`, over all depths.
    served: BTreeMap<String, u32>,
    /// Failures by reason.
    failures: BTreeMap<String, u32>,
    /// The time that the fastest request took, microseconds.
    fastest_us: u64,
    /// The time that the slowest request took, microseconds.
    slowest_us: u64,
}

/// Asks and prints; failures are in the summary, not in the exit code.
pub(crate) async fn run(args: &ClientArgs) -> Result<()> {
    let mut summary = Summary {
        fastest_us: u64::MAX,
        ..Summary::default()
    };
    for _ in 0..args.count {
        let start = Instant::now();
        match fetch::fetch(&args.url).await {
            Ok(answer) => {
                summary.ok += 1;
                for server in answer.servers() {
                    *summary.served.entry(server.place()).or_default() += 1;
                }
            }
            Err(failure) => {
                summary.failed += 1;
                *summary.failures.entry(failure.to_string()).or_default() += 1;
            }
        }
        let took = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        summary.fastest_us = summary.fastest_us.min(took);
        summary.slowest_us = summary.slowest_us.max(took);
    }
    let text = serde_json::to_string(&summary).context("failed to write the summary")?;
    println!("{text}");
    Ok(())
}
