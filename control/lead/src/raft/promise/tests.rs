//! Leaders, voters that die and come back, messages that take their time: never two leaders with a lease.

use proptest::prelude::*;

use super::*;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

const LEAST: Duration = Duration::from_millis(750);

#[test]
fn a_promise_is_kept_whatever_is_promised_later() {
    let start = Instant::now();
    let mut promise = Promise::first(LEAST);
    assert_eq!(promise.left(start), Duration::ZERO);
    promise.give(ms(3_000), start);
    promise.give(ms(750), start + ms(100));
    assert_eq!(promise.left(start + ms(100)), ms(2_900));
    promise.give(ms(750), start + ms(2_900));
    assert_eq!(promise.left(start + ms(3_000)), ms(650));
}

#[test]
fn only_another_lease_is_written_and_a_shorter_one_when_no_longer_one_is_left() {
    let start = Instant::now();
    let mut promise = Promise::first(LEAST);
    assert!(!promise.must_write(LEAST, start));
    assert!(promise.must_write(ms(900), start));
    promise.written(ms(900));
    promise.give(ms(900), start);
    assert!(!promise.must_write(ms(900), start));
    assert!(!promise.must_write(LEAST, start + ms(149)));
    assert!(promise.must_write(LEAST, start + ms(150)));
    let again = Promise::again(ms(900), start);
    assert_eq!(again.left(start + ms(100)), ms(800));
    assert!(!again.must_write(LEAST, start + ms(100)));
}

#[test]
fn a_lease_is_what_a_majority_grants_to_this_leader() {
    let now = Instant::now();
    let (first, next) = (Vote::new_committed(3, 1), Vote::new_committed(4, 1));
    let three = [BTreeSet::from([1, 2, 3])];
    let joint = [BTreeSet::from([1, 2, 3]), BTreeSet::from([1, 4, 5])];
    let grants = Grants::default();
    assert!(grants.are_held(first, 1, &[BTreeSet::from([1])], now));
    assert!(!grants.are_held(first, 1, &three, now));
    grants.note(first, 2, now + ms(100));
    grants.note(first, 2, now + ms(50));
    assert!(grants.are_held(first, 1, &three, now + ms(99)));
    assert!(!grants.are_held(first, 1, &three, now + ms(100)));
    assert!(!grants.are_held(first, 1, &joint, now));
    grants.note(first, 4, now + ms(100));
    assert!(grants.are_held(first, 1, &joint, now));
    grants.note(next, 3, now + ms(10));
    assert!(!grants.are_held(first, 1, &three, now));
    assert!(grants.are_held(next, 1, &three, now));
    grants.note(first, 2, now + ms(900));
    assert!(!grants.are_held(first, 1, &three, now));
}

/// What happens next, some time after what happened before.
#[derive(Clone, Debug)]
enum Event {
    /// The leader asks a voter for a lease, and both ways take so long.
    Ask {
        voter: usize,
        lease: u64,
        there: u64,
        back: u64,
    },
    /// A voter dies and is there again.
    Restart { voter: usize },
}

fn event() -> impl Strategy<Value = (u64, Event)> {
    // The leader measures whatever it likes.
    let ask = (0..2_usize, 750..6_000_u64, 0..800_u64, 0..800_u64);
    let ask = ask.prop_map(|(voter, lease, there, back)| Event::Ask {
        voter,
        lease,
        there,
        back,
    });
    let restart = (0..2_usize).prop_map(|voter| Event::Restart { voter });
    (0..700_u64, prop_oneof![6 => ask, 1 => restart])
}

/// What voters and the leader do at a moment, milliseconds.
#[derive(Clone, Debug)]
enum Moment {
    Arrives {
        voter: usize,
        lease: u64,
        sent: u64,
        back: u64,
    },
    Answered {
        voter: usize,
        until: u64,
    },
    Restart {
        voter: usize,
    },
}

/// A voter, and what is on its disk.
struct Voter {
    promise: Promise,
    disk: Duration,
}

proptest! {
    #[test]
    fn nobody_is_elected_while_the_leader_holds_its_lease(
        events in prop::collection::vec(event(), 1..60),
    ) {
        let start = Instant::now();
        let vote = Vote::new_committed(3, 1);
        let voters = [BTreeSet::from([1, 2, 3])];
        let grants = Grants::default();
        let first = || Voter { promise: Promise::first(LEAST), disk: LEAST };
        let mut others = [first(), first()];
        let mut moments = BTreeMap::<(u64, usize), Moment>::new();
        let mut time = 0;
        for (number, (after, event)) in events.into_iter().enumerate() {
            time += after;
            let (at, moment) = match event {
                Event::Ask { voter, lease, there, back } =>
                    (time + there, Moment::Arrives { voter, lease, sent: time, back }),
                Event::Restart { voter } => (time, Moment::Restart { voter }),
            };
            moments.insert((at, number), moment);
        }
        let mut held = 0;
        while let Some(((at, number), moment)) = moments.pop_first() {
            let now = start + ms(at);
            match moment {
                Moment::Arrives { voter, lease, sent, back } => {
                    let Voter { promise, disk } = &mut others[voter];
                    if promise.must_write(ms(lease), now) {
                        *disk = ms(lease);
                        promise.written(ms(lease));
                    }
                    promise.give(ms(lease), now);
                    let answered = Moment::Answered { voter, until: sent + lease };
                    moments.insert((at + back, number), answered);
                }
                Moment::Answered { voter, until } => {
                    grants.note(vote, voter as u64 + 2, start + ms(until));
                }
                Moment::Restart { voter } => {
                    let disk = others[voter].disk;
                    others[voter].promise = Promise::again(disk, now);
                }
            }
            // From now until the next moment a candidate may ask them, and two of three elect it.
            let end = moments.first_key_value().map_or(at + 7_000, |((at, _), _)| *at);
            for time in at..=end {
                let now = start + ms(time);
                let is_free = |voter: &&Voter| voter.promise.left(now).is_zero();
                let is_held = grants.are_held(vote, 1, &voters, now);
                held += u32::from(is_held);
                // It votes for itself, or a third lead asks one of them: both are needed beside the leader's own.
                let elected = others.iter().filter(is_free).count() == 2;
                prop_assert!(!(is_held && elected), "at {time}: both");
            }
        }
        prop_assume!(held > 0);
    }
}
