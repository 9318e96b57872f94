use proptest::prelude::*;

use super::*;

const PEER: u32 = 7;

fn probing() -> Rtts {
    let mut rtts = Rtts::new(1);
    rtts.set(&in_use([PEER]), Duration::ZERO);
    rtts
}

fn in_use(nodes: impl IntoIterator<Item = u32>) -> BTreeMap<u32, Interest> {
    nodes
        .into_iter()
        .map(|node| (node, Interest::InUse))
        .collect()
}

/// Lets time come to the next question and returns it with its time; questions before it are missed.
fn next_ask(rtts: &mut Rtts) -> (Ask, Duration) {
    loop {
        let now = rtts.next().unwrap();
        if let Some(ask) = rtts.tick(now).first() {
            return (*ask, now);
        }
    }
}

fn answer_after(rtts: &mut Rtts, micros: u64) {
    let open = rtts.peers[&PEER].open;
    let (sequence, sent) = open.unwrap_or_else(|| {
        let (ask, now) = next_ask(rtts);
        (ask.sequence, now)
    });
    rtts.answered(PEER, sequence, sent + Duration::from_micros(micros));
}

/// Lets the next question be missed; the one after it is asked at once.
fn miss(rtts: &mut Rtts) {
    let open = rtts.peers[&PEER].open;
    let sent = open.map_or_else(|| next_ask(rtts).1, |(_, sent)| sent);
    rtts.tick(sent + TIMEOUT);
}

#[test]
fn three_misses_in_a_row_make_a_peer_unreachable_and_one_answer_reachable() {
    let mut rtts = probing();
    answer_after(&mut rtts, 500);
    for _ in 0..2 {
        miss(&mut rtts);
        miss(&mut rtts);
        assert_eq!(rtts.unreachable(), BTreeSet::new());
        assert_eq!(rtts.rtt_us(), BTreeMap::from([(PEER, 500)]));
        answer_after(&mut rtts, 500);
    }
    for _ in 0..4 {
        miss(&mut rtts);
    }
    assert_eq!(rtts.unreachable(), BTreeSet::from([PEER]));
    assert_eq!(rtts.rtt_us(), BTreeMap::new());
    answer_after(&mut rtts, 9000);
    assert_eq!(rtts.unreachable(), BTreeSet::new());
    assert_eq!(rtts.rtt_us(), BTreeMap::from([(PEER, 9000)]));
}

#[test]
fn a_peer_that_never_answered_is_unknown_until_it_is_unreachable() {
    let mut rtts = probing();
    for misses in 0..5 {
        assert_eq!(rtts.rtt_us(), BTreeMap::new());
        assert_eq!(
            rtts.unreachable().len(),
            usize::from(misses >= 3),
            "{misses}"
        );
        miss(&mut rtts);
    }
}

#[test]
fn questions_are_a_second_to_a_second_and_a_fifth_apart_and_one_is_open() {
    let mut rtts = probing();
    let (mut ask, mut last) = next_ask(&mut rtts);
    assert!(last < FIRST);
    let mut gaps = BTreeSet::new();
    for _ in 0..50 {
        rtts.answered(PEER, ask.sequence, last);
        let now;
        (ask, now) = next_ask(&mut rtts);
        let gap = now - last;
        assert!(
            (INTERVAL..INTERVAL + INTERVAL / JITTER).contains(&gap),
            "{gap:?}"
        );
        gaps.insert(gap);
        last = now;
    }
    assert!(gaps.len() > 40, "the interval has no jitter");
}

#[test]
fn late_foreign_and_repeated_answers_count_for_nothing() {
    let mut rtts = probing();
    let (ask, now) = next_ask(&mut rtts);
    let soon = now + Duration::from_millis(1);
    rtts.answered(ask.node + 1, ask.sequence, soon);
    rtts.answered(ask.node, ask.sequence + 1, soon);
    rtts.answered(ask.node, ask.sequence, now + TIMEOUT);
    assert_eq!(rtts.rtt_us(), BTreeMap::new());
    rtts.answered(ask.node, ask.sequence, soon);
    rtts.answered(ask.node, ask.sequence, now + Duration::from_millis(900));
    assert_eq!(rtts.rtt_us(), BTreeMap::from([(PEER, 1000)]));
}

#[test]
fn noise_is_not_reported_and_a_change_is_within_a_few_probes() {
    let mut rtts = probing();
    for sample in [10_000, 10_800, 9_300, 11_000, 9_000, 10_500] {
        answer_after(&mut rtts, sample);
        assert_eq!(rtts.rtt_us(), BTreeMap::from([(PEER, 10_000)]), "{sample}");
    }
    let mut probes = 0;
    while rtts.rtt_us()[&PEER] < 25_000 {
        answer_after(&mut rtts, 30_000);
        probes += 1;
        assert!(probes <= STRAYS, "{:?}", rtts.rtt_us());
    }
}

