//! What an agent may claim: its certificate is one cluster's, so what it says is about that cluster and nothing else.
//!
//! The Knowledge Base itself takes a report only for what is bound to the cluster. Here goes what a report says *by
//! value* and could reach further by: an address or a key that is another cluster's, or an address that is no
//! endpoint's of the mesh, which other clusters' nodes would send to. Such a claim is left out and named; the rest of
//! the report counts.

use std::{
    cell::LazyCell,
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
};

use control_core::{
    base::{KnowledgeBase, Mesh},
    name::Name,
    report::Report,
};

/// The most nodes of one cluster: each gets a number and an IPv4 block that others cannot have.
pub(crate) const NODES: usize = 1_000;
/// An epoch so far beyond the next one was never given: those that a lost log gave lie below (a restore leaves as
/// many out).
const EPOCHS: u64 = 1 << 24;

/// What is whose, by what names it: a node's name behind its cluster's.
#[derive(Default)]
struct Held<'a> {
    keys: BTreeMap<&'a str, (&'a Name, &'a str)>,
    numbers: BTreeMap<u32, (&'a Name, &'a str)>,
    blocks: BTreeMap<u32, (&'a Name, &'a str)>,
}

impl<'a> Held<'a> {
    /// What the nodes of those clusters hold that `is_meant`.
    fn by(base: &'a KnowledgeBase, is_meant: impl Fn(&Name) -> bool) -> Self {
        let mut held = Self::default();
        for (cluster, known) in base.clusters.iter().filter(|(name, _)| is_meant(name)) {
            for (name, node) in &known.nodes {
                let whose = (cluster, name.as_str());
                if !node.report.public_key.is_empty() {
                    held.keys.insert(&node.report.public_key, whose);
                }
                held.numbers.insert(node.number, whose);
                held.blocks
                    .extend(node.blocks4.keys().map(|block| (*block, whose)));
            }
        }
        held
    }
}

/// What a cluster may claim, of what there is.
struct Claims<'a, F: FnOnce() -> Held<'a>> {
    mesh: Option<&'a Mesh>,
    own: Held<'a>,
    /// Looked at only where something is not its own: the whole mesh is large, and who is honest pays nothing.
    others: LazyCell<Held<'a>, F>,
}

impl<'a, F: FnOnce() -> Held<'a>> Claims<'a, F> {
    fn key(&self, key: &str) -> Result<(), String> {
        if self.own.keys.contains_key(key) {
            return Ok(());
        }
        let theirs = self.others.keys.get(key);
        free("the public key", theirs)
    }

    fn addr6(&self, addr6: Ipv6Addr) -> Result<(), String> {
        match self.mesh.and_then(|mesh| mesh.node_of(addr6)) {
            None => Err(format!("{addr6}, which is no endpoint's of this mesh")),
            Some(number) if self.own.numbers.contains_key(&number) => Ok(()),
            Some(number) => free(&addr6.to_string(), self.others.numbers.get(&number)),
        }
    }

    fn addr4(&self, addr4: Ipv4Addr) -> Result<(), String> {
        match self.mesh.and_then(|mesh| mesh.block_of(addr4)) {
            None => Err(format!("{addr4}, which is no endpoint's of this mesh")),
            Some(block) if self.own.blocks.contains_key(&block) => Ok(()),
            Some(block) => free(&addr4.to_string(), self.others.blocks.get(&block)),
        }
    }
}

/// Nobody's may be claimed: what was given before a restore is not known any more.
fn free(what: &str, theirs: Option<&(&Name, &str)>) -> Result<(), String> {
    match theirs {
        None => Ok(()),
        Some((cluster, node)) => Err(format!("{what} of node {node} of cluster {cluster}")),
    }
}

/// Leaves out of `report` what is not `cluster`'s to say; what that was, for the log.
pub(crate) fn confine(base: &KnowledgeBase, cluster: &Name, report: &mut Report) -> Vec<String> {
    let claims = Claims {
        mesh: base.mesh.as_ref(),
        own: Held::by(base, |name| name == cluster),
        others: LazyCell::new(|| Held::by(base, |name| name != cluster)),
    };
    let mut left_out = Vec::new();
    for (name, node) in &mut report.nodes {
        if let Err(claim) = claims.key(&node.public_key) {
            left_out.push(format!("node {name} has {claim}"));
            node.public_key.clear();
            node.ready = false;
        }
        node.used4.retain(|addr4| {
            let claim = claims.addr4(*addr4).err();
            let is_left = claim.is_none();
            left_out.extend(claim.map(|claim| format!("node {name} uses {claim}")));
            is_left
        });
    }
    for instance in &mut report.instances {
        let Some(endpoint) = &mut instance.endpoint else {
            continue;
        };
        let service = &instance.id.service;
        if let Some(claim) = endpoint.addr4.and_then(|addr4| claims.addr4(addr4).err()) {
            left_out.push(format!("{service} is at {claim}"));
            endpoint.addr4 = None;
        }
        if let Err(claim) = claims.addr6(endpoint.addr6) {
            left_out.push(format!("{service} is at {claim}"));
            instance.endpoint = None;
        }
    }
    let last = base.next_epoch.saturating_add(EPOCHS);
    report.instances.retain(|instance| {
        let id = &instance.id;
        if id.epoch > last {
            left_out.push(format!("epoch {} of {}, never given", id.epoch, id.service));
        }
        id.epoch <= last
    });
    left_out
}

