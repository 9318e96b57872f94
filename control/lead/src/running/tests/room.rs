//! Leads whose disks fill.

use std::{collections::BTreeSet, io};

use super::*;
use crate::room::Space;

/// Disks that a test fills: who is named has no room.
#[derive(Clone, Debug, Default)]
struct Disks(Arc<RwLock<BTreeSet<String>>>);

#[derive(Debug)]
struct FilledDisk {
    lead: String,
    disks: Disks,
}

impl Disks {
    fn fill(&self, leads: &[&str]) {
        *self.0.write().unwrap() = leads.iter().map(|name| (*name).to_owned()).collect();
    }

    async fn group(&self) -> Group {
        let disk = |lead: &str| {
            let (lead, disks) = (lead.to_owned(), self.clone());
            Arc::new(FilledDisk { lead, disks }) as Arc<dyn Storage>
        };
        Group::on(&disk, NAMES, Arc::new(|_: &Way<'_>| Fate::Arrives)).await
    }
}

impl fmt::Display for FilledDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the disk of {}", self.lead)
    }
}

impl Storage for FilledDisk {
    fn open(&self, builder: &Builder) -> Result<Database, DiskError> {
        Memory.open(builder)
    }

    fn run(&self, work: Box<dyn FnOnce() + Send>) -> Boxed<'static, ()> {
        Memory.run(work)
    }

    fn space(&self) -> io::Result<Space> {
        let is_full = self.disks.0.read().unwrap().contains(&self.lead);
        Ok(Space {
            free: if is_full { 0 } else { 1 << 40 },
            total: 1 << 40,
        })
    }
}

/// Who leads, once somebody does who is none of these.
async fn leader_beside(group: &Group, others: &[&str]) -> String {
    let end = Instant::now() + LIMIT;
    loop {
        let leads = group.done("a", Method::GET, "/v1/leads").await;
        let leads = leads["items"].as_array().unwrap();
        let leader = leads.iter().find(|it| it["role"] == "leader");
        if let Some(name) = leader.and_then(|it| it["name"].as_str())
            && !others.contains(&name)
        {
            return name.to_owned();
        }
        assert!(Instant::now() < end, "one of {others:?} leads: {leads:?}");
        sleep(LOOK).await;
    }
}

/// Applies a goal until the answer is this one.
async fn apply_until(group: &Group, status: StatusCode, error: &str) -> Value {
    let end = Instant::now() + LIMIT;
    loop {
        let goal = GOAL.replace("NAME", "one");
        let asked = group.ask_for("a", Method::POST, "/v1/applications", goal);
        let (answered, answer) = asked.await;
        if answered == status && answer.to_string().contains(error) {
            return answer;
        }
        assert!(Instant::now() < end, "{answered}: {answer}");
        sleep(LOOK).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_with_little_room_lets_one_lead_that_has_it() {
    let disks = Disks::default();
    let group = disks.group().await;
    let first = leader_beside(&group, &[]).await;
    disks.fill(&[&first]);
    let second = leader_beside(&group, &[&first]).await;
    apply_until(&group, StatusCode::OK, "").await;
    // The next one hands over to the third, and not back.
    let leads = group.done("a", Method::GET, "/v1/leads").await;
    let leads = leads["items"].as_array().unwrap();
    let short = leads.iter().filter(|it| it["disk"]["is_short"] == true);
    let short: Vec<_> = short.map(|it| it["name"].as_str().unwrap()).collect();
    assert_eq!(short, [first.as_str()]);
    let path = format!("/v1/leads/{second}/drain");
    let drained = group.done("a", Method::POST, &path).await;
    assert_ne!(drained["leader"], first.as_str());
    group.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_are_refused_while_no_majority_has_room_and_reads_are_answered() {
    let disks = Disks::default();
    let group = disks.group().await;
    apply_until(&group, StatusCode::OK, "").await;
    disks.fill(&["a", "b"]);
    let why = "a has 0B free of a reserve of 256Mi, b has 0B free";
    apply_until(&group, StatusCode::SERVICE_UNAVAILABLE, why).await;
    let (status, read) = group.ask("a", Method::GET, "/v1/applications").await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(read["stale"], false);
    assert_eq!(read["items"].as_array().unwrap().len(), 1);
    // Who changes the leads may be on the way to mend it.
    group.done("a", Method::POST, "/v1/leads/drain").await;
    disks.fill(&["a"]);
    apply_until(&group, StatusCode::OK, "").await;
    group.end().await;
}
