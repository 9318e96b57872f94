//! Entries that take longer than a heartbeat: to send, to read, to write.

use super::*;

/// How long a slow disk takes for a write.
const WRITE: Duration = Duration::from_millis(350);
/// What a link carries where large messages are slow, bytes per millisecond.
const LINK: usize = 500;
/// Takes such a link longer than two heartbeats.
const LARGE: usize = 300_000;

/// A disk on which every write takes longer than a heartbeat, and not as long as a lease.
#[derive(Debug)]
struct SlowDisk;

impl fmt::Display for SlowDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a slow disk")
    }
}

impl Storage for SlowDisk {
    fn open(&self, builder: &Builder) -> Result<Database, DiskError> {
        Memory.open(builder)
    }

    fn run(&self, work: Box<dyn FnOnce() + Send>) -> Boxed<'static, ()> {
        Box::pin(async {
            sleep(WRITE).await;
            work();
        })
    }
}

/// A link that carries [`LINK`]; what is small passes what is large.
fn takes(way: &Way<'_>) -> Fate {
    match way.path {
        APPEND => {
            let time = u64::try_from(way.size / LINK).unwrap();
            Fate::Takes(Duration::from_millis(time))
        }
        _ => Fate::Arrives,
    }
}

/// A goal file of [`LARGE`] bytes.
fn large(name: &str) -> String {
    let word = "x".repeat(LARGE);
    let goal = GOAL.replace("NAME", name);
    goal.replace("/bin/true", &format!("/bin/true, {word}"))
}

impl Group {
    /// Applies a goal until it is acknowledged.
    async fn apply(&self, lead: &str, goal: &str) {
        let end = Instant::now() + LIMIT;
        loop {
            let path = "/v1/applications";
            let asked = self.ask_for(lead, Method::POST, path, goal.to_owned());
            let (status, answer) = asked.await;
            if status == StatusCode::OK {
                return;
            }
            assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{answer}");
            assert!(Instant::now() < end, "{answer}");
            sleep(LOOK).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_entry_that_takes_longer_than_a_heartbeat_to_send_is_committed() {
    let group = Group::start(Arc::new(takes)).await;
    group.apply("a", &large("one")).await;
    group.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_entry_whose_readers_take_longer_than_a_heartbeat_is_committed() {
    // They hear their leader with every attempt, and elect no other.
    let rule = |way: &Way<'_>| match takes(way) {
        Fate::Takes(time) => Fate::AnswerTakes(time),
        fate => fate,
    };
    let group = Group::start(Arc::new(rule)).await;
    group.apply("a", &large("one")).await;
    group.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entries_that_take_longer_than_a_heartbeat_to_write_are_committed() {
    let rule = Arc::new(|_: &Way<'_>| Fate::Arrives);
    let group = Group::on(&|_| Arc::new(SlowDisk), NAMES, rule).await;
    for name in ["one", "two", "three"] {
        group.apply("a", &large(name)).await;
    }
    group.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lead_that_was_away_gets_what_takes_longer_than_a_heartbeat_to_send() {
    let is_away = Arc::new(AtomicBool::new(true));
    let rule = {
        let is_away = is_away.clone();
        move |way: &Way<'_>| {
            let is_cut = way.from == "c" || way.to == "c";
            match is_cut && is_away.load(Ordering::Relaxed) {
                true => Fate::IsLost,
                false => takes(way),
            }
        }
    };
    let group = Group::start(Arc::new(rule)).await;
    for name in ["one", "two", "three", "four"] {
        group.apply("a", &large(name)).await;
    }
    is_away.store(false, Ordering::Relaxed);
    let end = Instant::now() + LIMIT;
    while group.running[2].read(|base| base.applications.len()) < 4 {
        assert!(Instant::now() < end, "c does not catch up");
        sleep(LOOK).await;
    }
    group.end().await;
}
