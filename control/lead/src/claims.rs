//! What an agent may claim: its certificate is one cluster's, so what it says is about that cluster and nothing else.
//!
//! The Knowledge Base itself takes a report only for what is bound to the cluster. Here goes what a report says *by
//! value* and could reach further by: an address or a key that is another cluster's. Such a claim is left out and
//! named; the rest of the report counts.

use std::{collections::BTreeMap, net::Ipv6Addr};

use control_core::{base::KnowledgeBase, name::Name, report::Report};

/// The most nodes of one cluster: each gets a number and an IPv4 block that others cannot have.
pub(crate) const NODES: usize = 1_000;
/// An epoch so far beyond the next one was never given: those that a lost log gave lie below (a restore leaves as
/// many out).
const EPOCHS: u64 = 1 << 24;

/// What others hold, by what names it.
struct Others<'a> {
    keys: BTreeMap<&'a str, String>,
    numbers: BTreeMap<u32, String>,
    blocks: BTreeMap<u32, String>,
}

impl<'a> Others<'a> {
    fn of(base: &'a KnowledgeBase, cluster: &Name) -> Self {
        let mut others = Self {
            keys: BTreeMap::new(),
            numbers: BTreeMap::new(),
            blocks: BTreeMap::new(),
        };
        let clusters = base.clusters.iter().filter(|(name, _)| *name != cluster);
        for (cluster, (name, node)) in
            clusters.flat_map(|(name, it)| it.nodes.iter().map(move |node| (name, node)))
        {
            let whose = || format!("node {name} of cluster {cluster}");
            if !node.report.public_key.is_empty() {
                others.keys.insert(&node.report.public_key, whose());
            }
            others.numbers.insert(node.number, whose());
            for block in node.blocks4.keys() {
                others.blocks.insert(*block, whose());
            }
        }
        others
    }

    fn of_address6(&self, base: &KnowledgeBase, addr6: Ipv6Addr) -> Option<&String> {
        let number = base.mesh.as_ref()?.node_of(addr6)?;
        self.numbers.get(&number)
    }

    fn of_address4(&self, base: &KnowledgeBase, addr4: std::net::Ipv4Addr) -> Option<&String> {
        let mesh = base.mesh.as_ref()?;
        let mut blocks = self.blocks.iter();
        let holds = |block: u32| mesh.block4(block).is_some_and(|it| it.contains(&addr4));
        blocks
            .find(|(block, _)| holds(**block))
            .map(|(_, whose)| whose)
    }
}

/// Leaves out of `report` what is not `cluster`'s to say; what that was, for the log.
pub(crate) fn confine(base: &KnowledgeBase, cluster: &Name, report: &mut Report) -> Vec<String> {
    let others = Others::of(base, cluster);
    let mut left_out = Vec::new();
    for (name, node) in &mut report.nodes {
        if let Some(whose) = others.keys.get(&*node.public_key) {
            left_out.push(format!("node {name} has the public key of {whose}"));
            node.public_key.clear();
            node.ready = false;
        }
        node.used4.retain(|addr4| {
            let whose = others.of_address4(base, *addr4);
            left_out.extend(whose.map(|whose| format!("{addr4} of {whose} on node {name}")));
            whose.is_none()
        });
    }
    for instance in &mut report.instances {
        let Some(endpoint) = &mut instance.endpoint else {
            continue;
        };
        if let Some(whose) = others.of_address6(base, endpoint.addr6) {
            left_out.push(format!("the address {} of {whose}", endpoint.addr6));
            instance.endpoint = None;
        } else if let Some(addr4) = endpoint.addr4
            && let Some(whose) = others.of_address4(base, addr4)
        {
            left_out.push(format!("the address {addr4} of {whose}"));
            endpoint.addr4 = None;
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
        assert!(left_out[0].contains("public key of node n1 of cluster edge"));
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
}
