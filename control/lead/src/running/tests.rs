//! Leads in one process whose messages get lost as a test says.

use std::{
    fmt,
    sync::{
        Mutex, RwLock,
        atomic::{AtomicBool, Ordering},
    },
};

use axum::body::Body;
use bytes::Bytes;
use futures::future::join_all;
use http::{Method, Request, StatusCode};
use netmanager_api::identity::{Access, Identity, Role};
use redb::{Builder, Database, backends::InMemoryBackend};
use serde_json::Value;
use tokio::time::{Instant, sleep};
use tower::ServiceExt;

use super::*;
use crate::{
    dial::DialError,
    raft::{APPEND, DiskError, STAND, Stand, decode, election, encode},
    world::{Aside, Boxed, Clock, Storage, Wire},
};

mod agreement;
mod large;
mod pace;
mod plan;
mod room;
mod transfer;

const NAMES: &[&str] = &["a", "b", "c"];
const FIVE: &[&str] = &["a", "b", "c", "d", "e"];
const LIMIT: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(10);
const GOAL: &str = "
apiVersion: weft.dev/v1alpha1
kind: MeshApplication
metadata: { name: NAME }
spec: { services: [{ name: web, command: [/bin/true] }] }
";
/// Longer than an heir waits for its first votes.
const SLOW: Duration = Duration::from_millis(150);
/// How often a test is tried that a halted machine may disturb.
const ATTEMPTS: usize = 20;
const WINS: usize = 4;
/// How often an heir stands in a test that asks what it mostly does.
const ROUNDS: usize = 5;
/// So many candidacies fit into two leases, when each waits twice as long as the one before.
const FEW: u64 = 4;

/// A message, from one lead to another.
struct Way<'a> {
    from: &'a str,
    to: &'a str,
    path: &'a str,
    /// Bytes.
    size: usize,
}

/// What becomes of it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Arrives,
    IsSlow,
    /// It is so long on its way, unless its sender gives it up.
    Takes(Duration),
    /// It arrives, and its answer is so long on its way.
    AnswerTakes(Duration),
    IsLost,
    AnswerIsLost,
}

type Rule = Arc<dyn Fn(&Way<'_>) -> Fate + Send + Sync>;

/// The doors of the leads that run.
#[derive(Clone, Debug, Default)]
struct Doors(Arc<RwLock<BTreeMap<String, Router>>>);

impl Doors {
    async fn ask(
        &self,
        to: &str,
        role: Role,
        request: Request<Bytes>,
    ) -> Result<(StatusCode, Bytes), DialError> {
        let door = self.0.read().unwrap().get(to).cloned();
        let mut request = request.map(Body::from);
        let mesh = "demo".to_owned();
        request.extensions_mut().insert(Identity { mesh, role });
        let answer = door.ok_or("it does not run yet")?.oneshot(request).await?;
        let status = answer.status();
        let body = axum::body::to_bytes(answer.into_body(), 1 << 20).await?;
        Ok((status, body))
    }
}

#[derive(Clone)]
struct Lossy {
    from: String,
    doors: Doors,
    rule: Rule,
}

impl fmt::Debug for Lossy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Lossy").field(&self.from).finish()
    }
}

impl Wire for Lossy {
    fn exchange(
        &self,
        name: &str,
        _: SocketAddr,
        request: Request<Bytes>,
    ) -> Boxed<'_, Result<(StatusCode, Bytes), DialError>> {
        let to = name.to_owned();
        let fate = (self.rule)(&Way {
            from: &self.from,
            to: &to,
            path: request.uri().path(),
            size: request.body().len(),
        });
        let role = Role::Lead {
            name: self.from.clone(),
        };
        Box::pin(async move {
            match fate {
                Fate::IsLost => return Err("lost".into()),
                Fate::IsSlow => sleep(SLOW).await,
                Fate::Takes(time) => sleep(time).await,
                Fate::Arrives | Fate::AnswerIsLost | Fate::AnswerTakes(_) => {}
            }
            let answer = self.doors.ask(&to, role, request).await?;
            match fate {
                Fate::AnswerIsLost => return Err("lost".into()),
                Fate::AnswerTakes(time) => sleep(time).await,
                _ => {}
            }
            Ok(answer)
        })
    }
}

