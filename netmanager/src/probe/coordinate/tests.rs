use super::*;

/// A mesh whose true round-trip times are known.
struct World {
    places: Vec<Place>,
    /// Whom each node asks.
    neighbours: Vec<[usize; NEIGHBOURS]>,
    rtt_us: Vec<Vec<u32>>,
    random: u64,
}

/// How many peers a node asks, however many there are.
const NEIGHBOURS: usize = 16;

impl World {
    /// Nodes in some cities, with a way of their own to the network.
    fn new(nodes: usize, seed: u64) -> Self {
        let mut world = Self {
            places: (0..nodes).map(|at| Place::new(seed ^ at as u64)).collect(),
            neighbours: vec![[0; NEIGHBOURS]; nodes],
            rtt_us: vec![vec![0; nodes]; nodes],
            random: seed,
        };
        let cities: Vec<[f64; 2]> = (0..12)
            .map(|_| [world.up_to(60_000), world.up_to(40_000)].map(f64::from))
            .collect();
        let homes: Vec<([f64; 2], f64)> = (0..nodes)
            .map(|_| {
                let city = cities[world.up_to(12) as usize];
                let near = [world.up_to(900), world.up_to(900)].map(f64::from);
                let at = [city[0] + near[0], city[1] + near[1]];
                (at, f64::from(100 + world.up_to(1_500)))
            })
            .collect();
        for (a, (at_a, up_a)) in homes.iter().enumerate() {
            for (b, (at_b, up_b)) in homes.iter().enumerate() {
                let way = (at_a[0] - at_b[0]).hypot(at_a[1] - at_b[1]);
                world.rtt_us[a][b] = (way + up_a + up_b) as u32;
            }
        }
        for node in 0..nodes {
            for at in 0..NEIGHBOURS {
                let apart = 1 + world.up_to(nodes as u32 - 1) as usize;
                world.neighbours[node][at] = (node + apart) % nodes;
            }
        }
        world
    }

    fn up_to(&mut self, most: u32) -> u32 {
        self.random = mix(self.random.wrapping_add(0x9e37_79b9_7f4a_7c15));
        (self.random % u64::from(most)) as u32
    }

    /// Makes some pairs far longer than any way by others: no map shows that.
    fn break_triangles(&mut self, percent: u32) {
        for a in 0..self.places.len() {
            for b in 0..a {
                if self.up_to(100) < percent {
                    let longer = self.rtt_us[a][b] * (15 + self.up_to(15)) / 10;
                    self.rtt_us[a][b] = longer;
                    self.rtt_us[b][a] = longer;
                }
            }
        }
    }

    /// Each node asks its neighbours in turn; answers jitter by up to 5 %. Returns how many told another place.
    fn run(&mut self, rounds: usize) -> usize {
        let nodes = self.places.len();
        let mut told = 0;
        for round in 0..rounds {
            for node in 0..nodes {
                let peer = self.neighbours[node][round % NEIGHBOURS];
                let jitter = 950 + self.up_to(100);
                let rtt = (u64::from(self.rtt_us[node][peer]) * u64::from(jitter) / 1_000) as u32;
                let coordinate = self.places[peer].coordinate();
                told += usize::from(self.places[node].learn(&coordinate, rtt));
            }
        }
        told
    }

    /// Relative errors of all estimates, sorted; those of `node` only where one is named.
    fn errors(&self, of: Option<usize>) -> Vec<f64> {
        let nodes = self.places.len();
        let pairs = (0..nodes).flat_map(|a| (0..nodes).map(move |b| (a, b)));
        let mut errors: Vec<f64> = pairs
            .filter(|(a, b)| a != b && of.is_none_or(|of| *a == of))
            .map(|(a, b)| {
                let (there, here) = (self.places[a].coordinate(), self.places[b].coordinate());
                let real = f64::from(self.rtt_us[a][b]);
                (Point::of(&there).distance(&Point::of(&here)) - real).abs() / real
            })
            .collect();
        errors.sort_by(f64::total_cmp);
        errors
    }
}

fn at(errors: &[f64], percent: usize) -> f64 {
    errors[(errors.len() - 1) * percent / 100]
}

#[test]
fn distances_to_nodes_that_were_never_asked_are_known_well() {
    for seed in [1, 2, 3] {
        let mut world = World::new(120, seed);
        world.run(40 * NEIGHBOURS);
        let errors = world.errors(None);
        assert!(at(&errors, 50) < 0.10, "median {}", at(&errors, 50));
        assert!(at(&errors, 90) < 0.35, "90 % {}", at(&errors, 90));
    }
}

#[test]
fn ways_that_no_map_shows_spoil_the_others_little_and_are_told_as_error() {
    let mut straight = World::new(120, 5);
    straight.run(40 * NEIGHBOURS);
    let mut bent = World::new(120, 5);
    bent.break_triangles(8);
    bent.run(40 * NEIGHBOURS);
    assert!(
        at(&bent.errors(None), 50) < 0.20,
        "{}",
        at(&bent.errors(None), 50)
    );
    let mean = |world: &World| {
        let errors = world.places.iter().map(|place| place.error);
        errors.sum::<f64>() / world.places.len() as f64
    };
    assert!(mean(&bent) > mean(&straight), "the error is told");
}

#[test]
fn nodes_that_come_find_their_place_and_move_the_others_little() {
    let mut world = World::new(120, 8);
    world.run(40 * NEIGHBOURS);
    let before = at(&world.errors(None), 50);
    for node in (0..120).step_by(5) {
        world.places[node] = Place::new(1_000 + node as u64);
    }
    world.run(2 * NEIGHBOURS);
    for node in (0..120).step_by(5) {
        let errors = world.errors(Some(node));
        assert!(at(&errors, 50) < 0.25, "{node}: {}", at(&errors, 50));
    }
    let after = at(&world.errors(None), 50);
    assert!(after < before + 0.06, "{before} {after}");
}

#[test]
fn a_place_is_told_rarely_once_it_is_found() {
    let mut world = World::new(60, 13);
    assert!(world.places.iter().all(|place| place.told().is_none()));
    world.run(60 * NEIGHBOURS);
    assert!(world.places.iter().all(|place| place.told().is_some()));
    // An hour at one answer a second.
    let told = world.run(3_600);
    let per_node = told as f64 / 60.0;
    assert!(per_node < 60.0, "{per_node} an hour and node");
}

#[test]
fn the_same_answers_give_the_same_place() {
    let run = || {
        let mut world = World::new(30, 21);
        world.run(100);
        world.places
    };
    assert_eq!(run(), run());
}

#[test]
fn a_vague_place_estimates_nothing_and_a_wild_one_is_survived() {
    let here = Coordinate {
        at_us: [0; 3],
        height_us: 100,
        error_permille: 100,
    };
    let vague = Coordinate {
        error_permille: 501,
        ..here
    };
    assert_eq!(estimate_us(&here, &here), Some(200));
    assert_eq!(estimate_us(&here, &vague), None);
    let wild = Coordinate {
        at_us: [i32::MAX, i32::MIN, 0],
        height_us: u32::MAX,
        error_permille: 0,
    };
    let mut place = Place::new(1);
    for _ in 0..100 {
        place.learn(&wild, 1);
        place.learn(&here, 0);
    }
    assert!(
        place
            .now
            .at
            .iter()
            .all(|axis| axis.is_finite() && axis.abs() <= FARTHEST_US)
    );
    assert!(place.now.height.is_finite() && place.error.is_finite());
}
