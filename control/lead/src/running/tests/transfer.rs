//! A snapshot to a lead that was away, by a connection that breaks.

use std::sync::atomic::AtomicU64;

use super::*;

/// Entries between two snapshots: a few changes and what the group itself writes are fewer.
const EVERY: u64 = 40;
/// Bytes of a goal: all of them are many parts.
const LARGE: usize = 100_000;
/// Parts that are lost one after the other: more than are tried before openraft sends the snapshot again.
const LOST: u64 = 12;

const SNAPSHOT: &str = "/raft/v1/snapshot";

/// What becomes of what is sent to the lead that was away.
#[derive(Debug, Default)]
struct Line {
    /// Nothing gets there.
    is_cut: AtomicBool,
    /// Bytes of a snapshot that got there.
    arrived: AtomicU64,
    /// After so many bytes it breaks.
    breaks_at: AtomicU64,
    lost: AtomicU64,
}

impl Line {
    fn fate(&self, way: &Way<'_>) -> Fate {
        if way.to != "c" && way.from != "c" {
            return Fate::Arrives;
        }
        if self.is_cut.load(Ordering::Relaxed) {
            return Fate::IsLost;
        }
        if way.path != SNAPSHOT {
            return Fate::Arrives;
        }
        let breaks = self.arrived.load(Ordering::Relaxed) >= self.breaks_at.load(Ordering::Relaxed);
        if breaks && self.lost.load(Ordering::Relaxed) < LOST {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return Fate::IsLost;
        }
        self.arrived.fetch_add(way.size as u64, Ordering::Relaxed);
        Fate::Arrives
    }
}

async fn apply(group: &Group, number: u64) {
    let word = "x".repeat(LARGE);
    let goal = GOAL.replace("NAME", &format!("app-{}", number % 20));
    let goal = goal.replace("/bin/true", &format!("/bin/true, n{number}, {word}"));
    let end = Instant::now() + LIMIT;
    loop {
        let asked = group.ask_for("a", Method::POST, "/v1/applications", goal.clone());
        let (status, answer) = asked.await;
        if status == StatusCode::OK {
            return;
        }
        assert!(Instant::now() < end, "{status}: {answer}");
        sleep(LOOK).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_breaks_off_goes_on_where_it_was() {
    let line = Arc::new(Line::default());
    line.is_cut.store(true, Ordering::Relaxed);
    let rule = {
        let line = line.clone();
        move |way: &Way<'_>| line.fate(way)
    };
    let compaction = Compaction {
        every: EVERY,
        keep: 1,
    };
    let disk = |_: &str| -> Arc<dyn Storage> { Arc::new(Memory) };
    let aside = Aside::default();
    let group = Group::compacting(&disk, aside, compaction, NAMES, Arc::new(rule)).await;
    let lead = |name: &str| {
        group
            .running
            .iter()
            .find(|it| it.lead.name == name)
            .unwrap()
    };
    let snapshot = || lead("a").lead.raft.metrics().borrow().snapshot;
    let mut number = 0;
    while snapshot().is_none() {
        apply(&group, number).await;
        number += 1;
    }
    // The end of the log is beyond what is in the log still.
    for more in 0..3 {
        apply(&group, number + more).await;
    }
    let size = lead("a").read(|base| encode(base).unwrap().len()) as u64;
    line.breaks_at.store(size * 8 / 10, Ordering::Relaxed);
    line.is_cut.store(false, Ordering::Relaxed);
    let end = Instant::now() + LIMIT;
    while lead("c").lead.replica.applied() < lead("a").lead.replica.applied() {
        assert!(Instant::now() < end, "it does not catch up: {line:?}");
        sleep(LOOK).await;
    }
    let arrived = line.arrived.load(Ordering::Relaxed);
    assert_eq!(
        line.lost.load(Ordering::Relaxed),
        LOST,
        "it did not break off"
    );
    assert!(arrived < size * 3 / 2, "{arrived} bytes for {size}");
    let state = |name| lead(name).read(Clone::clone);
    assert!(state("a") == state("c"), "it is another");
    group.end().await;
}
