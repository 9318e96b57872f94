use super::*;

fn candidate(instance: u32, node: u32) -> Candidate {
    Candidate {
        index: 100 + instance,
        identity: (0xfd12 << 112) | (u128::from(node) << 32) | u128::from(instance),
        instance,
        epoch: 1,
        node,
    }
}

fn pick(policy: Policy, candidates: &[Candidate], sight: &Sight) -> Vec<u32> {
    let wanted = Wanted {
        policy,
        instance: None,
    };
    slots(wanted, candidates, 1, sight, &mut BTreeSet::new())
}

fn sight(rtt: &[(u32, u32)], unreachable: &[u32]) -> Sight {
    Sight {
        rtt_us: rtt.iter().copied().collect(),
        unreachable: unreachable.iter().copied().collect(),
    }
}

#[test]
fn equal_policies_give_one_slot_each() {
    let three = [candidate(0, 1), candidate(1, 2), candidate(2, 3)];
    for policy in [Policy::Balanced, Policy::LeastLoaded, Policy::Greenest] {
        assert_eq!(
            pick(policy, &three, &Sight::default()),
            [100, 101, 102],
            "{policy:?}"
        );
    }
}

#[test]
fn backends_behind_a_silent_peer_are_skipped_unless_all_are() {
    let two = [candidate(0, 2), candidate(1, 3)];
    assert_eq!(pick(Policy::Balanced, &two, &sight(&[], &[2])), [101]);
    assert_eq!(
        pick(Policy::Balanced, &two, &sight(&[], &[2, 3])),
        [100, 101]
    );
}

#[test]
fn closest_prefers_this_node_then_the_shortest_round_trip() {
    let three = [candidate(0, 1), candidate(1, 2), candidate(2, 3)];
    let far = sight(&[(2, 5_000), (3, 40_000)], &[]);
    assert_eq!(pick(Policy::Closest, &three, &far), [100]);
    assert_eq!(pick(Policy::Closest, &three[1..], &far), [101]);
    assert_eq!(
        pick(
            Policy::Closest,
            &three[1..],
            &sight(&[(2, 5_000), (3, 40_000)], &[2])
        ),
        [102]
    );
}

#[test]
fn closest_takes_all_within_the_band_and_all_when_nothing_is_measured() {
    let two = [candidate(0, 2), candidate(1, 3)];
    let cases = [
        (&[(2, 300), (3, 1_200)][..], vec![100, 101]),
        (&[(2, 300), (3, 1_301)], vec![100]),
        (&[(2, 50_000), (3, 55_000)], vec![100, 101]),
        (&[(2, 50_000), (3, 55_001)], vec![100]),
        (&[(3, 90_000)], vec![101]),
        (&[], vec![100, 101]),
    ];
    for (rtt, want) in cases {
        assert_eq!(
            pick(Policy::Closest, &two, &sight(rtt, &[])),
            want,
            "{rtt:?}"
        );
    }
}

#[test]
fn jitter_at_the_edge_of_the_band_moves_nothing() {
    let two = [candidate(0, 2), candidate(1, 3)];
    let mut near = BTreeSet::new();
    let wanted = Wanted {
        policy: Policy::Closest,
        instance: None,
    };
    let mut step = |rtt| {
        slots(
            wanted,
            &two,
            1,
            &sight(&[(2, 10_000), (3, rtt)], &[]),
            &mut near,
        )
    };
    assert_eq!(step(11_000), [100, 101]);
    assert_eq!(step(11_900), [100, 101], "inside the band it left late");
    assert_eq!(step(12_100), [100], "past twice the width it leaves");
    assert_eq!(step(11_500), [100], "and comes back only inside the width");
    assert_eq!(step(10_900), [100, 101]);
}

#[test]
fn instance_is_that_instance_in_its_newest_epoch_or_nobody() {
    let old = candidate(4, 2);
    let new = Candidate {
        index: 7,
        epoch: 2,
        ..candidate(4, 3)
    };
    let wanted = |instance| Wanted {
        policy: Policy::Instance,
        instance,
    };
    let pick = |instance| {
        slots(
            wanted(instance),
            &[old, new],
            1,
            &sight(&[], &[3]),
            &mut BTreeSet::new(),
        )
    };
    assert_eq!(
        pick(Some(4)),
        [7],
        "also behind a silent peer: there is no other"
    );
    assert_eq!(pick(Some(5)), Vec::<u32>::new());
    assert_eq!(pick(None), Vec::<u32>::new());
}

#[test]
fn sticky_is_a_full_table_of_the_backends() {
    let three = [candidate(0, 1), candidate(1, 2), candidate(2, 3)];
    let slots = pick(Policy::Sticky, &three, &Sight::default());
    assert_eq!(slots.len(), maglev::SLOTS);
    for index in [100, 101, 102] {
        assert!(slots.contains(&index));
    }
}