#[test]
fn a_peer_that_stays_keeps_its_measurement_and_one_that_leaves_is_forgotten() {
    let mut rtts = probing();
    answer_after(&mut rtts, 700);
    rtts.set(&in_use([PEER, 8]), Duration::from_secs(5));
    assert_eq!(rtts.rtt_us(), BTreeMap::from([(PEER, 700)]));
    rtts.set(&in_use([8]), Duration::from_secs(6));
    assert_eq!(rtts.rtt_us(), BTreeMap::new());
    assert!(
        rtts.next()
            .is_some_and(|next| next < Duration::from_secs(6))
    );
}

/// Runs time up to `until`; a peer answers after what `answer` says, or never. Returns every question with its time.
fn run(
    rtts: &mut Rtts,
    until: Duration,
    answer: impl Fn(u32, Duration) -> Option<Duration>,
) -> Vec<(Duration, u32)> {
    let mut asked = Vec::new();
    let mut answers: BTreeMap<(Duration, u64), u32> = BTreeMap::new();
    loop {
        let arrives = answers.first_key_value().map(|((at, _), _)| *at);
        let Some(now) = rtts.next().into_iter().chain(arrives).min() else {
            return asked;
        };
        if now > until {
            return asked;
        }
        while let Some(entry) = answers.first_entry().filter(|entry| entry.key().0 <= now) {
            let ((at, sequence), node) = entry.remove_entry();
            rtts.answered(node, sequence, at);
        }
        for ask in rtts.tick(now) {
            asked.push((now, ask.node));
            if let Some(after) = answer(ask.node, now) {
                answers.insert((now + after, ask.sequence), ask.node);
            }
        }
    }
}

#[test]
fn a_peer_in_use_that_falls_silent_is_unreachable_within_the_stated_time() {
    for seed in 0..50 {
        let mut rtts = Rtts::new(seed);
        rtts.set(&in_use(1..=40), Duration::ZERO);
        let rtt = Duration::from_millis(20);
        let dies = Duration::from_millis(10_000 + 37 * seed);
        let answer = |node, now| (node != PEER || now + rtt < dies).then_some(rtt);
        run(&mut rtts, dies, answer);
        assert_eq!(rtts.unreachable(), BTreeSet::new());
        run(&mut rtts, dies + SILENT, answer);
        assert_eq!(rtts.unreachable(), BTreeSet::from([PEER]), "seed {seed}");
        // One answer takes it back.
        run(&mut rtts, dies + SILENT + 2 * INTERVAL, |_, _| Some(rtt));
        assert_eq!(rtts.unreachable(), BTreeSet::new());
    }
}

#[test]
fn questions_stay_within_the_budget_however_large_the_mesh_is() {
    let minute = Duration::from_secs(60);
    for answers in [true, false] {
        let mut rtts = Rtts::new(3);
        let mut peers = in_use(0..20);
        peers.extend((20..2_000).map(|node| (node, Interest::Known)));
        rtts.set(&peers, Duration::ZERO);
        let asked = run(&mut rtts, minute, |_, _| {
            answers.then_some(Duration::from_millis(5))
        });
        let most = BUDGET as usize * 61 + 1;
        assert!(asked.len() <= most, "{} of {most}", asked.len());
        assert!(asked.len() > most * 7 / 10, "{} of {most}", asked.len());
        for window in asked.windows(2 * BUDGET as usize + 1) {
            assert!(window[window.len() - 1].0 - window[0].0 >= Duration::from_millis(990));
        }
        let of = |node| asked.iter().filter(|(_, asked)| *asked == node).count();
        assert!(
            (0..2_000).all(|node| of(node) >= 1),
            "somebody is never asked"
        );
        if answers {
            assert!((0..20).all(|node| of(node) >= 45), "in use: every second");
        }
    }
}

#[test]
fn a_small_mesh_is_asked_every_second_also_where_nothing_is_in_use() {
    let mut rtts = Rtts::new(3);
    let peers = (0..BUDGET).map(|node| (node, Interest::Known)).collect();
    rtts.set(&peers, Duration::ZERO);
    let asked = run(&mut rtts, Duration::from_secs(13), |_, _| {
        Some(Duration::from_millis(1))
    });
    for node in 0..BUDGET {
        let count = asked.iter().filter(|(_, asked)| *asked == node).count();
        assert!((10..=14).contains(&count), "{node}: {count}");
    }
}

proptest! {
    #[test]
    fn jitter_of_a_tenth_is_never_reported_and_a_step_is_within_three_probes(
        base in 1_000u32..200_000,
        noise in prop::collection::vec(-80i64..=80, 1..100),
        factor in prop_oneof![20u32..60, 180u32..400],
    ) {
        let mut rtts = probing();
        answer_after(&mut rtts, base.into());
        for noise in noise {
            let sample = i64::from(base) + i64::from(base) * noise / 1_000;
            answer_after(&mut rtts, u64::try_from(sample).unwrap());
            prop_assert_eq!(rtts.rtt_us()[&PEER], base);
        }
        let step = base * factor / 100;
        // Within a millisecond nothing is a step; such a difference is smoothed in.
        prop_assume!(step.abs_diff(base) > 2 * STRAY_US);
        for _ in 0..STRAYS {
            answer_after(&mut rtts, step.into());
        }
        let reported = rtts.rtt_us()[&PEER];
        prop_assert!(reported.abs_diff(step) <= STICKY_US.max(reported / STICKY_RATIO), "{reported} for {step}");
    }
}