/// A disk that never keeps anybody waiting: what is asked here is how long messages take.
#[derive(Debug)]
struct Memory;

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("memory")
    }
}

impl Storage for Memory {
    fn open(&self, builder: &Builder) -> Result<Database, DiskError> {
        Ok(builder.create_with_backend(InMemoryBackend::new())?)
    }

    fn run(&self, work: Box<dyn FnOnce() + Send>) -> Boxed<'static, ()> {
        work();
        Box::pin(async {})
    }
}

fn settings(name: &str, names: &[&str], compaction: Compaction) -> Settings {
    let address = |number| SocketAddr::from(([127, 0, 0, 1], number));
    let names = names.iter().map(|name| (*name).to_owned());
    Settings {
        name: name.to_owned(),
        peers: names.zip((1..).map(address)).collect(),
        join: Join::default(),
        timers: Timers::default(),
        compaction,
        reserve: None,
        mesh: Some(Mesh {
            name: "demo".to_owned(),
            prefix6: "fd00:1:2::/48".parse().unwrap(),
            prefix4: None,
            seed: 1,
            incarnation: 0,
            lease_ms: 10_000,
        }),
    }
}

struct Group {
    doors: Doors,
    shutdown: CancellationToken,
    running: Vec<Running>,
}

impl Group {
    async fn start(rule: Rule) -> Self {
        Self::of(NAMES, rule).await
    }

    async fn of(names: &[&str], rule: Rule) -> Self {
        Self::on(&|_| Arc::new(Memory), names, rule).await
    }

    /// Each lead on a disk of its own.
    async fn on(disk: &dyn Fn(&str) -> Arc<dyn Storage>, names: &[&str], rule: Rule) -> Self {
        Self::with(disk, Aside::default(), names, rule).await
    }

    /// With what takes long worked out where a test says.
    async fn with(
        disk: &dyn Fn(&str) -> Arc<dyn Storage>,
        aside: Aside,
        names: &[&str],
        rule: Rule,
    ) -> Self {
        Self::compacting(disk, aside, Compaction::default(), names, rule).await
    }

    /// With snapshots as often as a test says.
    async fn compacting(
        disk: &dyn Fn(&str) -> Arc<dyn Storage>,
        aside: Aside,
        compaction: Compaction,
        names: &[&str],
        rule: Rule,
    ) -> Self {
        let mut group = Self {
            doors: Doors::default(),
            shutdown: CancellationToken::new(),
            running: Vec::new(),
        };
        for name in names {
            let world = group.world(name, disk(name), aside.clone(), rule.clone());
            let settings = settings(name, names, compaction);
            // One that ends by itself ends alone.
            let lead = Running::start(settings, world, group.shutdown.child_token());
            let lead = lead.await.unwrap();
            let mut doors = group.doors.0.write().unwrap();
            doors.insert((*name).to_owned(), lead.routes());
            group.running.push(lead);
        }
        group
    }

    /// What lead `name` finds around it.
    fn world(&self, name: &str, storage: Arc<dyn Storage>, aside: Aside, rule: Rule) -> World {
        World {
            storage,
            wire: Arc::new(Lossy {
                from: name.to_owned(),
                doors: self.doors.clone(),
                rule,
            }),
            clock: Clock::default(),
            aside,
        }
    }

    /// Asks a lead as a user.
    async fn ask(&self, lead: &str, method: Method, path: &str) -> (StatusCode, Value) {
        self.ask_for(lead, method, path, String::new()).await
    }

    async fn ask_for(
        &self,
        lead: &str,
        method: Method,
        path: &str,
        body: String,
    ) -> (StatusCode, Value) {
        let role = Role::User {
            name: "user".to_owned(),
            access: Access::Admin,
        };
        let request = Request::builder().method(method).uri(path);
        let request = request.body(Bytes::from(body)).unwrap();
        let (status, body) = self.doors.ask(lead, role, request).await.unwrap();
        (status, serde_json::from_slice(&body).unwrap())
    }

    /// Asks until the group does it: while there is no leader, and where nobody could take over, it is refused.
    async fn done(&self, lead: &str, method: Method, path: &str) -> Value {
        let end = Instant::now() + LIMIT;
        loop {
            let (status, answer) = self.ask(lead, method.clone(), path).await;
            if status == StatusCode::OK {
                return answer;
            }
            let may = [StatusCode::SERVICE_UNAVAILABLE, StatusCode::CONFLICT];
            assert!(may.contains(&status), "{status}: {answer}");
            assert!(Instant::now() < end, "{status}: {answer}");
            sleep(LOOK).await;
        }
    }

