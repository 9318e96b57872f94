//! A node of a simulated cluster: attaches, applies its tables, says so, and measures.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use control_core::report::InstanceId;
use ebpf_common::addr::{Mesh6, NODE_ENDPOINT, Name6};
use netmanager_api::{
    stream::{DrainingFlows, Endpoint, FromNode, Hello, InstanceRef, Measured},
    table::{BackendState, Revision, Table},
};
use tokio::sync::{mpsc, watch};
use weft_agent::{event::Event, nodes::instance_id};

use super::Serving;
use crate::random::Random;

/// How often a node says what it measured, milliseconds.
const MEASURES: u64 = 1_000;
/// How long it takes at the most until the kernel matches a table, milliseconds.
const APPLIES: u64 = 150;
/// How long a draining backend has flows from a node, at the most, milliseconds.
const FLOWS: u64 = 4_000;

/// What a node finds around it.
pub(super) struct Around<'a> {
    pub(super) now: u64,
    /// The number of the last stream of any node.
    pub(super) streams: &'a mut u64,
    pub(super) random: &'a mut Random,
    /// Where the agent listens, if there is one.
    pub(super) events: Option<&'a mpsc::Sender<Event>>,
    pub(super) serving: &'a Serving,
}

impl Around<'_> {
    fn send(&self, event: Event) {
        if let Some(events) = self.events {
            // A full queue loses it, as a broken stream would: the node says it again.
            let _ = events.try_send(event);
        }
    }

    fn say(&self, node: &str, stream: u64, message: FromNode) {
        let node = node.to_owned();
        self.send(Event::Said {
            node,
            stream,
            message,
        });
    }
}

/// A node, with its NetManager.
#[derive(Debug, Default)]
pub(super) struct Node {
    /// Until when it is away from its agent.
    pub(super) away_until: u64,
    /// Its present stream, and where its tables come from.
    stream: Option<(u64, watch::Receiver<Option<Arc<Table>>>)>,
    pub(super) table: Option<Arc<Table>>,
    /// What comes next, and when it is applied.
    next: Option<(u64, Arc<Table>)>,
    endpoints: BTreeMap<InstanceId, u32>,
    last_endpoint: u32,
    told_endpoints: Option<BTreeMap<InstanceId, u32>>,
    measured_at: u64,
    /// Until when draining backends have flows.
    flows: BTreeMap<InstanceRef, u64>,
}

impl Node {
    /// Gives an instance an interface; `false` while there are no addresses to give.
    pub(super) fn attach(&mut self, id: &InstanceId) -> bool {
        if self.table.is_none() {
            return false;
        }
        self.last_endpoint = self.last_endpoint.max(NODE_ENDPOINT) + 1;
        self.endpoints.insert(id.clone(), self.last_endpoint);
        true
    }

    pub(super) fn detach(&mut self, id: &InstanceId) {
        self.endpoints.remove(id);
    }

    /// Its agent is no more.
    pub(super) fn part(&mut self) {
        self.stream = None;
    }

    /// Its power goes; what the kernel shall match is on its disk.
    pub(super) fn cut_power(&mut self) {
        self.part();
        self.endpoints.clear();
        self.next = None;
    }

    fn applied(&self) -> Option<Revision> {
        self.table.as_ref().map(|table| table.revision)
    }

    /// Does what is to be done now.
    pub(super) fn step(&mut self, name: &str, around: &mut Around<'_>) {
        let now = around.now;
        if let Some((_, table)) = self.next.take_if(|(at, _)| *at <= now) {
            let revision = table.revision;
            self.table = Some(table);
            if let Some((stream, _)) = &self.stream {
                around.say(name, *stream, FromNode::Applied { revision });
            }
        }
        let is_here = around.events.is_some() && now >= self.away_until;
        match &mut self.stream {
            None if is_here => self.connect(name, around),
            Some((stream, _)) if !is_here => {
                let (node, stream) = (name.to_owned(), *stream);
                around.send(Event::Broke { node, stream });
                self.stream = None;
            }
            Some((_, tables)) if tables.has_changed().unwrap_or(false) => {
                if let Some(table) = tables.borrow_and_update().clone() {
                    self.next = Some((now + around.random.within(1, APPLIES), table));
                }
            }
            _ => {}
        }
        self.speak(name, around);
    }

    fn connect(&mut self, name: &str, around: &mut Around<'_>) {
        *around.streams += 1;
        let stream = *around.streams;
        let (tables, table) = watch::channel(None);
        let (conditions, _) = watch::channel(Default::default());
        let hello = Hello {
            node: name.to_owned(),
            public_key: format!("key of {name}"),
            tunnel_port: 51_900,
            underlay: vec![[192, 0, 2, 1].into()],
            applied: self.applied(),
            version: "0".to_owned(),
        };
        around.send(Event::Connected {
            node: name.to_owned(),
            stream,
            hello,
            tables,
            conditions,
        });
        self.stream = Some((stream, table));
        self.told_endpoints = None;
    }

    /// Says what is new, and every second what it measured.
    fn speak(&mut self, name: &str, around: &mut Around<'_>) {
        let (Some((stream, _)), Some(table)) = (&self.stream, self.table.clone()) else {
            return;
        };
        let stream = *stream;
        if self.told_endpoints.as_ref() != Some(&self.endpoints) {
            let endpoints = self.endpoints(&table);
            self.told_endpoints = Some(self.endpoints.clone());
            around.say(name, stream, FromNode::Endpoints { endpoints });
        }
        if around.now >= self.measured_at + MEASURES {
            self.measured_at = around.now;
            let measured = self.measure(&table, around);
            around.say(name, stream, FromNode::Measured(measured));
        }
    }

    fn endpoints(&self, table: &Table) -> Vec<Endpoint> {
        let space = Mesh6::new(table.mesh.prefix6.network().to_bits());
        let space = space.expect("the mesh has a prefix");
        let endpoints = self.endpoints.iter().map(|(id, number)| {
            let name = Name6::Endpoint {
                node: table.node.number,
                endpoint: *number,
            };
            let instance = InstanceRef {
                service: id.service.clone(),
                instance: id.instance,
                epoch: id.epoch,
            };
            Endpoint {
                number: *number,
                addr6: space.encode(name).into(),
                addr4: None,
                instance: Some(instance),
            }
        });
        endpoints.collect()
    }

    fn measure(&mut self, table: &Table, around: &mut Around<'_>) -> Measured {
        let mut measured = Measured::default();
        let mut draining = BTreeSet::new();
        for service in &table.services {
            for backend in &service.backends {
                let id = InstanceRef {
                    service: service.name.clone(),
                    instance: backend.instance,
                    epoch: backend.epoch,
                };
                match backend.state {
                    BackendState::Probing => {
                        let answers = around.serving.contains(&instance_id(&id));
                        measured.reached.extend(answers.then_some(id));
                    }
                    BackendState::Draining => _ = draining.insert(id),
                    BackendState::Ready => {}
                }
            }
        }
        self.flows.retain(|id, _| draining.contains(id));
        for id in draining {
            let until = self
                .flows
                .entry(id.clone())
                .or_insert_with(|| around.now + around.random.within(0, FLOWS));
            measured.draining_flows.push(DrainingFlows {
                instance: id,
                flows: u64::from(around.now < *until),
            });
        }
        measured
    }
}
