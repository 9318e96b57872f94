//! Leads of which one has another state than the log gives.

use super::*;
use crate::world::Folder;

/// Entries between two checkpoints.
const EVERY: u64 = 10;

fn compaction() -> Compaction {
    Compaction {
        every: EVERY,
        keep: 2,
    }
}

fn folders(dir: &tempfile::TempDir) -> impl Fn(&str) -> Arc<dyn Storage> {
    let path = dir.path().to_owned();
    move |name| Arc::new(Folder(path.join(name)))
}

async fn group(dir: &tempfile::TempDir, names: &[&str]) -> Group {
    let arrives: Rule = Arc::new(|_: &Way<'_>| Fate::Arrives);
    Group::compacting(
        &folders(dir),
        Aside::default(),
        compaction(),
        names,
        arrives,
    )
    .await
}

/// Waits until a lead that ended has let go of its disk, which Raft's own tasks do a moment later.
async fn free(dir: &tempfile::TempDir, name: &str) {
    let file = dir.path().join(name).join("lead.redb");
    let end = Instant::now() + LIMIT;
    while Database::open(&file).is_err() {
        assert!(Instant::now() < end, "{name} holds its disk");
        sleep(LOOK).await;
    }
}

/// Makes a change that is acknowledged.
async fn change(group: &Group, lead: &str, name: &str) {
    let end = Instant::now() + LIMIT;
    loop {
        let goal = GOAL.replace("NAME", name);
        let (status, answer) = group
            .ask_for(lead, Method::POST, "/v1/applications", goal)
            .await;
        if status == StatusCode::OK {
            return;
        }
        assert!(Instant::now() < end, "{status}: {answer}");
        sleep(LOOK).await;
    }
}

/// Changes until `leads` show a checkpoint behind entry `after` that is the same, or not; which.
async fn checkpoint(group: &Group, lead: &str, leads: usize, after: u64) -> (u64, bool) {
    let end = Instant::now() + LIMIT;
    for number in 0.. {
        change(group, lead, &format!("app-{after}-{}", number % 5)).await;
        let answer = group.done(lead, Method::GET, "/v1/leads").await;
        let states = answer["items"]
            .as_array()
            .unwrap()
            .iter()
            .map(|it| &it["state"]);
        let states = states.filter(|it| it["index"].as_u64() > Some(after));
        let states: Vec<_> = states.collect();
        let is_one = states.iter().all(|it| it["index"] == states[0]["index"]);
        if states.len() == leads && is_one {
            let differs = states.iter().any(|it| it["differs"] == true);
            return (states[0]["index"].as_u64().unwrap(), differs);
        }
        assert!(Instant::now() < end, "{answer}");
    }
    unreachable!("it ends by a checkpoint or in time")
}

/// Gives a lead what the log does not say.
fn spoil(group: &Group, name: &str) {
    let lead = group
        .running
        .iter()
        .find(|it| it.lead.name == name)
        .unwrap();
    lead.lead.replica.write(|base| base.next_epoch += 1_000);
}

async fn follower(group: &Group) -> String {
    let leads = group.done("a", Method::GET, "/v1/leads").await;
    let leads = leads["items"].as_array().unwrap();
    let follower = leads.iter().find(|it| it["role"] == "voter").unwrap();
    follower["name"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_three_leads_the_odd_one_ends_and_does_not_start_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut group = group(&dir, NAMES).await;
    let (first, differs) = checkpoint(&group, "a", 3, 0).await;
    assert!(!differs);
    assert_eq!((first + 1) % EVERY, 0);

    let odd = follower(&group).await;
    let at = group
        .running
        .iter()
        .position(|it| it.lead.name == odd)
        .unwrap();
    let other = NAMES.iter().find(|name| **name != odd).unwrap();
    spoil(&group, &odd);
    let running = group.running.remove(at);
    let changing = async {
        for number in 0.. {
            change(&group, other, &format!("more-{}", number % 5)).await;
        }
    };
    let ended = tokio::select! {
        ended = running.run() => ended.unwrap_err(),
        () = changing => unreachable!("it never ends"),
        () = sleep(LIMIT) => panic!("it goes on"),
    };
    let LeadError::Start(StartError::Damaged(damaged)) = ended else {
        panic!("{ended:?}");
    };
    let text = damaged.to_string();
    for part in ["the state at entry ", "expected ", " as of ", "found "] {
        assert!(text.contains(part), "{text}");
    }
    change(&group, other, "after").await;

    drop(running);
    group.doors.0.write().unwrap().remove(&odd);
    free(&dir, &odd).await;
    let arrives: Rule = Arc::new(|_: &Way<'_>| Fate::Arrives);
    let world = group.world(&odd, folders(&dir)(&odd), Aside::default(), arrives);
    let settings = settings(&odd, NAMES, compaction());
    let again = Running::start(settings, world, CancellationToken::new()).await;
    let Err(StartError::Damaged(again)) = again else {
        panic!("{again:?}");
    };
    assert_eq!(again.flaw, damaged.flaw);
    group.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_leads_nobody_knows_which_is_odd_and_both_go_on_and_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let group = group(&dir, &["a", "b"]).await;
    let (first, differs) = checkpoint(&group, "a", 2, 0).await;
    assert!(!differs);
    spoil(&group, &follower(&group).await);
    let mut after = first;
    // What was on its way there was of before.
    while let (index, false) = checkpoint(&group, "a", 2, after).await {
        after = index;
    }
    change(&group, "b", "after").await;
    group.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lead_that_restarts_has_the_state_that_it_had() {
    let dir = tempfile::tempdir().unwrap();
    let first = group(&dir, NAMES).await;
    change(&first, "a", "app").await;
    let (index, _) = checkpoint(&first, "a", 3, 0).await;
    first.end().await;
    for name in NAMES {
        free(&dir, name).await;
    }
    let again = group(&dir, NAMES).await;
    let (next, differs) = checkpoint(&again, "a", 3, index).await;
    assert!(next > index && !differs);
    again.end().await;
}