    async fn end(self) {
        self.shutdown.cancel();
        for lead in self.running {
            lead.run().await.unwrap();
        }
        // They hold the leads, and are held by them.
        self.doors.0.write().unwrap().clear();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_answers_with_who_leads_also_where_the_heir_did_not_win() {
    let heir = Arc::new(Mutex::new(None::<String>));
    // Who is told to stand does not hear it, and its own candidacy is heard by nobody.
    let rule = {
        let heir = heir.clone();
        move |way: &Way<'_>| {
            let mut heir = heir.lock().unwrap();
            if way.path == STAND {
                *heir = Some(way.to.to_owned());
                return Fate::IsLost;
            }
            match way.path.ends_with("/vote") && heir.as_deref() == Some(way.from) {
                true => Fate::IsLost,
                false => Fate::Arrives,
            }
        }
    };
    let group = Group::start(Arc::new(rule)).await;
    let said = loop {
        let answer = group.done("a", Method::POST, "/v1/leads/a/drain").await;
        if heir.lock().unwrap().is_some() {
            break answer["leader"].clone();
        }
        // Another led from the beginning: it is its turn.
        group.done("a", Method::POST, "/v1/leads/drain").await;
    };
    let heir = heir.lock().unwrap().clone().unwrap();
    assert_ne!(said, heir.as_str(), "nobody was asked to vote for it");
    group.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_drain_nobody_waits_for_goes_on_leading_where_no_other_does() {
    let giver = Arc::new(watch::Sender::new(None::<String>));
    // The heir does not hear that it is to stand, and from then on nobody else finds out whether it could win.
    let rule = {
        let giver = giver.clone();
        move |way: &Way<'_>| {
            if way.path == STAND {
                giver.send_replace(Some(way.from.to_owned()));
            }
            let is_over = way.path == STAND || way.path == election::PATH;
            match is_over && giver.borrow().is_some() {
                true => Fate::IsLost,
                false => Fate::Arrives,
            }
        }
    };
    let group = Group::start(Arc::new(rule)).await;
    let mut gives_way = giver.subscribe();
    let leader = tokio::select! {
        answer = group.done("a", Method::POST, "/v1/leads/drain") => panic!("{answer}"),
        // The asker goes away here.
        giver = gives_way.wait_for(Option::is_some) => giver.unwrap().clone().unwrap(),
    };
    let end = Instant::now() + LIMIT;
    loop {
        let goal = GOAL.replace("NAME", "one");
        let path = "/v1/applications";
        let (status, answer) = group.ask_for(&leader, Method::POST, path, goal).await;
        if status == StatusCode::OK {
            break;
        }
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{answer}");
        assert!(Instant::now() < end, "{leader} leads no more: {answer}");
    }
    let leads = group.done(&leader, Method::GET, "/v1/leads").await;
    let leads = leads["items"].as_array().unwrap();
    let leads: Vec<_> = leads.iter().filter(|it| it["role"] == "leader").collect();
    assert_eq!(leads[0]["name"], leader.as_str(), "{leads:?}");
    group.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_heir_stands_when_it_can_win_and_not_before() {
    // A term in vain takes the followers of whoever else is elected away. A halted machine may spoil some.
    for names in [NAMES, FIVE] {
        let mut seen = Vec::new();
        for _ in 0..ROUNDS {
            seen.push(terms_of_a_drain(names).await);
        }
        let won = seen.iter().filter(|terms| **terms == Some(1)).count();
        assert!(2 * won > ROUNDS, "{names:?}: {seen:?}");
    }
}

/// Hands over as soon as there is a leader; how many terms that takes, if it is done.
async fn terms_of_a_drain(names: &[&str]) -> Option<u64> {
    let group = Group::of(names, Arc::new(|_: &Way<'_>| Fate::Arrives)).await;
    let term = async || {
        let status = group.done("a", Method::GET, "/v1/status").await;
        status["term"].as_u64().unwrap()
    };
    group.done("a", Method::GET, "/v1/leads").await;
    let before = term().await;
    let (status, answer) = group.ask("a", Method::POST, "/v1/leads/drain").await;
    let terms = term().await - before;
    group.end().await;
    println!("{terms} terms: {answer}");
    (status == StatusCode::OK).then_some(terms)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_drained_twice_at_a_time_gives_way_once() {
    // A halted machine may spoil some.
    let mut seen = Vec::new();
    while !seen.contains(&Some(1)) {
        assert!(seen.len() < ATTEMPTS, "{seen:?}");
        seen.push(two_drains().await);
        assert!(!seen.contains(&Some(2)), "{seen:?}");
    }
}

/// Asks the leader to give way while it does; how often another was told to stand, where both are answered alike.
async fn two_drains() -> Option<usize> {
    let told = Arc::new(watch::Sender::new(0));
    // The second is asked for while the first waits for its heir.
    let rule = {
        let told = told.clone();
        move |way: &Way<'_>| match way.path {
            STAND => {
                told.send_modify(|told| *told += 1);
                Fate::IsSlow
            }
            _ => Fate::Arrives,
        }
    };
    let group = Group::start(Arc::new(rule)).await;
    let leads = group.done("a", Method::GET, "/v1/leads").await;
    let leads = leads["items"].as_array().unwrap();
    let leader = leads.iter().find(|it| it["role"] == "leader");
    let leader = leader.unwrap()["name"].as_str().unwrap();
    let drain = || group.ask(leader, Method::POST, "/v1/leads/drain");
    let second = async {
        let mut told = told.subscribe();
        told.wait_for(|told| *told > 0).await.unwrap();
        drain().await
    };
    let ((status, first), second) = tokio::select! {
        both = async { tokio::join!(drain(), second) } => both,
        () = sleep(LIMIT) => panic!("no answer"),
    };
    group.end().await;
    println!("{first} {second:?}");
    let is_done = status == StatusCode::OK && second == (status, first);
    is_done.then_some(*told.borrow())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_told_late_to_stand_leaves_the_next_leader_alone() {
    let group = Group::start(Arc::new(|_: &Way<'_>| Fate::Arrives)).await;
    let leads = group.done("a", Method::GET, "/v1/leads").await;
    let leads = leads["items"].as_array().unwrap();
    let by_role = |role: &str| leads.iter().find(|it| it["role"] == role).unwrap();
    let (leader, heir) = (by_role("leader"), by_role("voter"));
    let heir = heir["name"].as_str().unwrap();
    let status = group.done(heir, Method::GET, "/v1/status").await;
    let term = status["term"].as_u64().unwrap();
    // Who was elected within the last lease votes for nobody.
    sleep(Timers::default().lease()).await;
    let late = Stand {
        giver: leader["id"].as_u64(),
        term: Some(term - 1),
    };
    let request = Request::post(STAND).body(encode(&late).unwrap().into());
    let role = Role::Lead {
        name: "a".to_owned(),
    };
    let (_, answer) = group.doors.ask(heir, role, request.unwrap()).await.unwrap();
    assert!(!decode::<bool>(&answer).unwrap(), "it leads");
    let status = group.done(heir, Method::GET, "/v1/status").await;
    assert_eq!(status["term"].as_u64(), Some(term));
    group.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_heir_wins_also_where_votes_take_long() {
    // One that stands again before the votes are there loses them, and every time costs a term.
    let mut won = 0;
    for _ in 0..ATTEMPTS {
        won += usize::from(slow_votes().await);
        if won == WINS {
            return;
        }
    }
    panic!("{won} of {ATTEMPTS}");
}

/// Hands over where every vote takes long; whether the heir leads then, in one of the next few terms.
async fn slow_votes() -> bool {
    let heir = Arc::new(Mutex::new(None::<String>));
    let rule = {
        let heir = heir.clone();
        move |way: &Way<'_>| match way.path {
            STAND => {
                *heir.lock().unwrap() = Some(way.to.to_owned());
                Fate::Arrives
            }
            "/raft/v1/vote" => Fate::IsSlow,
            _ => Fate::Arrives,
        }
    };
    let group = Group::start(Arc::new(rule)).await;
    group.done("a", Method::GET, "/v1/leads").await;
    let term = async || {
        let status = group.done("a", Method::GET, "/v1/status").await;
        status["term"].as_u64().unwrap()
    };
    let before = term().await;
    // Who was elected within the last lease votes for nobody.
    sleep(Timers::default().lease()).await;
    let (_, answer) = group.ask("a", Method::POST, "/v1/leads/drain").await;
    let terms = term().await - before;
    group.end().await;
    let heir = heir.lock().unwrap().clone();
    let leads = heir.is_some_and(|heir| answer["leader"] == heir.as_str());
    println!("{terms} terms: {answer}");
    leads && terms <= FEW
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_heir_has_what_was_asked_for_before_the_leader_gave_way() {
    // A halted machine may spoil some; an heir that lacks an entry wins now and then, where none happens to wait.
    let (mut won, mut lost) = (0, 0);
    while won < WINS {
        match busy().await {
            true => won += 1,
            false => lost += 1,
        }
        assert!(lost < WINS, "{won} won and {lost} lost");
    }
}

/// Hands over while changes wait for those before them; whether the heir leads then, in one of the next few terms.
async fn busy() -> bool {
    let rule = |way: &Way<'_>| match way.path {
        APPEND => Fate::IsSlow,
        _ => Fate::Arrives,
    };
    let group = Group::start(Arc::new(rule)).await;
    let term = async || {
        let status = group.done("a", Method::GET, "/v1/status").await;
        status["term"].as_u64().unwrap()
    };
    group.done("a", Method::GET, "/v1/leads").await;
    sleep(Timers::default().lease()).await;
    let before = term().await;
    let is_over = AtomicBool::new(false);
    let write = async |name: &str| {
        for number in 0.. {
            if is_over.load(Ordering::Relaxed) {
                return;
            }
            let goal = GOAL.replace("NAME", &format!("{name}{number}"));
            let path = "/v1/applications";
            group.ask_for("a", Method::POST, path, goal).await;
        }
    };
    let drain = async {
        sleep(2 * SLOW).await;
        let (status, answer) = group.ask("a", Method::POST, "/v1/leads/drain").await;
        is_over.store(true, Ordering::Relaxed);
        println!("{answer}");
        status == StatusCode::OK
    };
    let writers = ["a", "b", "c", "d", "e", "f", "g", "h"].map(write);
    let (is_done, _) = tokio::join!(drain, join_all(writers));
    let terms = term().await - before;
    group.end().await;
    println!("{terms} terms");
    is_done && terms <= FEW
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removal_whose_first_answer_was_lost_is_no_removal_of_a_stranger() {
    for _ in 0..ATTEMPTS {
        match remove_unheard().await {
            StatusCode::OK => return,
            // Where the machine stands still the group is busy with itself: a user asks again, and may find it done.
            StatusCode::CONFLICT | StatusCode::SERVICE_UNAVAILABLE => {}
            status => panic!("{status}"),
        }
    }
    panic!("each of {ATTEMPTS} removals was refused");
}

/// Removes a lead in a new group, where the leader's first answer is lost; what the user is told.
async fn remove_unheard() -> StatusCode {
    let is_armed = Arc::new(AtomicBool::new(false));
    let rule = {
        let is_armed = is_armed.clone();
        move |way: &Way<'_>| {
            let is_ask = way.path == "/raft/v1/ask";
            match is_ask && is_armed.swap(false, Ordering::Relaxed) {
                true => Fate::AnswerIsLost,
                false => Fate::Arrives,
            }
        }
    };
    let group = Group::start(Arc::new(rule)).await;
    let leads = group.done("a", Method::GET, "/v1/leads").await;
    let leads = leads["items"].as_array().unwrap();
    let followers = leads.iter().filter(|lead| lead["role"] == "voter");
    let [asked, removed] = followers
        .map(|lead| lead["name"].as_str().unwrap())
        .collect::<Vec<_>>()[..]
    else {
        panic!("three leads, of which one leads: {leads:?}");
    };
    is_armed.store(true, Ordering::Relaxed);
    let path = format!("/v1/leads/{removed}");
    let (status, _) = group.ask(asked, Method::DELETE, &path).await;
    if status == StatusCode::OK {
        // Once this lead has heard of it, a second wish names a stranger.
        let again = async || group.ask(asked, Method::DELETE, &path).await.0;
        let end = Instant::now() + LIMIT;
        while again().await != StatusCode::NOT_FOUND {
            assert!(Instant::now() < end, "{removed} is removed again and again");
            sleep(LOOK).await;
        }
    }
    group.end().await;
    status
}
