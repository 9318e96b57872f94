//! How loaded the instances are: the processor time that they use, against what they asked for.
//!
//! The driver says how much time each instance has used so far; two looks make a rate. The rate is smoothed over
//! some seconds and told in steps of [`STEP`] percent, and another step only when the value is past the middle of
//! the way to it by half a step: noise is no message. An instance that asked for nothing has no load. Pure: one
//! call per look.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use control_core::report::InstanceId;

/// Loads are told in steps of this many percent.
pub const STEP: u16 = 5;
/// A load above this is told as this: ten times what was asked for.
const MOST: f64 = 1_000.0;
/// Weight of a new rate is one in this many; with a look every two seconds a change is mostly told after six.
const SMOOTHING: f64 = 3.0;
/// Two looks that are closer than this make no rate.
const CLOSEST: Duration = Duration::from_millis(500);

/// What one instance has used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Processor time since it was first started.
    pub time: Duration,
    /// What it asked for, thousandths of a vCPU.
    pub cpu_milli: u64,
}

/// The loads of all instances.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Loads {
    instances: BTreeMap<InstanceId, Load>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Load {
    time: Duration,
    at: Instant,
    smoothed: Option<f64>,
    told: Option<u16>,
}

impl Loads {
    /// Takes one look at every instance that runs; who is not named is forgotten.
    pub fn measure(&mut self, used: &BTreeMap<InstanceId, Used>, now: Instant) {
        self.instances.retain(|id, _| used.contains_key(id));
        for (id, used) in used {
            let first = Load {
                time: used.time,
                at: now,
                smoothed: None,
                told: None,
            };
            let load = self.instances.entry(id.clone()).or_insert(first);
            let apart = now.saturating_duration_since(load.at);
            if used.time < load.time || used.cpu_milli == 0 {
                *load = first; // Another life, or nothing to compare with.
            } else if apart >= CLOSEST {
                load.take(used, apart);
                (load.time, load.at) = (used.time, now);
            }
        }
    }

    /// What each instance uses of what it asked for, percent.
    pub fn told(&self) -> impl Iterator<Item = (&InstanceId, u16)> {
        self.instances
            .iter()
            .filter_map(|(id, load)| Some((id, load.told?)))
    }
}

impl Load {
    fn take(&mut self, used: &Used, apart: Duration) {
        let share = (used.time - self.time).as_secs_f64() / apart.as_secs_f64();
        let percent = (share * 100_000.0 / used.cpu_milli as f64).min(MOST);
        let smoothed = match self.smoothed {
            Some(old) => old + (percent - old) / SMOOTHING,
            None => percent,
        };
        self.smoothed = Some(smoothed);
        let stays = |told: &u16| (smoothed - f64::from(*told)).abs() <= f64::from(STEP);
        let nearest = (smoothed / f64::from(STEP)).round() as u16 * STEP;
        self.told = Some(self.told.filter(stays).unwrap_or(nearest));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(instance: u32) -> InstanceId {
        InstanceId {
            service: "a/b/c".to_owned(),
            instance,
            epoch: 1,
        }
    }

    fn used(millis: u64, cpu_milli: u64) -> BTreeMap<InstanceId, Used> {
        let time = Duration::from_millis(millis);
        BTreeMap::from([(id(0), Used { time, cpu_milli })])
    }

    fn told(loads: &Loads) -> Vec<u16> {
        loads.told().map(|(_, percent)| percent).collect()
    }

    fn at(start: Instant, looks: u64) -> Instant {
        start + Duration::from_secs(2 * looks)
    }

    #[test]
    fn time_used_against_time_asked_for_is_the_load() {
        let start = Instant::now();
        // (used per look of 2 s in ms, asked for in thousandths, percent)
        let cases = [
            (1_000, 1_000, 50),
            (500, 250, 100),
            (1_000, 250, 200),
            (0, 250, 0),
            (1_000, 1, 1_000),
        ];
        for (each, cpu_milli, percent) in cases {
            let mut loads = Loads::default();
            loads.measure(&used(0, cpu_milli), start);
            assert!(told(&loads).is_empty(), "one look is no rate");
            loads.measure(&used(each, cpu_milli), at(start, 1));
            assert_eq!(told(&loads), [percent], "{each} of {cpu_milli}");
        }
    }

    #[test]
    fn an_instance_that_asked_for_nothing_started_again_or_is_gone_has_no_load() {
        let start = Instant::now();
        let mut loads = Loads::default();
        loads.measure(&used(0, 0), start);
        loads.measure(&used(1_000, 0), at(start, 1));
        assert!(told(&loads).is_empty());
        loads.measure(&used(2_000, 500), at(start, 2));
        assert_eq!(told(&loads), [100]);
        loads.measure(&used(10, 500), at(start, 3));
        assert!(told(&loads).is_empty(), "its group is another");
        loads.measure(&used(510, 500), at(start, 4));
        assert_eq!(told(&loads), [50]);
        loads.measure(&BTreeMap::new(), at(start, 5));
        assert!(told(&loads).is_empty());
    }

    #[test]
    fn a_new_load_is_told_within_a_few_looks() {
        let start = Instant::now();
        let mut loads = Loads::default();
        let mut time = 0;
        for look in 0..10 {
            loads.measure(&used(time, 1_000), at(start, look));
            time += 200;
        }
        assert_eq!(told(&loads), [10]);
        for look in 10..16 {
            time += 1_800;
            loads.measure(&used(time, 1_000), at(start, look));
        }
        assert!(told(&loads)[0] >= 80, "{:?}", told(&loads));
    }

    proptest! {
        #[test]
        fn noise_below_half_a_step_is_never_told(
            base in 0u64..3_000,
            noise in prop::collection::vec(-24i64..=24, 1..80),
        ) {
            let start = Instant::now();
            let mut loads = Loads::default();
            let mut time = 0;
            loads.measure(&used(time, 1_000), start);
            time += base;
            loads.measure(&used(time, 1_000), at(start, 1));
            let first = told(&loads);
            for (noise, look) in noise.into_iter().zip(2..) {
                // 2 s at one vCPU: 20 ms are one percent, and a quarter of a step is 25 ms.
                time += u64::try_from((base as i64 + noise).max(0)).unwrap();
                loads.measure(&used(time, 1_000), at(start, look));
                prop_assert_eq!(&told(&loads), &first);
            }
        }
    }
}
