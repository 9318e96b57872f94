//! Who has which element of `VIP_COUNTS`.
//!
//! A VIP, named by its IPv6 address, keeps its element while it lives, and afterwards until another needs it:
//! flows that outlive their VIP go on counting where nobody looks. The one that rests for the longest is given
//! out first. An element that is given out may hold what a former owner counted ([`Counters::take_given`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use ebpf_common::layout::{self, Addr, PROTO_ICMP6, VIP_ITSELF_PORT, VipKey};

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Counters {
    capacity: u32,
    held: BTreeMap<Addr, Held>,
    /// Who rests, the longest first.
    idle: BTreeSet<(Duration, Addr)>,
    /// The lowest element that nobody ever had; element 0 is what all share that have none.
    next: u32,
    given: Vec<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    index: u32,
    idle_since: Option<Duration>,
}

impl Counters {
    /// Nobody has any of the `capacity` elements.
    pub(super) fn new(capacity: u32) -> Self {
        Self {
            capacity,
            held: BTreeMap::new(),
            idle: BTreeSet::new(),
            next: 1,
            given: Vec::new(),
        }
    }

    /// What the entries of `VIPS` say.
    pub(super) fn adopt(capacity: u32, vips: &BTreeMap<VipKey, layout::Vip>) -> Self {
        let mut counters = Self::new(capacity);
        for (key, vip) in vips {
            if is_vip6(key) && vip.counter != 0 {
                let held = Held {
                    index: vip.counter,
                    idle_since: None,
                };
                counters.held.insert(key.addr, held);
                counters.next = counters.next.max(vip.counter + 1);
            }
        }
        counters
    }

    /// The element of the VIP with this IPv6 address; 0 where all are in use.
    pub(super) fn hold(&mut self, vip6: Addr) -> u32 {
        if let Some(held) = self.held.get_mut(&vip6) {
            if let Some(since) = held.idle_since.take() {
                self.idle.remove(&(since, vip6));
            }
            return held.index;
        }
        let index = if self.next < self.capacity {
            self.next += 1;
            self.next - 1
        } else if let Some((_, former)) = self.idle.pop_first() {
            self.held.remove(&former).map_or(0, |held| held.index)
        } else {
            return 0;
        };
        let held = Held {
            index,
            idle_since: None,
        };
        self.held.insert(vip6, held);
        self.given.push(index);
        index
    }

    /// An entry of `VIPS` goes: where it was a VIP's own, the VIP's element rests from `now` on.
    pub(super) fn rest(&mut self, key: &VipKey, now: Duration) {
        if let Some(held) = self.held.get_mut(&key.addr).filter(|_| is_vip6(key))
            && held.idle_since.is_none()
        {
            held.idle_since = Some(now);
            self.idle.insert((now, key.addr));
        }
    }

    /// The elements that were given out since this was asked last: they are to start from zero.
    pub(super) fn take_given(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.given)
    }
}

/// Whether an entry of `VIPS` is a VIP's own in its IPv6 form, which every VIP has.
fn is_vip6(key: &VipKey) -> bool {
    key.proto == PROTO_ICMP6 && key.port_be == VIP_ITSELF_PORT
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn vip(number: u128) -> Addr {
        Addr::from_v6((0xfd << 120) | number)
    }

    fn key(number: u128, port_be: u16) -> VipKey {
        VipKey {
            addr: vip(number),
            port_be,
            proto: PROTO_ICMP6,
            pad: 0,
        }
    }

    #[test]
    fn an_element_is_given_to_another_only_when_all_are_taken_and_the_oldest_first() {
        let mut counters = Counters::new(4);
        assert_eq!([1, 2, 3].map(|n| counters.hold(vip(n))), [1, 2, 3]);
        assert_eq!(counters.take_given(), [1, 2, 3]);
        assert_eq!(counters.hold(vip(4)), 0, "all are in use");
        let second = Duration::from_secs(1);
        counters.rest(&key(2, 80), second);
        assert_eq!(counters.hold(vip(4)), 0, "only a port went");
        counters.rest(&key(2, VIP_ITSELF_PORT), second);
        counters.rest(&key(3, VIP_ITSELF_PORT), 2 * second);
        assert_eq!(counters.hold(vip(3)), 3, "it is back");
        assert_eq!(counters.take_given(), [0; 0], "and goes on from its count");
        assert_eq!(counters.hold(vip(4)), 2);
        assert_eq!(counters.take_given(), [2]);
        assert_eq!(counters.hold(vip(5)), 0);
    }

    #[test]
    fn a_restarted_daemon_goes_on_with_every_vips_element() {
        let entry = |counter| layout::Vip {
            counter,
            ..layout::Vip::default()
        };
        let vips = BTreeMap::from([
            (key(1, VIP_ITSELF_PORT), entry(7)),
            (key(2, VIP_ITSELF_PORT), entry(0)),
            (key(3, 80), entry(9)),
        ]);
        let mut counters = Counters::adopt(16, &vips);
        assert_eq!(counters.hold(vip(1)), 7);
        assert_eq!(counters.take_given(), [0; 0]);
        assert_eq!([vip(2), vip(3)].map(|vip| counters.hold(vip)), [8, 9]);
    }
}
