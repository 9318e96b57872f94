use super::*;
use crate::{
    command::Command,
    report::Tier,
    world::{apply, facts, founded},
};

const MINUTE: u64 = 60_000;

fn edge() -> Name {
    "edge".parse().unwrap()
}

fn hash(digit: char) -> String {
    digit.to_string().repeat(64)
}

fn invite(digit: char) -> Command {
    Command::Invite {
        cluster: edge(),
        hash: hash(digit),
        lasts_ms: 15 * MINUTE,
    }
}

fn join(digit: char, request: char, issued_ms: u64) -> Command {
    Command::Join(Box::new(Join {
        cluster: edge(),
        hash: hash(digit),
        request: hash(request),
        chain: format!("chain {request}"),
        issued_ms,
    }))
}

fn register(session: u64) -> Command {
    Command::RegisterCluster {
        cluster: edge(),
        session,
        facts: Box::new(facts(Tier::Edge, 0)),
    }
}

fn why(outcome: Outcome) -> String {
    outcome.unwrap_err().to_string()
}

#[test]
fn one_request_uses_a_token_up_and_gets_its_answer_again() {
    let mut base = founded();
    apply(&mut base, 2_000, invite('a')).unwrap();
    assert_eq!(
        apply(&mut base, 3_000, join('a', '1', 3_000)),
        Ok(Applied::Changed)
    );
    // Another is refused, and the first keeps its answer, also where another certificate was signed for it.
    let other = why(apply(&mut base, 3_001, join('a', '2', 4_000)));
    assert!(other.contains("somebody else"), "{other}");
    assert_eq!(
        apply(&mut base, 3_002, join('a', '1', 5_000)),
        Ok(Applied::Unchanged)
    );
    let answer = base.may_join(&edge(), &hash('a'), &hash('1'), 0).unwrap();
    assert_eq!(answer.unwrap().chain, "chain 1");
    // Also once it has ended.
    assert_eq!(
        apply(&mut base, 60 * MINUTE, join('a', '1', 5_000)),
        Ok(Applied::Unchanged)
    );
}

#[test]
fn a_token_that_is_unknown_expired_replaced_or_withdrawn_lets_nobody_in() {
    let mut base = founded();
    let unknown = why(apply(&mut base, 1_000, join('a', '1', 1_000)));
    assert!(unknown.contains("is none"), "{unknown}");
    apply(&mut base, 1_000, invite('a')).unwrap();
    let wrong = why(apply(&mut base, 1_000, join('b', '1', 1_000)));
    assert_eq!(wrong, unknown, "nobody learns whether there is one");
    apply(&mut base, 1_000, invite('b')).unwrap();
    let replaced = why(apply(&mut base, 1_000, join('a', '1', 1_000)));
    assert_eq!(replaced, unknown);
    let late = 1_000 + 15 * MINUTE;
    let expired = why(apply(&mut base, late, join('b', '1', late)));
    assert!(expired.contains("expired"), "{expired}");
    apply(&mut base, late, invite('c')).unwrap();
    let withdraw = Command::Withdraw { cluster: edge() };
    assert_eq!(
        apply(&mut base, late, withdraw.clone()),
        Ok(Applied::Changed)
    );
    assert_eq!(apply(&mut base, late, withdraw), Ok(Applied::Unchanged));
    let withdrawn = why(apply(&mut base, late, join('c', '1', late)));
    assert_eq!(withdrawn, unknown);
}

#[test]
fn a_connected_cluster_is_nobody_else_s_and_a_lost_one_s_certificates_end_with_the_join() {
    let mut base = founded();
    apply(&mut base, 1_000, invite('a')).unwrap();
    apply(&mut base, 1_000, register(7)).unwrap();
    let connected = why(apply(&mut base, 1_001, join('a', '1', 2_000)));
    assert!(connected.contains("is connected"), "{connected}");
    let connected = why(apply(&mut base, 1_001, invite('b')));
    assert!(connected.contains("is connected"), "{connected}");
    let lost = Command::Lost {
        cluster: edge(),
        session: 7,
    };
    apply(&mut base, 1_500, lost).unwrap();
    apply(&mut base, 1_600, join('a', '1', 2_000)).unwrap();
    assert_eq!(base.revoked_until("weft://test/agent/edge"), 1_999);
}

#[test]
fn what_is_revoked_takes_its_invitation_along_and_is_not_renewed() {
    let mut base = founded();
    apply(&mut base, 1_000, register(7)).unwrap();
    let lost = Command::Lost {
        cluster: edge(),
        session: 7,
    };
    apply(&mut base, 1_500, lost).unwrap();
    apply(&mut base, 2_000, invite('a')).unwrap();
    let renewal = |shown_issued_ms| {
        Command::Renew(Box::new(Renewal {
            cluster: edge(),
            shown: hash('e'),
            shown_issued_ms,
            ends_ms: 9_000,
        }))
    };
    assert_eq!(apply(&mut base, 2_000, renewal(500)), Ok(Applied::Changed));
    assert_eq!(base.clusters[&edge()].certificate_ends_ms, Some(9_000));
    let revoke = |certificate| Command::RevokeCertificate {
        holder: "weft://test/agent/edge".to_owned(),
        certificate,
    };
    apply(&mut base, 3_000, revoke(None)).unwrap();
    assert!(base.security.invitations.is_empty());
    let refused = apply(&mut base, 3_000, renewal(3_000));
    assert!(
        matches!(refused, Err(Refusal::Revoked { .. })),
        "{refused:?}"
    );
    assert_eq!(
        apply(&mut base, 3_001, renewal(4_000)),
        Ok(Applied::Unchanged)
    );
    apply(&mut base, 3_002, revoke(Some(hash('e')))).unwrap();
    let refused = apply(&mut base, 3_003, renewal(4_000));
    assert!(
        matches!(refused, Err(Refusal::Revoked { .. })),
        "{refused:?}"
    );
    // A certificate that would be revoked at once is not given away.
    apply(&mut base, 3_004, invite('b')).unwrap();
    let refused = apply(&mut base, 3_004, join('b', '1', 3_000));
    assert!(
        matches!(refused, Err(Refusal::Revoked { .. })),
        "{refused:?}"
    );
    apply(&mut base, 3_004, join('b', '1', 4_000)).unwrap();
}

#[test]
fn invitations_are_bounded_and_old_ones_make_room() {
    let mut base = founded();
    let invite = |number: usize| Command::Invite {
        cluster: format!("c{number}").parse().unwrap(),
        hash: hash('a'),
        lasts_ms: 1_000,
    };
    for number in 0..INVITATIONS {
        apply(&mut base, 1_000, invite(number)).unwrap();
    }
    let full = apply(&mut base, 1_000, invite(INVITATIONS));
    assert!(matches!(full, Err(Refusal::Exhausted { .. })), "{full:?}");
    apply(&mut base, 2_000, invite(INVITATIONS)).unwrap();
    assert_eq!(base.security.invitations.len(), 1);
}
