//! Which node of the cluster takes an instance.
//!
//! Of the ready nodes with room: the one with the fewest instances of the same service, then the one with the
//! most processing power left, then the smaller name. Pure. Placement among clusters is the leads'.

use std::{collections::BTreeMap, fmt::Write};

use control_core::{
    goal::{Bytes, Cpu, Requests},
    report::InstanceId,
};

/// The nodes' room, as far as it is booked.
#[derive(Clone, Debug, Default)]
pub struct Room {
    nodes: BTreeMap<String, Space>,
}

#[derive(Clone, Debug)]
struct Space {
    usable: Usable,
    capacity: Requests,
    /// Booked by what runs.
    booked: Requests,
    /// Booked by what is being stopped.
    leaving: Requests,
    /// How many instances of each service.
    services: BTreeMap<String, usize>,
}

/// Whether a node can be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usable {
    /// New instances may start there.
    Ready,
    /// Not now, but it is worth waiting for.
    Soon,
    /// No.
    Away,
}

/// Whether an instance stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Booking {
    /// It holds its room.
    Held,
    /// Its room is free soon.
    Leaving,
}

/// What came of looking for a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// This one.
    Node(String),
    /// None now, but one may be free or back soon; why.
    Wait(String),
    /// None; why, with the numbers.
    Full(String),
}

impl Room {
    /// Adds a node.
    pub fn add(&mut self, name: &str, usable: Usable, capacity: Requests) {
        self.nodes.insert(
            name.to_owned(),
            Space {
                usable,
                capacity,
                booked: Requests::default(),
                leaving: Requests::default(),
                services: BTreeMap::new(),
            },
        );
    }

    /// Books room on `node` for `id`.
    pub fn book(&mut self, node: &str, id: &InstanceId, requests: Requests, booking: Booking) {
        let Some(space) = self.nodes.get_mut(node) else {
            return; // A node that is no longer configured has no room to book.
        };
        match booking {
            Booking::Held => {
                space.booked = sum(space.booked, requests);
                *space.services.entry(id.service.clone()).or_default() += 1;
            }
            Booking::Leaving => space.leaving = sum(space.leaving, requests),
        }
    }

    /// Looks for a node for `id`, not `except`.
    #[must_use]
    pub fn find(&self, id: &InstanceId, requests: Requests, except: Option<&str>) -> Found {
        let candidates = || {
            self.nodes
                .iter()
                .filter(|(name, _)| Some(name.as_str()) != except)
        };
        let best = candidates()
            .filter(|(_, space)| {
                space.usable == Usable::Ready && space.fits(requests, Booking::Held)
            })
            .min_by_key(|(name, space)| {
                let same = space.services.get(&id.service).copied().unwrap_or(0);
                (same, std::cmp::Reverse(space.free().cpu), *name)
            });
        if let Some((name, _)) = best {
            return Found::Node(name.clone());
        }
        let later = candidates().find(|(_, space)| {
            space.usable != Usable::Away && space.fits(requests, Booking::Leaving)
        });
        if let Some((name, space)) = later {
            return Found::Wait(match space.usable {
                Usable::Ready => format!("waits for an instance to leave node {name}"),
                Usable::Soon | Usable::Away => format!("waits for node {name}"),
            });
        }
        Found::Full(self.refusal(requests))
    }

    fn refusal(&self, wanted: Requests) -> String {
        let mut text = format!("it asks for {} and no node has that:", amounts(wanted));
        for (name, space) in &self.nodes {
            let _ = if space.usable == Usable::Ready {
                write!(
                    text,
                    " {name} has {} of {} left;",
                    amounts(space.free()),
                    amounts(space.capacity)
                )
            } else {
                write!(text, " {name} is not ready;")
            };
        }
        text.pop();
        text
    }
}

impl Space {
    /// Whether `wanted` has room when what is `Leaving` counts as gone, or (`Held`) still counts.
    fn fits(&self, wanted: Requests, leaving: Booking) -> bool {
        let mut booked = sum(self.booked, wanted);
        if leaving == Booking::Held {
            booked = sum(booked, self.leaving);
        }
        booked.cpu <= self.capacity.cpu
            && booked.memory <= self.capacity.memory
            && booked.gpus <= self.capacity.gpus
    }

