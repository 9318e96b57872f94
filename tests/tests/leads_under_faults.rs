//! Real leads under faults for a short time; `cargo xtask faults` does it for longer.

use std::time::Duration;

use weft_tests::{binary, faults::Faults};

/// The same in every run: what it draws was seen to hold.
const SEED: u64 = 7;

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn what_clients_see_of_leads_under_faults_is_linearizable() {
    let weft = binary("weft");
    let data = tempfile::tempdir().unwrap();
    let faults = Faults {
        binaries: weft.parent().unwrap().to_owned(),
        data: data.path().to_owned(),
        seed: SEED,
        time: Duration::from_secs(30),
        rtt: Duration::ZERO,
    };
    let summary = faults.run();
    if summary.is_err() {
        // What happened is told in it.
        println!("kept: {}", data.keep().display());
    }
    let summary = summary.unwrap();
    println!("{summary}");
    assert!(summary.faults > 2 && summary.answered > 100, "{summary}");
}
