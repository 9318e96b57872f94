use std::collections::BTreeSet;

use super::*;

const PEER: u32 = 7;
const DEVICE: u32 = 1420;

/// One path that carries `carries` bytes, and what the state makes of it.
struct World {
    paths: Paths,
    now: Duration,
    carries: u32,
    /// So many of the next probes are lost.
    lose: u32,
    sent: Vec<u32>,
}

impl World {
    fn new(device: u32, carries: u32) -> Self {
        let mut paths = Paths::default();
        paths.set([PEER], device, Duration::ZERO);
        Self {
            paths,
            now: Duration::ZERO,
            carries,
            lose: 0,
            sent: Vec::new(),
        }
    }

    /// Lets time pass; what fits is answered after 10 ms.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(next) = self.paths.next().filter(|next| *next <= end) {
            self.now = self.now.max(next);
            for probe in self.paths.tick(self.now) {
                self.sent.push(probe.size);
                if self.lose > 0 {
                    self.lose -= 1;
                } else if probe.size <= self.carries {
                    self.now += Duration::from_millis(10);
                    self.paths.answered(probe.node, probe.sequence, self.now);
                }
            }
        }
        self.now = self.now.max(end);
    }

    fn mtu(&self) -> u32 {
        self.paths.mtu(PEER).unwrap()
    }
}

const LONG: Duration = Duration::from_secs(20);

#[test]
fn a_path_without_a_bottleneck_costs_one_probe_and_a_confirmation_a_second() {
    let mut world = World::new(DEVICE, DEVICE);
    world.pass(Duration::from_millis(500));
    assert_eq!(world.sent, [DEVICE]);
    world.pass(Duration::from_secs(60));
    assert!(world.sent.iter().all(|size| *size == DEVICE));
    assert!(
        (55..=62).contains(&world.sent.len()),
        "{}",
        world.sent.len()
    );
    assert_eq!(world.paths.narrow(), BTreeMap::new());
}

#[test]
fn the_search_finds_what_every_path_carries_and_never_more() {
    for device in [1300, 1370, 1420, 8920, 65_455] {
        for carries in (PATH_FLOOR..=device.min(9_000)).step_by(7).chain([device]) {
            let mut world = World::new(device, carries);
            world.pass(Duration::from_secs(60));
            let found = world.mtu();
            assert!(found <= carries, "{found} of {carries} through {device}");
            assert!(
                carries - found <= STEP,
                "{found} of {carries} through {device}"
            );
        }
    }
}

#[test]
fn a_path_that_shrinks_is_noticed_within_three_seconds_and_measured_again() {
    let mut world = World::new(DEVICE, DEVICE);
    world.pass(LONG);
    world.carries = 1320;
    world.pass(Duration::from_secs(3));
    assert!(world.mtu() <= 1320, "{}", world.mtu());
    world.pass(LONG);
    assert!((1304..=1320).contains(&world.mtu()), "{}", world.mtu());
    assert_eq!(world.paths.narrow(), BTreeMap::from([(PEER, world.mtu())]));
}

#[test]
fn a_path_that_widens_is_used_again_after_a_minute() {
    let mut world = World::new(DEVICE, 1300);
    world.pass(LONG);
    assert!(world.mtu() <= 1300);
    world.carries = DEVICE;
    world.pass(RAISE + LONG);
    assert_eq!(world.mtu(), DEVICE);
}

#[test]
fn what_was_known_before_is_used_until_the_path_is_measured() {
    let mut paths = Paths::new(BTreeMap::from([(PEER, 1340), (8, 9_000)]));
    paths.set([PEER, 8], DEVICE, Duration::ZERO);
    assert_eq!(paths.narrow(), BTreeMap::from([(PEER, 1340)]));
    let mut world = World {
        paths,
        ..World::new(DEVICE, DEVICE)
    };
    world.pass(Duration::from_millis(30));
    assert_eq!(world.paths.narrow(), BTreeMap::new(), "{:?}", world.sent);
}

#[test]
fn a_silent_peer_keeps_what_is_known_of_its_path() {
    let mut world = World::new(DEVICE, 1340);
    world.pass(LONG);
    let known = world.mtu();
    world.carries = 0;
    let before = world.sent.len();
    world.pass(LONG);
    assert_eq!(world.mtu(), known);
    let sent = world.sent.len() - before;
    assert!(sent <= 45, "{sent} probes into the void in 20 s");
    world.carries = 1340;
    world.pass(LONG);
    assert_eq!(world.mtu(), known);
    // From the start, too: nothing says that the path is narrow.
    let mut world = World::new(DEVICE, 0);
    world.pass(LONG);
    assert_eq!(world.mtu(), DEVICE);
    world.carries = 1300;
    world.pass(LONG);
    assert!(world.mtu() <= 1300);
}

#[test]
fn one_or_two_lost_probes_change_nothing() {
    for lost in 1..TRIES {
        let mut world = World::new(DEVICE, DEVICE);
        world.pass(LONG);
        world.lose = lost;
        world.pass(LONG);
        assert_eq!((world.mtu(), world.lose), (DEVICE, 0));
        assert!(!world.sent.contains(&PATH_FLOOR), "{lost}");
    }
}

#[test]
fn late_foreign_and_repeated_answers_count_for_nothing() {
    let mut paths = Paths::default();
    paths.set([PEER], DEVICE, Duration::ZERO);
    let now = paths.next().unwrap();
    let probe = paths.tick(now)[0];
    assert!(!paths.answered(PEER + 1, probe.sequence, now));
    assert!(!paths.answered(PEER, probe.sequence + 1, now));
    assert!(!paths.answered(PEER, probe.sequence, now + TIMEOUT));
    assert_eq!(paths.next(), Some(now + TIMEOUT), "it is still open");
}

#[test]
fn peers_share_a_bounded_number_of_confirmations() {
    let nodes: BTreeSet<u32> = (0..1_000).collect();
    let mut paths = Paths::default();
    paths.set(nodes.clone(), DEVICE, Duration::ZERO);
    let (mut now, mut sent) = (Duration::ZERO, 0);
    let end = Duration::from_secs(100);
    while let Some(next) = paths.next().filter(|next| *next <= end) {
        now = now.max(next);
        for probe in paths.tick(now) {
            sent += 1;
            paths.answered(probe.node, probe.sequence, now);
        }
    }
    // One to each at once, and then a hundred a second.
    assert!((10_000..=11_100).contains(&sent), "{sent}");
    paths.set(nodes, DEVICE, now);
    assert_eq!(paths.narrow(), BTreeMap::new());
    paths.set([], DEVICE, now);
    assert_eq!(paths.next(), None);
    paths.set([PEER], PATH_FLOOR, now);
    assert_eq!(paths.next(), None, "there is nothing to find");
}