#[cfg(test)]
mod tests {
    use control_core::report::{EndpointFact, InstanceId, InstanceReport, Phase};

    use super::*;
    use crate::tables::tests::{base, edge, report};

    fn instance(addr6: &str, epoch: u64) -> InstanceReport {
        InstanceReport {
            id: InstanceId {
                service: "shop/one/web".to_owned(),
                instance: 0,
                epoch,
            },
            node: "m1".to_owned(),
            phase: Phase::Ready,
            endpoint: Some(EndpointFact {
                addr6: addr6.parse().unwrap(),
                addr4: None,
            }),
            reason: String::new(),
        }
    }

    #[test]
    fn a_cluster_claims_no_key_address_or_epoch_of_others() {
        let mut base = base();
        report(&mut base, &["n1"], 100);
        let theirs = base.clusters[&edge()].nodes["n1"].clone();
        let fog: Name = "fog".parse().unwrap();
        let of_edge = format!("fd00:1:2:0:0:{:x}:0:2", theirs.number);
        let honest = Report {
            nodes: BTreeMap::from([("m1".to_owned(), {
                let mut node = theirs.report.clone();
                node.public_key = "key of m1".to_owned();
                node
            })]),
            instances: vec![instance("fd00:1:2:0:0:77:0:2", 5)],
        };
        let mut said = honest.clone();
        assert_eq!(confine(&base, &fog, &mut said), Vec::<String>::new());
        assert_eq!(said, honest);

        let mut said = honest.clone();
        said.nodes.insert("m2".to_owned(), theirs.report.clone());
        said.instances.push(instance(&of_edge, 6));
        said.instances
            .push(instance("fd00:1:2:0:0:77:0:2", 1 << 40));
        let left_out = confine(&base, &fog, &mut said);
        assert_eq!(left_out.len(), 3, "{left_out:?}");
        assert!(left_out[0].contains("the public key of node n1 of cluster edge"));
        assert!(said.nodes["m2"].public_key.is_empty());
        assert_eq!(said.nodes["m1"], honest.nodes["m1"]);
        assert_eq!(said.instances.len(), 2);
        assert_eq!(said.instances[0], honest.instances[0]);
        assert_eq!(said.instances[1].endpoint, None);
        // The same is true where it is the cluster's own.
        let mut own = said.clone();
        own.nodes.insert("n1".to_owned(), theirs.report.clone());
        own.instances = vec![instance(&of_edge, 6)];
        let before = own.clone();
        assert_eq!(confine(&base, &edge(), &mut own), Vec::<String>::new());
        assert_eq!(own, before);
    }

    #[test]
    fn nobody_claims_an_address_that_is_no_endpoint_s_of_the_mesh() {
        let mut base = base();
        report(&mut base, &["n1"], 100);
        base.mesh.as_mut().unwrap().prefix4 = Some("10.16.0.0/12".parse().unwrap());
        let number = base.clusters[&edge()].nodes["n1"].number;
        let own = format!("fd00:1:2:0:0:{number:x}:0:2");
        for outside in [
            "::1",
            "2001:db8::1",
            "fe80::1",
            "fd12:3456:789a::7",
            "::ffff:192.168.1.7",
            // A VIP.
            "fd00:1:2:1000:0:5::",
        ] {
            let mut said = Report {
                nodes: BTreeMap::new(),
                instances: vec![instance(outside, 5)],
            };
            let left_out = confine(&base, &edge(), &mut said);
            assert_eq!(left_out.len(), 1, "{outside}: {left_out:?}");
            assert_eq!(said.instances[0].endpoint, None, "{outside}");
        }
        // A VIP and two from elsewhere; the first of a block that nobody has may be one from before a restore.
        for (addr4, is_taken) in [
            ("10.24.0.5", false),
            ("127.0.0.1", false),
            ("192.0.2.1", false),
            ("10.16.2.1", true),
        ] {
            let addr4: Ipv4Addr = addr4.parse().unwrap();
            let mut with = instance(&own, 5);
            with.endpoint.as_mut().unwrap().addr4 = Some(addr4);
            let mut node = base.clusters[&edge()].nodes["n1"].report.clone();
            node.used4 = vec![addr4];
            let mut said = Report {
                nodes: BTreeMap::from([("n1".to_owned(), node)]),
                instances: vec![with],
            };
            let left_out = confine(&base, &edge(), &mut said);
            assert_eq!(left_out.is_empty(), is_taken, "{addr4}: {left_out:?}");
            let endpoint = said.instances[0].endpoint.as_ref().unwrap();
            assert_eq!(endpoint.addr4, is_taken.then_some(addr4));
            assert_eq!(said.nodes["n1"].used4.is_empty(), !is_taken);
        }
    }
}
