//! What the demo says and claims, with times.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use serde::Serialize;
use serde_json::json;

/// Collects what is said and claimed.
#[derive(Debug)]
pub(crate) struct Report {
    start: Instant,
    json: bool,
    told: Mutex<Told>,
}

#[derive(Debug, Default)]
struct Told {
    step: String,
    claims: Vec<Claim>,
    lines: Vec<String>,
    quiet: bool,
}

/// One thing that was claimed, and whether it held.
#[derive(Clone, Debug, Serialize)]
struct Claim {
    step: String,
    claim: String,
    held: bool,
    /// The figures, or what was seen instead.
    seen: String,
    at_ms: u64,
}

impl Report {
    pub(crate) fn new(json: bool) -> Self {
        Self {
            start: Instant::now(),
            json,
            told: Mutex::default(),
        }
    }

    /// Begins a step.
    pub(crate) fn step(&self, title: &str) {
        self.told().step = title.to_owned();
        self.say(&format!("--- {title}"));
    }

    /// Says one line, with the time since the start.
    pub(crate) fn say(&self, line: &str) {
        let line = format!("{:>6.1} s  {line}", self.start.elapsed().as_secs_f64());
        let mut told = self.told();
        if !told.quiet {
            if self.json {
                eprintln!("{line}");
            } else {
                println!("{line}");
            }
        }
        told.lines.push(line);
    }

    /// Claims something: `Ok` with the figures, or `Err` with what was seen instead.
    pub(crate) fn claim<T: ToString>(&self, claim: &str, seen: Result<T, String>) {
        let (held, seen) = match seen {
            Ok(figures) => (true, figures.to_string()),
            Err(instead) => (false, instead),
        };
        let sign = if held { "held  " } else { "FAILED" };
        let colon = if seen.is_empty() { "" } else { ": " };
        self.say(&format!("{sign} {claim}{colon}{seen}"));
        let at_ms = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        let mut told = self.told();
        let step = told.step.clone();
        told.claims.push(Claim {
            step,
            claim: claim.to_owned(),
            held,
            seen,
            at_ms,
        });
    }

    /// The claims that did not hold.
    pub(crate) fn failed(&self) -> Vec<String> {
        let told = self.told();
        let failed = told.claims.iter().filter(|claim| !claim.held);
        failed.map(|claim| claim.claim.clone()).collect()
    }

    /// Prints the sum, as JSON where that was asked for.
    pub(crate) fn print(&self) {
        let told = self.told();
        let held = told.claims.iter().filter(|claim| claim.held).count();
        let took = self.start.elapsed();
        if self.json {
            let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
            println!("{:#}", json!({ "claims": told.claims, "took_ms": took_ms }));
        } else {
            let all = told.claims.len();
            println!("{held} of {all} claims held, {:.1} s", took.as_secs_f64());
        }
    }

    /// Whether lines are only kept, because something else draws the screen.
    pub(crate) fn set_quiet(&self, quiet: bool) {
        self.told().quiet = quiet;
    }

    /// The last lines that were said.
    pub(crate) fn last(&self, count: usize) -> Vec<String> {
        let told = self.told();
        told.lines[told.lines.len().saturating_sub(count)..].to_vec()
    }

    fn told(&self) -> std::sync::MutexGuard<'_, Told> {
        self.told
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// A time as the demo prints it.
pub(crate) fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_that_did_not_hold_is_named() {
        let report = Report::new(false);
        report.claim("water is wet", Ok("very"));
        report.claim("pigs fly", Err::<&str, _>("they walk".to_owned()));
        assert_eq!(report.failed(), ["pigs fly"]);
        assert!(report.last(1)[0].contains("FAILED pigs fly: they walk"));
    }
}
