use super::*;

fn candidate(instance: u32, node: u32) -> Candidate {
    Candidate {
        index: 100 + instance,
        identity: (0xfd12 << 112) | (u128::from(node) << 32) | u128::from(instance),
        instance,
        epoch: 1,
        node,
        ..Candidate::default()
    }
}

fn pick(policy: Policy, candidates: &[Candidate], sight: &Sight) -> Vec<u32> {
    let wanted = Wanted {
        policy,
        instance: None,
    };
    slots(wanted, candidates, from(sight), &mut Chosen::default())
}

/// As node 1 sees it.
fn from(sight: &Sight) -> View<'_> {
    View { here: 1, sight }
}

fn sight(rtt: &[(u32, u32)], unreachable: &[u32]) -> Sight {
    Sight {
        rtt_us: rtt.iter().copied().collect(),
        unreachable: unreachable.iter().copied().collect(),
        ..Sight::default()
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
    let mut chosen = Chosen::default();
    let wanted = Wanted {
        policy: Policy::Closest,
        instance: None,
    };
    let mut step = |rtt| {
        slots(
            wanted,
            &two,
            from(&sight(&[(2, 10_000), (3, rtt)], &[])),
            &mut chosen,
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
            from(&sight(&[], &[3])),
            &mut Chosen::default(),
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

#[test]
fn closest_takes_an_estimate_where_nothing_is_measured() {
    let two = [candidate(0, 2), candidate(1, 3)];
    let mut sight = sight(&[(2, 30_000)], &[]);
    sight.estimated_us.extend([(2, 1_000), (3, 8_000)]);
    assert_eq!(pick(Policy::Closest, &two, &sight), [101]);
    sight.rtt_us.insert(3, 90_000);
    assert_eq!(
        pick(Policy::Closest, &two, &sight),
        [100],
        "what is measured counts"
    );
}

/// Four nodes at 1, 1.5, 20 and 80 ms, two backends each.
fn far_and_near() -> (Vec<Candidate>, Sight) {
    let candidates = (0..8)
        .map(|number| candidate(number, 2 + number / 2))
        .collect();
    let sight = sight(&[(2, 1_000), (3, 1_500), (4, 20_000), (5, 80_000)], &[]);
    (candidates, sight)
}

#[test]
fn closest_overflows_to_the_next_band_while_the_near_one_is_saturated_or_silent() {
    let (mut candidates, mut sight) = far_and_near();
    let mut chosen = Chosen::default();
    let wanted = Wanted {
        policy: Policy::Closest,
        instance: None,
    };
    let mut closest = |candidates: &[Candidate], sight: &Sight| {
        slots(wanted, candidates, from(sight), &mut chosen)
    };
    let near = [100, 101, 102, 103];
    assert_eq!(closest(&candidates, &sight), near);
    for it in &mut candidates[..3] {
        it.load = Some(99);
    }
    assert_eq!(closest(&candidates, &sight), near, "one of them has room");
    candidates[3].load = Some(90);
    let both = [100, 101, 102, 103, 104, 105];
    assert_eq!(closest(&candidates, &sight), both);
    candidates[3].load = Some(70);
    assert_eq!(closest(&candidates, &sight), both, "not eased yet");
    for it in &mut candidates[4..6] {
        it.load = Some(95);
    }
    assert_eq!(closest(&candidates, &sight).len(), 8, "and the next");
    candidates[3].load = Some(55);
    assert_eq!(closest(&candidates, &sight), near);
    sight.unreachable.extend([2, 3]);
    candidates.iter_mut().for_each(|it| it.load = None);
    assert_eq!(closest(&candidates, &sight), [104, 105]);
}

#[test]
fn least_loaded_gives_more_slots_to_the_idle() {
    let mut candidates: Vec<Candidate> = (0..3).map(|number| candidate(number, 2)).collect();
    for (it, load) in candidates.iter_mut().zip([90, 30, 30]) {
        it.load = Some(load);
    }
    let mut chosen = Chosen::default();
    let wanted = Wanted {
        policy: Policy::LeastLoaded,
        instance: None,
    };
    let mut slots = Vec::new();
    for round in 1..=8 {
        let sight = Sight {
            round,
            ..Sight::default()
        };
        slots = super::slots(wanted, &candidates, from(&sight), &mut chosen);
    }
    let of = |index| slots.iter().filter(|slot| **slot == index).count();
    assert!(of(100) >= 1 && 2 * of(100) < of(101), "{slots:?}");
    assert!(of(101).abs_diff(of(102)) <= 1, "{slots:?}");
    let sight = Sight {
        round: 9,
        ..Sight::default()
    };
    candidates.iter_mut().for_each(|it| it.load = None);
    let equal = super::slots(wanted, &candidates, from(&sight), &mut chosen);
    assert_eq!(equal, [100, 101, 102], "nobody reports: equal at once");
}

#[test]
fn greenest_weighs_by_carbon_within_the_bound() {
    let clean = |number, node, carbon| Candidate {
        carbon_g_kwh: carbon,
        ..candidate(number, node)
    };
    let near = &[(2, 10_000), (3, 40_000)];
    type Distances = &'static [(u32, u32)];
    let cases: [(&str, Vec<Candidate>, Distances, Vec<u32>); 8] = [
        (
            "a quarter for twice the carbon",
            vec![clean(0, 2, Some(100)), clean(1, 3, Some(50))],
            near,
            vec![100, 101, 101, 101, 101],
        ),
        (
            "nothing for six times",
            vec![clean(0, 2, Some(300)), clean(1, 3, Some(50))],
            near,
            vec![101],
        ),
        (
            "the cleanest is too far",
            vec![clean(0, 2, Some(300)), clean(1, 3, Some(50))],
            &[(2, 10_000), (3, 50_001)],
            vec![100],
        ),
        (
            "all are too far: the nearest",
            vec![clean(0, 2, Some(300)), clean(1, 3, Some(50))],
            &[(2, 70_000), (3, 90_000)],
            vec![100],
        ),
        (
            "no distance is known",
            vec![clean(0, 2, Some(300)), clean(1, 3, Some(50))],
            &[],
            vec![101],
        ),
        (
            "no carbon is known",
            vec![clean(0, 2, None), clean(1, 3, None)],
            near,
            vec![100, 101],
        ),
        (
            "unknown is the dirtiest",
            vec![
                clean(0, 2, None),
                clean(1, 3, Some(50)),
                clean(2, 3, Some(100)),
            ],
            near,
            vec![100, 101, 101, 101, 101, 102],
        ),
        (
            "without any carbon",
            vec![clean(0, 2, Some(0)), clean(1, 3, Some(400))],
            near,
            vec![100],
        ),
    ];
    for (case, candidates, rtt, mut want) in cases {
        let mut got = pick(Policy::Greenest, &candidates, &sight(rtt, &[]));
        got.sort_unstable();
        want.sort_unstable();
        let share = |of: &[u32], index| {
            of.iter().filter(|slot| **slot == index).count() as f64 / of.len() as f64
        };
        for index in 100..103 {
            let (got, want) = (share(&got, index), share(&want, index));
            assert!((got - want).abs() < 0.05, "{case}: {index}: {got} {want}");
        }
    }
}

#[test]
fn greenest_does_not_follow_jitter_at_the_bound() {
    let candidates = [(0, 2, 50), (1, 3, 300)].map(|(number, node, carbon)| Candidate {
        carbon_g_kwh: Some(carbon),
        ..candidate(number, node)
    });
    let mut chosen = Chosen::default();
    let wanted = Wanted {
        policy: Policy::Greenest,
        instance: None,
    };
    for (rtt, want) in [
        (49_000, 100),
        (53_000, 100),
        (60_000, 100),
        (60_001, 101),
        (53_000, 101),
        (50_000, 100),
    ] {
        let sight = sight(&[(2, rtt), (3, 10_000)], &[]);
        let got = slots(wanted, &candidates, from(&sight), &mut chosen);
        assert_eq!(got, [want], "{rtt}");
    }
}

mod jitter {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// True distances of up to eight nodes, and what is measured of them: within a tenth of the band's width
        /// to either side.
        #[test]
        fn a_node_moves_at_most_once_while_distances_only_jitter(
            truth in prop::collection::vec(200u32..120_000, 2..8),
            noise in prop::collection::vec(prop::collection::vec(-100i64..=100, 8), 2..60),
        ) {
            let candidates: Vec<Candidate> = (0..truth.len() as u32)
                .map(|number| candidate(number, number + 2))
                .collect();
            let width = near::MIN_BAND_US.max(truth.iter().min().unwrap() / near::BAND_RATIO);
            let wanted = Wanted { policy: Policy::Closest, instance: None };
            let mut chosen = Chosen::default();
            let mut moves = vec![0; truth.len()];
            let mut before: Option<Vec<u32>> = None;
            for row in &noise {
                let rtt: Vec<(u32, u32)> = truth
                    .iter()
                    .zip(row)
                    .zip(2..)
                    .map(|((truth, noise), node)| {
                        let off = i64::from(width) * noise / 1_000;
                        (node, u32::try_from(i64::from(*truth) + off).unwrap())
                    })
                    .collect();
                let now = slots(wanted, &candidates, from(&sight(&rtt, &[])), &mut chosen);
                if let Some(before) = &before {
                    for (position, moves) in moves.iter_mut().enumerate() {
                        let index = 100 + position as u32;
                        *moves += u32::from(before.contains(&index) != now.contains(&index));
                    }
                }
                before = Some(now);
            }
            prop_assert!(moves.iter().all(|moves| *moves <= 1), "{moves:?}");
        }
    }
}
