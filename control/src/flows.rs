//! `weft flows`.

use std::time::Duration;

use clap::Args;
use netmanager_api::observe::{Filter, FlowsRequest, Request, Verdict};

use crate::node_door::Door;

/// How long flows are shown where nobody says --follow.
const A_WHILE: Duration = Duration::from_secs(5);

/// Shows what happens to flows on this node: opened, ended, refused and why.
#[derive(Debug, Args)]
pub(crate) struct Flows {
    /// Go on until interrupted; else it ends after five seconds.
    #[arg(short, long)]
    follow: bool,
    /// Only of this service: namespace/application/service, or its last parts.
    #[arg(long)]
    service: Option<String>,
    /// Only of this pod of the node: namespace/name, or its name; `node` is the node itself.
    #[arg(long)]
    pod: Option<String>,
    /// Only what ended so: opened, ended, refused, delivered, tunnelled.
    #[arg(long, value_parser = verdict)]
    verdict: Option<Verdict>,
    /// One flow in so many.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    sample: u32,
    /// At most so many events per second on the node; the rest is counted.
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..))]
    per_second: u32,
    #[command(flatten)]
    door: Door,
}

fn verdict(name: &str) -> Result<Verdict, String> {
    Verdict::from_name(name).ok_or_else(|| {
        let names = Verdict::ALL.map(Verdict::name);
        format!("it is one of {}", names.join(", "))
    })
}

impl Flows {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let request = FlowsRequest {
            filter: Filter {
                service: self.service,
                pod: self.pod,
                verdict: self.verdict,
            },
            sample_every: self.sample,
            per_second: self.per_second,
        };
        let until = (!self.follow).then_some(A_WHILE);
        self.door.ask(&Request::Flows(request), until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_is_one_of_a_few_words() {
        assert_eq!(verdict("refused"), Ok(Verdict::Refused));
        assert!(verdict("dropped").unwrap_err().contains("refused"));
    }
}
