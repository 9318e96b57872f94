//! Leads that are far from each other, and a voter that keeps what it promised.

use openraft::{
    CommittedLeaderId, LogId, Vote,
    error::RaftError,
    raft::{AppendEntriesRequest, AppendEntriesResponse, VoteRequest, VoteResponse},
};

use super::*;
use crate::raft::{Types, election::Canvass, network::LEASE};

/// Longer than a heartbeat is where nothing is measured.
const FAR: Duration = Duration::from_millis(300);
/// Much longer than leads a LAN apart wait.
const LONG: Duration = Duration::from_secs(3);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leads_far_apart_are_a_group_with_the_usual_timers() {
    let group = Group::start(Arc::new(|_: &Way<'_>| Fate::Takes(FAR))).await;
    let leads = group.done("a", Method::GET, "/v1/leads").await;
    for lead in leads["items"].as_array().unwrap() {
        let timers = &lead["timers"];
        let figure = |name: &str| Duration::from_millis(timers[name].as_u64().unwrap());
        let rtt = Duration::from_micros(timers["rtt_us"].as_u64().unwrap());
        assert!(rtt >= FAR, "{lead}");
        assert!(figure("heartbeat_ms") >= 3 * FAR, "{lead}");
        assert!(figure("election_ms") >= 9 * FAR, "{lead}");
    }
    let goal = GOAL.replace("NAME", "far");
    let (status, answer) = group
        .ask_for("b", Method::POST, "/v1/applications", goal)
        .await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    group.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_voter_waits_as_long_as_its_leader_asked_for() {
    let is_silent = Arc::new(AtomicBool::new(false));
    let rule = {
        let is_silent = is_silent.clone();
        move |way: &Way<'_>| match way.path == APPEND && is_silent.load(Ordering::Relaxed) {
            true => Fate::IsLost,
            false => Fate::Arrives,
        }
    };
    let group = Group::start(Arc::new(rule)).await;
    let leads = group.done("a", Method::GET, "/v1/leads").await;
    let leads = leads["items"].as_array().unwrap();
    let of = |role: &str| leads.iter().find(|it| it["role"] == role).unwrap();
    let (leader, voter) = (of("leader"), of("voter"));
    let voter = voter["name"].as_str().unwrap();
    let status = group.done(voter, Method::GET, "/v1/status").await;
    let (term, leader) = (
        status["term"].as_u64().unwrap(),
        leader["id"].as_u64().unwrap(),
    );
    is_silent.store(true, Ordering::Relaxed);
    let ask = async |path: &str, body: Vec<u8>, lease: Option<Duration>| {
        let mut request = Request::post(path);
        if let Some(lease) = lease {
            request = request.header(LEASE, lease.as_millis().to_string());
        }
        let name = "a".to_owned();
        let request = request.body(body.into()).unwrap();
        let answer = group.doors.ask(voter, Role::Lead { name }, request).await;
        answer.unwrap().1
    };
    let asked = Instant::now();
    let heartbeat = AppendEntriesRequest::<Types> {
        vote: Vote::new_committed(term, leader),
        prev_log_id: None,
        entries: Vec::new(),
        leader_commit: None,
    };
    let answer = ask(APPEND, encode(&heartbeat).unwrap(), Some(LONG)).await;
    let answer: Result<AppendEntriesResponse<u64>, RaftError<u64>> = decode(&answer).unwrap();
    assert_eq!(answer.unwrap(), AppendEntriesResponse::Success);
    // Whoever asks it has more than it, in a later term than anybody's.
    let last = Some(LogId::new(CommittedLeaderId::new(term + 90, 9), 1 << 30));
    let canvass = encode(&Canvass { last }).unwrap();
    let vote = encode(&VoteRequest::new(Vote::new(term + 90, 9), last)).unwrap();
    loop {
        let answer = ask("/raft/v1/vote", vote.clone(), None).await;
        let answer: Result<VoteResponse<u64>, RaftError<u64>> = decode(&answer).unwrap();
        let would = ask(election::PATH, canvass.clone(), None).await;
        let would: bool = decode(&would).unwrap();
        let is_over = asked.elapsed() >= LONG;
        assert!(is_over || !would, "after {:?}", asked.elapsed());
        if answer.unwrap().vote_granted {
            break assert!(is_over, "after {:?}", asked.elapsed());
        }
        assert!(asked.elapsed() < LIMIT, "it votes for nobody any more");
        sleep(LOOK).await;
    }
    group.end().await;
}
