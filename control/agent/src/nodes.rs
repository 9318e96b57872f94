//! What the agent knows of its nodes, and whether each one stands.
//!
//! ```text
//!  (start) --> Expected --hello--> Up --stream broken--> Down
//!                  |                ^ |                   |
//!                  '--grace over----+-+-------hello-------'
//! ```
//!
//! A node is ready while its stream is up, it spoke within [`SILENCE`], and its kernel matches some table. After
//! a restart of the agent the nodes that were ready are taken as such for [`EXPECTATION`], because nothing
//! happened to *them*. Pure: events come in with `now`.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use control_core::{
    goal::Requests,
    report::{EndpointFact, InstanceId},
};
use netmanager_api::{
    stream::{Endpoint, FromNode, Hello, InstanceRef, Measured},
    table::Revision,
};
use serde::{Deserialize, Serialize};

use crate::smooth::Smoother;

/// A node that is silent for so long is not ready; its NetManager speaks every second.
pub const SILENCE: Duration = Duration::from_secs(3);
/// How long a node that was ready before the agent's restart has for its hello.
pub const EXPECTATION: Duration = Duration::from_secs(5);

/// What a node said last, kept over restarts of the agent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Known {
    /// Its last hello.
    pub hello: Option<Hello>,
    /// Its attached interfaces.
    pub endpoints: Vec<Endpoint>,
    /// The table that its kernel matches.
    pub applied: Option<Revision>,
}

/// One node.
#[derive(Clone, Debug)]
pub struct Node {
    /// What it has for instances.
    pub capacity: Requests,
    /// What it said last.
    pub known: Known,
    /// What it measured last; round-trip times are in [`Node::rtt`].
    pub measured: Measured,
    /// Its round-trip times without the noise.
    pub rtt: Smoother,
    link: Link,
}

#[derive(Clone, Debug)]
enum Link {
    /// The agent has just started; the node was ready.
    Expected { until: Instant },
    /// Its stream is up.
    Up {
        stream: u64,
        since: Instant,
        heard: Instant,
    },
    /// It has no stream.
    Down { since: Instant },
}

/// Whether a node can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It can.
    Ready,
    /// It cannot, since then.
    Away(Instant),
}

impl Node {
    /// A node as configured, with what was known of it before the agent's restart.
    #[must_use]
    pub fn new(capacity: Requests, known: Known, now: Instant) -> Self {
        let link = if known.applied.is_some() {
            Link::Expected {
                until: now + EXPECTATION,
            }
        } else {
            Link::Down { since: now }
        };
        Self {
            capacity,
            known,
            measured: Measured::default(),
            rtt: Smoother::default(),
            link,
        }
    }

    /// Its stream `stream` is up; an older stream of it counts no more.
    pub fn connected(&mut self, stream: u64, hello: Hello, now: Instant) {
        // Its endpoints stay as they were until it lists them: a NetManager that starts again takes them over.
        self.known.applied = hello.applied;
        self.known.hello = Some(hello);
        self.link = Link::Up {
            stream,
            since: now,
            heard: now,
        };
    }

    /// It said something on `stream`; `false` when that stream counts no more.
    pub fn said(&mut self, stream: u64, message: FromNode, now: Instant) -> bool {
        match &mut self.link {
            Link::Up {
                stream: current,
                heard,
                ..
            } if *current == stream => *heard = now,
            _ => return false,
        }
        match message {
            FromNode::Hello(hello) => {
                self.known.applied = hello.applied;
                self.known.hello = Some(hello);
            }
            FromNode::Endpoints { endpoints } => self.known.endpoints = endpoints,
            FromNode::Applied { revision } => self.known.applied = Some(revision),
            FromNode::Measured(measured) => {
                self.rtt.measure(&measured.rtt_us);
                self.measured = measured;
            }
        }
        true
    }

    /// Its stream `stream` broke; `false` when that stream counts no more.
    pub fn broke(&mut self, stream: u64, now: Instant) -> bool {
        let current = matches!(self.link, Link::Up { stream: up, .. } if up == stream);
        if current {
            self.link = Link::Down { since: now };
        }
        current
    }

    /// Whether it can be used.
    #[must_use]
    pub fn standing(&self, now: Instant) -> Standing {
        match self.link {
            Link::Expected { until } if now < until => Standing::Ready,
            Link::Expected { until } => Standing::Away(until),
            Link::Up { heard, .. } if now >= heard + SILENCE => Standing::Away(heard + SILENCE),
            Link::Up { .. } if self.known.applied.is_some() => Standing::Ready,
            Link::Up { since, .. } => Standing::Away(since),
            Link::Down { since } => Standing::Away(since),
        }
    }

