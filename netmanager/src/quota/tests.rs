use ebpf_common::layout::{ACCOUNT_DATAGRAM, ACCOUNT_TCP};
use proptest::prelude::*;

use super::*;

fn account(kind: usize, opened: u64, closed: u64) -> BTreeMap<u32, Account> {
    let mut account = Account::default();
    account.opened[kind] = opened;
    account.closed[kind] = closed;
    BTreeMap::from([(7, account)])
}

fn used(books: &Books, counted: &BTreeMap<u32, Account>, kind: usize) -> u64 {
    books.used(counted, 7, kind)
}

#[test]
fn what_the_janitor_collects_is_gone_at_once_and_once() {
    let mut books = Books::default();
    let counted = account(ACCOUNT_TCP, 10, 4);
    books.begin(counted.clone());
    let removed = Counts::from([((7, ACCOUNT_TCP), 2)]);
    let changed = books.collect(&removed);
    assert_eq!(changed[&7].gone[ACCOUNT_TCP], 2);
    assert_eq!(used(&books, &counted, ACCOUNT_TCP), 4);
    let found = Counts::from([((7, ACCOUNT_TCP), 4)]);
    assert_eq!(books.end(&counted, &found), BTreeMap::new());
    assert_eq!(used(&books, &counted, ACCOUNT_TCP), 4);
}

#[test]
fn what_the_map_evicted_is_found_missing_by_a_walk() {
    let mut books = Books::default();
    let counted = account(ACCOUNT_DATAGRAM, 1000, 0);
    books.begin(counted.clone());
    let found = Counts::from([((7, ACCOUNT_DATAGRAM), 300)]);
    books.end(&counted, &found);
    assert_eq!(used(&books, &counted, ACCOUNT_DATAGRAM), 300);
    // And by the next one no more.
    books.begin(counted.clone());
    assert_eq!(books.end(&counted, &found), BTreeMap::new());
}

#[test]
fn flows_that_a_take_over_brought_are_counted_by_the_first_walk() {
    let mut books = Books::default();
    // Five of ten were closed before it.
    let counted = account(ACCOUNT_TCP, 0, 5);
    books.begin(counted.clone());
    let found = Counts::from([((7, ACCOUNT_TCP), 5)]);
    books.end(&counted, &found);
    books.begin(counted.clone());
    books.end(&counted, &found);
    assert_eq!(used(&books, &counted, ACCOUNT_TCP), 5);
    assert_eq!(used(&books, &account(ACCOUNT_TCP, 1, 5), ACCOUNT_TCP), 6);
}

#[test]
fn an_account_goes_when_its_endpoint_and_its_flows_are_gone() {
    let mut books = Books::default();
    let counted = account(ACCOUNT_TCP, 10, 9);
    let nobody = BTreeSet::new();
    assert_eq!(books.close(&counted, &nobody), [0; 0]);
    books.collect(&Counts::from([((7, ACCOUNT_TCP), 1)]));
    assert_eq!(books.close(&counted, &BTreeSet::from([7])), [0; 0]);
    assert_eq!(books.close(&counted, &nobody), [7]);
}

#[test]
fn an_endpoint_is_pressed_from_half_of_its_datagrams_on() {
    let books = Books::default();
    for (kind, opened, quota, want) in [
        (ACCOUNT_DATAGRAM, 25, 100, true),
        (ACCOUNT_DATAGRAM, 24, 100, false),
        (ACCOUNT_DATAGRAM, 1_000, 0, false),
        (ACCOUNT_TCP, 1_000, 100, false),
    ] {
        let counted = account(kind, opened, 0);
        assert_eq!(
            books.pressed(&counted, quota).contains(&7),
            want,
            "{kind} {opened} {quota}"
        );
    }
}

proptest! {
    /// Flows come, are closed, are collected and vanish while a walk goes on; each is seen by it or not as its
    /// place in the map wants. However that falls, no living flow is taken for gone, and what vanished and was
    /// missed is no more than what was closed meanwhile.
    #[test]
    fn a_walk_never_takes_a_living_flow_for_gone(
        old in prop::collection::vec((0_u8..5, any::<bool>()), 0..60),
        new in prop::collection::vec((any::<bool>(), any::<bool>(), any::<bool>()), 0..60),
    ) {
        let (mut living, mut closed, mut collected, mut vanished, mut seen) = (0, 0, 0, 0, 0);
        for (fate, before_visit) in &old {
            match fate {
                0 => { closed += 1; seen += u64::from(!before_visit); }
                1 => { vanished += 1; seen += u64::from(!before_visit); }
                2 => collected += 1,
                _ => { living += 1; seen += 1; }
            }
        }
        let mut closed_new = 0;
        for (is_closed, same_second, visited) in &new {
            if *is_closed { closed_new += 1 } else { living += 1 }
            seen += u64::from(*same_second && *visited);
        }
        let kind = ACCOUNT_DATAGRAM;
        let mut books = Books::default();
        books.begin(account(kind, old.len() as u64, 0));
        books.collect(&Counts::from([((7, kind), collected)]));
        let after = account(kind, (old.len() + new.len()) as u64, closed + closed_new);
        books.end(&after, &Counts::from([((7, kind), seen)]));
        let used = used(&books, &after, kind);
        prop_assert!(used >= living, "{used} of {living}");
        prop_assert!(used <= living + vanished, "{used} of {living} and {vanished} vanished");
    }
}