    fn free(&self) -> Requests {
        let booked = sum(self.booked, self.leaving);
        let (cpu, memory) = (self.capacity.cpu, self.capacity.memory);
        Requests {
            cpu: Cpu::milli(cpu.as_milli().saturating_sub(booked.cpu.as_milli())),
            memory: Bytes::new(memory.get().saturating_sub(booked.memory.get())),
            gpus: self.capacity.gpus.saturating_sub(booked.gpus),
        }
    }
}

fn sum(a: Requests, b: Requests) -> Requests {
    Requests {
        cpu: Cpu::milli(a.cpu.as_milli().saturating_add(b.cpu.as_milli())),
        memory: Bytes::new(a.memory.get().saturating_add(b.memory.get())),
        gpus: a.gpus.saturating_add(b.gpus),
    }
}

fn amounts(requests: Requests) -> String {
    let mut text = format!("{} cpu and {} memory", requests.cpu, requests.memory);
    if requests.gpus > 0 {
        let _ = write!(text, " and {} gpus", requests.gpus);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needs(cpu: u64) -> Requests {
        Requests {
            cpu: Cpu::milli(cpu),
            memory: Bytes::new(1 << 20),
            gpus: 0,
        }
    }

    fn id(service: &str) -> InstanceId {
        InstanceId {
            service: service.to_owned(),
            instance: 0,
            epoch: 1,
        }
    }

    fn room() -> Room {
        let capacity = Requests {
            cpu: Cpu::milli(1000),
            memory: Bytes::new(1 << 30),
            gpus: 0,
        };
        let mut room = Room::default();
        room.add("n1", Usable::Ready, capacity);
        room.add("n2", Usable::Ready, capacity);
        room.add("n3", Usable::Away, capacity);
        room
    }

    #[test]
    fn instances_of_a_service_are_spread_before_room_counts() {
        let mut room = room();
        assert_eq!(
            room.find(&id("s"), needs(100), None),
            Found::Node("n1".into())
        );
        room.book("n1", &id("s"), needs(100), Booking::Held);
        room.book("n2", &id("t"), needs(500), Booking::Held);
        assert_eq!(
            room.find(&id("s"), needs(100), None),
            Found::Node("n2".into())
        );
        assert_eq!(
            room.find(&id("u"), needs(100), None),
            Found::Node("n1".into())
        );
        assert_eq!(
            room.find(&id("u"), needs(100), Some("n1")),
            Found::Node("n2".into())
        );
    }

    #[test]
    fn a_full_cluster_says_its_numbers_and_one_that_empties_is_waited_for() {
        let mut room = room();
        room.book("n1", &id("s"), needs(600), Booking::Held);
        room.book("n2", &id("t"), needs(300), Booking::Held);
        room.book("n2", &id("u"), needs(300), Booking::Leaving);
        assert_eq!(
            room.find(&id("v"), needs(500), None),
            Found::Wait("waits for an instance to leave node n2".into())
        );
        assert_eq!(
            room.find(&id("v"), needs(800), None),
            Found::Full(
                "it asks for 800m cpu and 1Mi memory and no node has that: n1 has 400m cpu and 1023Mi memory of \
                 1000m cpu and 1Gi memory left; n2 has 400m cpu and 1022Mi memory of 1000m cpu and 1Gi memory \
                 left; n3 is not ready"
                    .into()
            )
        );
    }

    #[test]
    fn a_node_that_has_just_gone_is_waited_for() {
        let mut room = Room::default();
        room.add("n1", Usable::Soon, needs(1000));
        assert_eq!(
            room.find(&id("s"), needs(1), None),
            Found::Wait("waits for node n1".into())
        );
        assert!(matches!(
            room.find(&id("s"), needs(1001), None),
            Found::Full(_)
        ));
    }
}