    /// When its standing changes if it stays silent.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        match self.link {
            Link::Expected { until } => Some(until),
            Link::Up { heard, .. } => Some(heard + SILENCE),
            Link::Down { .. } => None,
        }
    }

    /// The endpoint of an instance, if the node names one.
    #[must_use]
    pub fn endpoint(&self, id: &InstanceId) -> Option<EndpointFact> {
        self.known
            .endpoints
            .iter()
            .find(|endpoint| {
                let of = endpoint.instance.as_ref();
                of.is_some_and(|instance| instance_id(instance) == *id)
            })
            .map(|endpoint| EndpointFact {
                addr6: endpoint.addr6,
                addr4: endpoint.addr4,
            })
    }
}

/// The nodes by name.
pub type Nodes = BTreeMap<String, Node>;

/// An instance in the leads' words.
#[must_use]
pub fn instance_id(instance: &InstanceRef) -> InstanceId {
    InstanceId {
        service: instance.service.clone(),
        instance: instance.instance,
        epoch: instance.epoch,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(applied: Option<u64>) -> Hello {
        Hello {
            node: "n1".to_owned(),
            public_key: "key".to_owned(),
            tunnel_port: 51_900,
            underlay: vec!["10.0.0.1".parse().unwrap()],
            applied: applied.map(revision),
            version: "0".to_owned(),
        }
    }

    fn revision(index: u64) -> Revision {
        Revision {
            incarnation: 0,
            index,
        }
    }

    fn measured() -> FromNode {
        FromNode::Measured(Measured::default())
    }

    #[test]
    fn a_node_is_ready_once_its_kernel_matches_a_table() {
        let now = Instant::now();
        let mut node = Node::new(Requests::default(), Known::default(), now);
        assert_eq!(node.standing(now), Standing::Away(now));
        node.connected(1, hello(None), now);
        assert_eq!(node.standing(now), Standing::Away(now));
        let applied = FromNode::Applied {
            revision: revision(4),
        };
        assert!(node.said(1, applied, now));
        assert_eq!(node.standing(now), Standing::Ready);
    }

    #[test]
    fn a_node_is_away_when_its_stream_breaks_or_it_falls_silent() {
        let start = Instant::now();
        let mut node = Node::new(Requests::default(), Known::default(), start);
        node.connected(1, hello(Some(4)), start);
        let later = start + Duration::from_secs(2);
        assert!(node.said(1, measured(), later));
        assert_eq!(node.standing(start + SILENCE), Standing::Ready);
        assert_eq!(node.deadline(), Some(later + SILENCE));
        assert_eq!(
            node.standing(later + SILENCE),
            Standing::Away(later + SILENCE)
        );
        assert!(node.broke(1, later));
        assert_eq!(node.standing(later), Standing::Away(later));
    }

    #[test]
    fn an_older_stream_of_a_node_says_nothing_any_more() {
        let now = Instant::now();
        let mut node = Node::new(Requests::default(), Known::default(), now);
        node.connected(1, hello(Some(4)), now);
        node.connected(2, hello(Some(5)), now);
        assert!(!node.broke(1, now));
        assert!(!node.said(1, measured(), now));
        assert_eq!(node.standing(now), Standing::Ready);
        assert!(node.broke(2, now));
    }

    #[test]
    fn a_restarted_agent_expects_the_nodes_that_were_ready() {
        let now = Instant::now();
        let known = Known {
            hello: Some(hello(Some(4))),
            endpoints: Vec::new(),
            applied: Some(revision(4)),
        };
        let node = Node::new(Requests::default(), known, now);
        assert_eq!(node.standing(now), Standing::Ready);
        let over = now + EXPECTATION;
        assert_eq!(node.standing(over), Standing::Away(over));
    }

    #[test]
    fn endpoints_survive_a_reconnect_until_the_node_lists_them_anew() {
        let now = Instant::now();
        let id = InstanceRef {
            service: "a/b/c".to_owned(),
            instance: 0,
            epoch: 3,
        };
        let mut node = Node::new(Requests::default(), Known::default(), now);
        node.connected(1, hello(Some(4)), now);
        let endpoints = vec![Endpoint {
            number: 2,
            addr6: "fd00::2".parse().unwrap(),
            addr4: None,
            instance: Some(id.clone()),
        }];
        assert!(node.said(1, FromNode::Endpoints { endpoints }, now));
        assert!(node.broke(1, now));
        node.connected(2, hello(None), now);
        assert!(node.endpoint(&instance_id(&id)).is_some());
        let none = FromNode::Endpoints {
            endpoints: Vec::new(),
        };
        assert!(node.said(2, none, now));
        assert!(node.endpoint(&instance_id(&id)).is_none());
    }
}
