//! Changing who the leads are, while the group goes on.

use std::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::Duration,
};

use control_api::http::{Changed, Drained, Lead, LeadAdded, List};
use http::StatusCode;
use weft_lead::LeadError;

use crate::{
    apply, goal,
    mesh::{LIMIT, TestMesh, wait_for},
    names,
    stopwatch::{ensure, undisturbed},
};

/// How many changes are made before a hand-over, and after it.
const CHANGES: usize = 10;

pub(crate) async fn leads(mesh: &TestMesh, asked: &str) -> Vec<Lead> {
    let (status, text) = mesh.ask(asked, "GET", "/v1/leads", "").await;
    assert_eq!(status, StatusCode::OK, "{text}");
    let list: List<Lead> = serde_json::from_str(&text).unwrap();
    list.items
}

fn voters(leads: &[Lead]) -> Vec<&str> {
    let voters = leads.iter().filter(|lead| lead.role != "learner");
    voters.map(|lead| lead.name.as_str()).collect()
}

/// Starts a lead and adds it, or puts it in the place of `old`; its id, when it votes and the old one is gone.
pub(crate) async fn add(mesh: &mut TestMesh, asked: &str, name: &str, old: Option<&str>) -> u64 {
    let address = mesh.join_lead(name).await;
    let old = old.map_or("null".to_owned(), |old| format!("{old:?}"));
    let body = format!(r#"{{"name":"{name}","address":"{address}","replaces":{old}}}"#);
    let mut id = None;
    wait_for("it to vote", LIMIT, async || {
        let leads = leads(mesh, asked).await;
        let Some(new) = leads.iter().find(|lead| lead.address == address) else {
            // Before it is added, and where the leader fell over it.
            let (status, text) = mesh.ask(asked, "POST", "/v1/leads", &body).await;
            let may = [StatusCode::OK, StatusCode::CONFLICT];
            assert!(may.contains(&status), "{text}");
            return false;
        };
        id = Some(new.id);
        let gone = |old: u64| leads.iter().all(|lead| lead.id != old);
        new.role != "learner" && new.replaces.is_none_or(gone)
    })
    .await;
    id.unwrap()
}

async fn remove(mesh: &TestMesh, asked: &str, name: &str) -> (StatusCode, String) {
    mesh.ask(asked, "DELETE", &format!("/v1/leads/{name}"), "")
        .await
}

/// Removes a lead, as soon as a majority without it answers.
async fn remove_soon(mesh: &TestMesh, asked: &str, name: &str) {
    let path = format!("/v1/leads/{name}");
    let mut may_be_gone = false;
    wait_for("its removal", LIMIT, async || {
        let (status, text) = mesh.ask_now(asked, ("DELETE", &path), "", None).await;
        match status {
            StatusCode::OK => return true,
            // Nobody knows what came of it.
            StatusCode::SERVICE_UNAVAILABLE => may_be_gone = true,
            StatusCode::NOT_FOUND if may_be_gone => return true,
            _ => assert_eq!(status, StatusCode::CONFLICT, "{text}"),
        }
        println!("{text}");
        false
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_grows_from_one_lead_to_five_and_shrinks_again_without_losing_a_change() {
    let mut mesh = TestMesh::start(&["a"]).await;
    mesh.leader().await;
    let mut want = Vec::new();
    let mut number = 0;
    let mut change = async |mesh: &TestMesh, asked: &str| {
        number += 1;
        let name = format!("app{number:02}");
        assert_eq!(apply(mesh, asked, &name).await.0, StatusCode::OK, "{name}");
        want.push(format!("shop/{name}"));
        want.clone()
    };
    change(&mesh, "a").await;
    for name in ["b", "c", "d", "e"] {
        add(&mut mesh, "a", name, None).await;
        change(&mesh, name).await;
    }
    assert_eq!(voters(&leads(&mesh, "e").await), ["a", "b", "c", "d", "e"]);

    // The leader among them: it hands over first.
    for name in ["a", "b", "c", "d"] {
        remove_soon(&mesh, "e", name).await;
        let ended = mesh.ended(name).await;
        assert!(matches!(ended, Err(LeadError::Removed { .. })), "{ended:?}");
        change(&mesh, "e").await;
    }
    assert_eq!(voters(&leads(&mesh, "e").await), ["e"]);
    let want = change(&mesh, "e").await;
    assert_eq!(names(&mesh, "e").await, want);
    let (status, text) = remove(&mesh, "e", "e").await;
    assert_eq!(status, StatusCode::CONFLICT, "{text}");
    assert!(text.contains("only voter"), "{text}");
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lead_that_lost_its_disk_comes_back_as_another_member() {
    let mut mesh = TestMesh::start(&["a", "b", "c"]).await;
    let leader = mesh.leader().await;
    let [lost, other] = mesh.others(&leader);
    mesh.stop(&lost).await;
    mesh.lose_disk(&lost);

    // Two of three are left: neither may go now.
    wait_for("the refusal", LIMIT, async || {
        let (status, text) = remove(&mesh, &leader, &other).await;
        assert_eq!(status, StatusCode::CONFLICT, "{text}");
        text.contains(&format!("silent: {lost}"))
    })
    .await;

    let before = leads(&mesh, &leader).await;
    let old = before.iter().find(|lead| lead.name == lost).unwrap();
    assert!(!old.answers, "{old:?}");
    let new = add(&mut mesh, &other, &lost, Some(&lost)).await;
    assert_ne!(new, old.id);
    wait_for("all to answer", LIMIT, async || {
        let after = leads(&mesh, &lost).await;
        assert_eq!(after.len(), 3, "{after:?}");
        after.iter().all(|lead| lead.answers)
    })
    .await;

    // The new member counts: with it and one more there is a majority.
    mesh.stop(&other).await;
    assert_eq!(apply(&mesh, &lost, "one").await.0, StatusCode::OK);
    assert_eq!(names(&mesh, &lost).await, ["shop/one"]);
    mesh.start_lead(&other).await;
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lead_that_was_removed_while_it_was_away_is_told_so() {
    let mut mesh = TestMesh::start(&["a", "b", "c"]).await;
    let leader = mesh.leader().await;
    let [away, other] = mesh.others(&leader);
    mesh.stop(&away).await;
    remove_soon(&mesh, &other, &away).await;

    mesh.start_lead(&away).await;
    let ended = mesh.ended(&away).await.unwrap_err();
    assert!(ended.to_string().contains("weft lead add"), "{ended}");
    assert_eq!(apply(&mesh, &other, "one").await.0, StatusCode::OK);
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lead_that_was_removed_before_it_heard_of_the_group_is_told_so() {
    let mut mesh = TestMesh::start_some(&["a", "b", "c"], &["a", "b"]).await;
    mesh.leader().await;
    remove_soon(&mesh, "a", "c").await;

    mesh.start_lead("c").await;
    let ended = mesh.ended("c").await;
    assert!(matches!(ended, Err(LeadError::Removed { .. })), "{ended:?}");
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_leader_hands_over_and_no_change_is_refused_or_lost() {
    for names in [&["a", "b", "c"][..], &["a", "b", "c", "d", "e"]] {
        undisturbed(async || drain(names).await).await;
    }
}

async fn drain(names: &[&str]) -> Result<(), String> {
    let mesh = TestMesh::start(names).await;
    let leader = mesh.leader().await;
    let asked = names.iter().find(|name| **name != leader).unwrap();
    let path = format!("/v1/leads/{leader}/drain");
    let (made, is_drained) = (AtomicUsize::new(0), AtomicBool::new(false));
    let writing = async {
        let mut after = 0;
        while after < CHANGES {
            after += usize::from(is_drained.load(Ordering::Relaxed));
            let number = made.load(Ordering::Relaxed);
            let body = goal(&format!("app{number}"));
            let ask = ("POST", "/v1/applications");
            let (status, text) = mesh.ask_now(asked, ask, &body, None).await;
            ensure(status == StatusCode::OK, format!("refused: {text}"))?;
            made.store(number + 1, Ordering::Relaxed);
        }
        Ok::<_, String>(())
    };
    let draining = async {
        while made.load(Ordering::Relaxed) < CHANGES {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let drain = async || mesh.ask_now(asked, ("POST", &path), "", None).await;
        let (mut status, mut text) = drain().await;
        if status == StatusCode::CONFLICT {
            // Where the disk is slow nobody is caught up in time: the leader goes on, and is asked once more.
            println!("{text}");
            (status, text) = drain().await;
        }
        ensure(status == StatusCode::OK, format!("not drained: {text}"))?;
        is_drained.store(true, Ordering::Relaxed);
        Ok(serde_json::from_str::<Drained>(&text).unwrap().leader)
    };
    let ((), heir) = tokio::try_join!(writing, draining)?;
    assert_ne!(heir, leader);
    let number = made.load(Ordering::Relaxed);
    assert_eq!(crate::names(&mesh, asked).await.len(), number);
    // A lead that does not lead may be stopped: nothing changes.
    let (status, text) = mesh.ask_now(asked, ("POST", &path), "", None).await;
    mesh.end().await;
    ensure(status == StatusCode::OK, &*text)?;
    let again = serde_json::from_str::<Drained>(&text).unwrap().leader;
    ensure(again == heir, format!("{heir} led, and then {again}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wish_about_the_leads_that_cannot_be_met_says_why() {
    let mesh = TestMesh::start(&["a"]).await;
    mesh.leader().await;
    let address = leads(&mesh, "a").await.remove(0).address;
    let body = |name: &str, address: &str, rest: &str| {
        format!(r#"{{"name":"{name}","address":"{address}"{rest}}}"#)
    };
    let here = address.to_string();
    let cases = [
        (body("a", "127.0.0.1:9", ""), 409, "member already"),
        (body("b", &here, ""), 409, "is lead a's address"),
        (body("B", "127.0.0.1:9", ""), 400, "\"field\":\"name\""),
        (body("b", "0.0.0.0:9", ""), 400, "\"field\":\"address\""),
        (
            body("b", "127.0.0.1:9", r#","replaces":"z""#),
            404,
            "no lead z",
        ),
        (body("b", "127.0.0.1:9", r#","vote":true"#), 400, "vote"),
    ];
    for (body, want, part) in cases {
        let (status, text) = mesh.ask("a", "POST", "/v1/leads", &body).await;
        assert_eq!(status.as_u16(), want, "{body}: {text}");
        assert!(text.contains(part), "{body}: {text}");
    }
    let (status, text) = remove(&mesh, "a", "z").await;
    assert_eq!(status, StatusCode::NOT_FOUND, "{text}");
    let (status, text) = mesh.ask("a", "POST", "/v1/leads/drain", "").await;
    assert_eq!(status, StatusCode::CONFLICT, "{text}");

    // A lead that never comes is taken back, and does not stop the group.
    let added: (_, LeadAdded) = mesh
        .post("a", "/v1/leads", &body("b", "127.0.0.1:9", ""))
        .await;
    let again: (_, LeadAdded) = mesh
        .post("a", "/v1/leads", &body("b", "127.0.0.1:9", ""))
        .await;
    assert_eq!(added, again);
    let (status, text) = mesh
        .ask("a", "POST", "/v1/leads", &body("c", "127.0.0.1:8", ""))
        .await;
    assert_eq!(status, StatusCode::CONFLICT, "{text}");
    assert_eq!(apply(&mesh, "a", "one").await.0, StatusCode::OK);
    let removed: (StatusCode, String) = remove(&mesh, "a", "b").await;
    let changed: Changed = serde_json::from_str(&removed.1).unwrap();
    assert!(changed.changed);
    assert_eq!(voters(&leads(&mesh, "a").await), ["a"]);
    mesh.end().await;
}
