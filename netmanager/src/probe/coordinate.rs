//! Where this node is in the network: coordinates whose distances are round-trip times, so that the distance to
//! a node that was never asked is known.
//!
//! Vivaldi (Dabek, Cox, Kaashoek, Morris: SIGCOMM 2004, section 3) in three dimensions with a height vector:
//! every answer pulls this node toward or pushes it from the one that answered like a spring, more strongly the
//! less certain this node is and the more certain the other. An error below [`MARGIN_US`] counts as none (Ledlie,
//! Gardner, Seltzer: NSDI 2007, section 4), or nodes of one rack would never become certain. A distance that
//! no map can show (the triangle inequality does not hold in the Internet) stays an error, and is told as such.
//!
//! Pure: the direction in which two nodes at one place part comes from the seed.

use netmanager_api::conditions::Coordinate;

use super::rtt::mix;

/// How fast the place follows one answer (Dabek: c_c).
const FOLLOW: f64 = 0.25;
/// How fast the certainty follows one answer (Dabek: c_e).
const TRUST: f64 = 0.25;
/// A difference below this is the scheduler's, microseconds.
const MARGIN_US: f64 = 300.0;
/// The least height, microseconds: nobody is in the middle of the network.
const LOWEST_US: f64 = 50.0;
/// No place is farther out than this, microseconds: an answer in time takes less than a second.
const FARTHEST_US: f64 = 4_000_000.0;
/// So many answers make a place worth telling.
const ENOUGH: u32 = 8;
/// A place is told anew when it moved by this, microseconds ...
const MOVED_US: f64 = 1_000.0;
/// ... and by one in this many of the usual distance to those that answer, ...
const MOVED_RATIO: f64 = 10.0;
/// ... or when its error changed by this, thousandths.
const SURER_PERMILLE: u16 = 100;
/// An estimate by a place whose error is larger says nothing, thousandths.
pub const TOO_VAGUE_PERMILLE: u16 = 500;

/// This node's place.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    now: Point,
    /// Usual error of an estimate, 0 to 1.
    error: f64,
    answers: u32,
    usual_us: f64,
    told: Option<Coordinate>,
    random: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Point {
    at: [f64; 3],
    height: f64,
}

impl Point {
    fn of(coordinate: &Coordinate) -> Self {
        Self {
            at: coordinate.at_us.map(f64::from),
            height: f64::from(coordinate.height_us),
        }
    }

    fn distance(&self, other: &Self) -> f64 {
        length(self.from(other)) + self.height + other.height
    }

    fn from(&self, other: &Self) -> [f64; 3] {
        std::array::from_fn(|axis| self.at[axis] - other.at[axis])
    }
}

fn length(vector: [f64; 3]) -> f64 {
    vector.iter().map(|part| part * part).sum::<f64>().sqrt()
}

impl Place {
    /// Nowhere in particular.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            now: Point {
                at: [0.0; 3],
                height: LOWEST_US,
            },
            error: 1.0,
            answers: 0,
            usual_us: 0.0,
            told: None,
            random: seed,
        }
    }

    /// Learns from an answer of a node at `other` after `rtt_us`. Returns whether what is told changed.
    pub fn learn(&mut self, other: &Coordinate, rtt_us: u32) -> bool {
        let rtt = f64::from(rtt_us.max(1));
        let there = Point::of(other);
        let their_error = f64::from(other.error_permille.clamp(1, 1_000)) / 1_000.0;
        let weight = self.error / (self.error + their_error);
        let distance = self.now.distance(&there);
        let off = ((distance - rtt).abs() - MARGIN_US).max(0.0) / rtt;
        let trust = TRUST * weight;
        self.error = (off.min(1.0) * trust + self.error * (1.0 - trust)).clamp(0.001, 1.0);
        let force = FOLLOW * weight * (rtt - distance);
        let apart = self.now.from(&there);
        let direction = match length(apart) {
            length if length >= 1.0 => apart.map(|part| part / distance),
            _ => self.anywhere(),
        };
        for (axis, part) in self.now.at.iter_mut().zip(direction) {
            *axis = (*axis + force * part).clamp(-FARTHEST_US, FARTHEST_US);
        }
        let rise = force * (self.now.height + there.height) / distance.max(1.0);
        self.now.height = (self.now.height + rise).clamp(LOWEST_US, FARTHEST_US);
        self.answers = self.answers.saturating_add(1);
        let share = 1.0 / f64::from(self.answers.min(ENOUGH));
        self.usual_us += (rtt - self.usual_us) * share;
        self.tell()
    }

    /// Where it is, for others: whole microseconds, as it is now.
    #[must_use]
    pub fn coordinate(&self) -> Coordinate {
        Coordinate {
            at_us: self.now.at.map(|axis| axis.round() as i32),
            height_us: self.now.height.round() as u32,
            error_permille: (self.error * 1_000.0).round() as u16,
        }
    }

    /// Where it is, without the small moves; `None` before enough answers.
    #[must_use]
    pub fn told(&self) -> Option<Coordinate> {
        self.told
    }

    fn tell(&mut self) -> bool {
        let now = self.coordinate();
        let is_news = match &self.told {
            None => self.answers >= ENOUGH,
            Some(told) => {
                let from = Point::of(told);
                let moved = length(self.now.from(&from)) + (self.now.height - from.height).abs();
                moved > MOVED_US.max(self.usual_us / MOVED_RATIO)
                    || told.error_permille.abs_diff(now.error_permille) > SURER_PERMILLE
            }
        };
        if is_news {
            self.told = Some(now);
        }
        is_news
    }

    /// A direction for two nodes at one place.
    fn anywhere(&mut self) -> [f64; 3] {
        let vector = std::array::from_fn(|_| {
            self.random = mix(self.random.wrapping_add(0x9e37_79b9_7f4a_7c15));
            (self.random >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        });
        let length = length(vector).max(1e-9);
        vector.map(|part| part / length)
    }
}

/// The round-trip time between two nodes, microseconds; `None` where one of them does not know where it is.
#[must_use]
pub fn estimate_us(a: &Coordinate, b: &Coordinate) -> Option<u32> {
    let is_sure = |it: &Coordinate| it.error_permille <= TOO_VAGUE_PERMILLE;
    (is_sure(a) && is_sure(b)).then(|| Point::of(a).distance(&Point::of(b)).round() as u32)
}

#[cfg(test)]
mod tests;
