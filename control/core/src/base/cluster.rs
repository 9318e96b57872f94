//! Commands about the mesh, its clusters and their nodes.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, Ipv6Addr},
};

use ebpf_common::addr::{BLOCK4_LEN, BLOCK4_SIZE, Mesh4, Mesh6, Name4, Name6};
use ipnet::{IpNet, Ipv4Net};

use super::{
    Binding, BindingState, Cluster, ClusterState, KnowledgeBase, LAST, Mesh, Node, REST_MS,
    RefusedBy, numbers::Rest,
};
use crate::{
    command::{Applied, Outcome, Refusal},
    index::Touch,
    name::{Name, Slot},
    report::{ClusterFacts, InstanceId, InstanceReport, NodeReport, Phase, Report},
};

/// How long a /27 block must be unused before it is given back, milliseconds: longer than a pod takes to
/// restart.
const BLOCK_IDLE_MS: u64 = 60_000;

/// From what a busy network can hold to what a user can wait for, milliseconds.
const LEASE_MS: std::ops::RangeInclusive<u64> = 500..=3_600_000;

impl Mesh {
    /// The IPv6 space; `None` for prefixes that [`KnowledgeBase::apply`] does not accept.
    #[must_use]
    pub fn space6(&self) -> Option<Mesh6> {
        (self.prefix6.prefix_len() == Mesh6::LEN)
            .then(|| Mesh6::new(self.prefix6.addr().to_bits()))
            .flatten()
    }

    /// The IPv4 space, where the mesh has one.
    #[must_use]
    pub fn space4(&self) -> Option<Mesh4> {
        let prefix = self.prefix4?;
        Mesh4::new(prefix.addr().to_bits(), prefix.prefix_len())
    }

    /// The number of the node that an endpoint's IPv6 address is on; `None` for any other address.
    #[must_use]
    pub fn node_of(&self, addr6: Ipv6Addr) -> Option<u32> {
        match self.space6()?.decode(addr6.to_bits()) {
            Some(Name6::Endpoint { node, .. }) => Some(node),
            _ => None,
        }
    }

    /// The number of the /27 block that an endpoint's IPv4 address is in; `None` for any other address.
    #[must_use]
    pub fn block_of(&self, addr4: Ipv4Addr) -> Option<u32> {
        match self.space4()?.decode(addr4.to_bits()) {
            Some(Name4::Endpoint { offset }) => Some(offset / BLOCK4_SIZE),
            _ => None,
        }
    }

    /// A /27 block by its number.
    #[must_use]
    pub fn block4(&self, block: u32) -> Option<Ipv4Net> {
        Ipv4Net::new(self.space4()?.block_base(block)?.into(), BLOCK4_LEN).ok()
    }
}

impl KnowledgeBase {
    pub(super) fn init_mesh(&mut self, mesh: &Mesh) -> Outcome {
        if let Some(current) = &self.mesh {
            return if current == mesh {
                Ok(Applied::Unchanged)
            } else {
                Err(Refusal::OtherMesh(current.name.clone()))
            };
        }
        let bad = |field: &str, problem: String| {
            Err(Refusal::BadMesh {
                field: field.to_owned(),
                problem,
            })
        };
        if mesh.name.is_empty() {
            return bad("name", "is empty: give the mesh a name".to_owned());
        }
        if mesh.space6().is_none() {
            return bad(
                "prefix6",
                format!(
                    "{} is not a /48 of fd00::/8 without host bits",
                    mesh.prefix6
                ),
            );
        }
        if let Some(prefix) = mesh.prefix4
            && mesh.space4().is_none()
        {
            return bad(
                "prefix4",
                format!("{prefix} is not a /12 to /16 without host bits"),
            );
        }
        if !LEASE_MS.contains(&mesh.lease_ms) {
            let (least, most) = (LEASE_MS.start(), LEASE_MS.end());
            let problem = format!("{} is out of range: use {least} to {most}", mesh.lease_ms);
            return bad("lease_ms", problem);
        }
        self.mesh = Some(mesh.clone());
        self.next_epoch = self.next_epoch.max(1);
        self.touch_everything();
        Ok(Applied::Changed)
    }

    pub(super) fn register_cluster(
        &mut self,
        name: &Name,
        session: u64,
        facts: &ClusterFacts,
    ) -> Outcome {
        let without_ipv4 = self.collision(name, facts)?;
        let known = self.clusters.get(name);
        if let Some(known) = known
            && known.session == session
            && known.state == ClusterState::Ready
            && known.facts == *facts
        {
            return Ok(Applied::Unchanged);
        }
        let drained_since_ms = known.and_then(|known| known.drained_since_ms);
        let leaving_since_ms = known.and_then(|known| known.leaving_since_ms);
        let certificate_ends_ms = known.and_then(|known| known.certificate_ends_ms);
        let mut nodes = known.map(|known| known.nodes.clone()).unwrap_or_default();
        if without_ipv4.is_some() {
            for node in nodes.values_mut() {
                self.release_blocks(node);
            }
        }
        let cluster = Cluster {
            facts: facts.clone(),
            session,
            state: ClusterState::Ready,
            without_ipv4,
            reported_ms: 0,
            drained_since_ms,
            leaving_since_ms,
            certificate_ends_ms,
            nodes,
        };
        self.clusters.insert(name.clone(), cluster);
        self.touch_tables();
        Ok(Applied::Changed)
    }

    /// Why a cluster gets no IPv4 (its own prefixes overlap the mesh's); an error for IPv6.
    fn collision(&self, name: &Name, facts: &ClusterFacts) -> Result<Option<String>, Refusal> {
        let Some(mesh) = &self.mesh else {
            return Err(Refusal::NoMesh);
        };
        let mut without_ipv4 = None;
        for prefix in &facts.prefixes {
            match (prefix, mesh.prefix4) {
                (IpNet::V6(own), _) if overlap(IpNet::V6(*own), IpNet::V6(mesh.prefix6)) => {
                    return Err(Refusal::PrefixCollision {
                        cluster: name.clone(),
                        prefix: own.to_string(),
                        mesh: mesh.prefix6.to_string(),
                    });
                }
                (IpNet::V4(own), Some(ours)) if overlap(IpNet::V4(*own), IpNet::V4(ours)) => {
                    without_ipv4 = Some(format!(
                        "its prefix {own} overlaps the mesh's {ours}: it is reached by IPv6 only"
                    ));
                }
                _ => {}
            }
        }
        Ok(without_ipv4)
    }

    /// The cluster, if `session` is its current one and it is not lost.
    pub(super) fn session(&self, name: &Name, session: u64) -> Result<&Cluster, Refusal> {
        let cluster = self
            .clusters
            .get(name)
            .ok_or_else(|| Refusal::UnknownCluster(name.clone()))?;
        if cluster.session != session {
            return Err(Refusal::StaleSession {
                cluster: name.clone(),
                current: cluster.session,
                named: session,
            });
        }
        match cluster.state {
            ClusterState::Ready => Ok(cluster),
            ClusterState::Lost { .. } => Err(Refusal::ClusterLost(name.clone())),
        }
    }

    /// Whether who shows `session`, if any, may be a cluster's agent at `now_ms`: only who shows the last one is known to be
    /// the same. Somebody else runs what the cluster must run beside what runs already, so the last agent must be lost, and
    /// its one-writer services fenced.
    #[must_use]
    pub fn admits(&self, name: &Name, session: Option<u64>, now_ms: u64) -> bool {
        let Some(known) = self.clusters.get(name) else {
            return true;
        };
        let fenced_ms = match known.state {
            _ if session == Some(known.session) => return true,
            ClusterState::Ready => return false,
            ClusterState::Lost { since_ms } => since_ms + self.fence_margin_ms(),
        };
        fenced_ms <= now_ms.max(self.log_time_ms)
    }

    pub(super) fn report(&mut self, name: &Name, session: u64, report: &Report) -> Outcome {
        let cluster = self.session(name, session)?;
        let with4 = cluster.without_ipv4.is_none();
        let mut nodes = cluster.nodes.clone();
        for (node, facts) in &report.nodes {
            self.report_node(&mut nodes, node, facts);
        }
        for (name, node) in &mut nodes {
            if !report.nodes.contains_key(name) {
                node.absent_since_ms.get_or_insert(self.log_time_ms);
                node.not_ready_since_ms.get_or_insert(self.log_time_ms);
                node.report.ready = false;
            }
            if with4 {
                self.balance_blocks(node);
            }
        }
        if let Some(cluster) = self.clusters.get_mut(name) {
            cluster.nodes = nodes;
            cluster.reported_ms = self.log_time_ms;
        }
        for instance in &report.instances {
            self.report_instance(name, instance);
        }
        self.forget_unreported(name, &report.instances);
        Ok(Applied::Changed)
    }

    fn report_node(&mut self, nodes: &mut BTreeMap<String, Node>, name: &str, facts: &NodeReport) {
        let now = self.log_time_ms;
        let shown = |facts: &NodeReport| (facts.public_key.clone(), facts.tunnel);
        match nodes.get_mut(name) {
            Some(node) => {
                if shown(&node.report) != shown(facts) {
                    self.touch_tables();
                }
                node.absent_since_ms = None;
                node.not_ready_since_ms =
                    (!facts.ready).then(|| node.not_ready_since_ms.unwrap_or(now));
                node.report = facts.clone();
            }
            None => {
                // A mesh that ever had 2^32 nodes gives no more numbers: the node stays without.
                let Some(number) = self.numbers.last_node.checked_add(1) else {
                    return;
                };
                self.numbers.last_node = number;
                self.touch_tables();
                let node = Node {
                    number,
                    blocks4: BTreeMap::new(),
                    absent_since_ms: None,
                    not_ready_since_ms: (!facts.ready).then_some(now),
                    report: facts.clone(),
                };
                nodes.insert(name.to_owned(), node);
            }
        }
    }

    /// Gives a node its blocks: those in use, and one spare. The first one is kept for the node endpoint.
    fn balance_blocks(&mut self, node: &mut Node) {
        let Some(mesh) = self.mesh.as_ref() else {
            return;
        };
        let Some(space) = mesh.space4() else {
            return;
        };
        let now = self.log_time_ms;
        let used4 = node.report.used4.iter();
        let used: BTreeSet<u32> = used4.filter_map(|addr4| mesh.block_of(*addr4)).collect();
        for block in &used {
            self.numbers.blocks4.disturb(*block, now + REST_MS);
        }
        let first = node.blocks4.keys().next().copied();
        for (block, idle_since) in &mut node.blocks4 {
            if used.contains(block) || Some(*block) == first {
                *idle_since = None;
            } else {
                idle_since.get_or_insert(now);
            }
        }
        let spares: Vec<(u32, u64)> = node
            .blocks4
            .iter()
            .filter_map(|(block, idle)| idle.map(|since| (*block, since)))
            .collect();
        let mut missing = usize::from(spares.is_empty()) + usize::from(first.is_none());
        while missing > 0 {
            // Without IPv4 blocks a node is reached by IPv6: nothing to refuse.
            let Ok(block) = self.numbers.blocks4.take(space.blocks(), "IPv4 blocks") else {
                break;
            };
            let idle = (missing == 1).then_some(now);
            node.blocks4.insert(block, idle);
            self.touch_tables();
            missing -= 1;
        }
        for (block, since) in spares.iter().skip(1) {
            if now.saturating_sub(*since) >= BLOCK_IDLE_MS {
                node.blocks4.remove(block);
                self.rest_block(*block);
            }
        }
    }

    fn release_blocks(&mut self, node: &mut Node) {
        for block in std::mem::take(&mut node.blocks4).into_keys() {
            self.rest_block(block);
        }
    }

    fn rest_block(&mut self, block: u32) {
        let rest = Rest {
            until_ms: self.log_time_ms + REST_MS,
            after: None,
        };
        self.numbers.blocks4.release(block, rest);
        self.touch_tables();
    }

    fn report_instance(&mut self, cluster: &Name, report: &InstanceReport) {
        let id = &report.id;
        if id.epoch < LAST {
            self.next_epoch = self.next_epoch.max(id.epoch + 1);
        }
        if report.phase == Phase::Stopped
            && let Some(owed) = self.owed_stops.get_mut(cluster)
        {
            owed.remove(id);
            self.lookup.touch_cluster(cluster);
            if owed.is_empty() {
                self.owed_stops.remove(cluster);
            }
        }
        let Ok(slot) = Slot::of(id) else {
            return;
        };
        let now = self.log_time_ms;
        let migrating = self.migrating(&slot).is_some();
        let binding = self
            .slots
            .get_mut(&slot)
            .and_then(|bindings| bindings.get_mut(&id.epoch))
            .filter(|binding| binding.cluster == *cluster);
        let Some(binding) = binding else {
            self.report_unbound(cluster, &slot, report);
            return;
        };
        if report.phase == Phase::Stopped
            && (binding.state == BindingState::Stopping
                || (matches!(binding.state, BindingState::Draining { .. }) && !migrating))
        {
            self.remove_binding(&slot, id.epoch);
            return;
        }
        let changed = (binding.phase, &binding.node, &binding.endpoint)
            != (report.phase, &report.node, &report.endpoint);
        if binding.phase != report.phase {
            binding.phase = report.phase;
            binding.phase_since_ms = now;
        }
        binding.node.clone_from(&report.node);
        binding.endpoint.clone_from(&report.endpoint);
        binding.reason.clone_from(&report.reason);
        if report.phase == Phase::Refused
            && let Some(service) = self.services.get_mut(&slot.service)
        {
            let refused = RefusedBy {
                reason: report.reason.clone(),
                until_ms: None,
            };
            service.refused_by.insert(cluster.clone(), refused);
        }
        if changed {
            self.touch_service(&slot.service, Touch::Backends);
        }
    }

    /// A cluster runs what is not bound there. A life that this Knowledge Base ended is stopped; one that it
    /// never heard of (it was restored from an older state) is left alone.
    fn report_unbound(&mut self, cluster: &Name, slot: &Slot, report: &InstanceReport) {
        let gone = matches!(report.phase, Phase::Stopped | Phase::Refused);
        let bound_later = self
            .slots
            .get(slot)
            .is_some_and(|bindings| bindings.keys().any(|epoch| *epoch > report.id.epoch));
        if !gone && self.adopt(cluster, slot, report) {
            return;
        }
        if !gone && bound_later {
            self.owe_stop(cluster, report.id.clone());
        }
    }

    /// A report is complete: what it does not name, its agent does not know (any more).
    fn forget_unreported(&mut self, cluster: &Name, reported: &[InstanceReport]) {
        let reported: BTreeSet<&InstanceId> = reported.iter().map(|report| &report.id).collect();
        let now = self.log_time_ms;
        self.settle();
        let within = self.lookup.within(cluster);
        let mut touched = Vec::new();
        for service in within {
            let mut is_touched = false;
            let slots = service.slot(0)..=service.slot(u32::MAX);
            for (slot, bindings) in self.slots.range_mut(slots) {
                for (epoch, binding) in bindings {
                    let known = matches!(binding.phase, Phase::Ready | Phase::NotReady);
                    if binding.cluster == *cluster && known && !reported.contains(&slot.at(*epoch))
                    {
                        binding.phase = Phase::Starting;
                        binding.phase_since_ms = now;
                        binding.node.clear();
                        binding.endpoint = None;
                        is_touched = true;
                    }
                }
            }
            if is_touched {
                touched.push(service.clone());
            }
        }
        for service in touched {
            self.touch_service(&service, Touch::Backends);
        }
    }

    pub(super) fn lost(&mut self, name: &Name, session: u64) -> Outcome {
        if let Err(refusal) = self.session(name, session) {
            return match refusal {
                Refusal::UnknownCluster(_) => Err(refusal),
                _ => Ok(Applied::Unchanged),
            };
        }
        let now = self.log_time_ms;
        if let Some(cluster) = self.clusters.get_mut(name) {
            cluster.state = ClusterState::Lost { since_ms: now };
            for node in cluster.nodes.values_mut() {
                node.not_ready_since_ms.get_or_insert(now);
                node.report.ready = false;
            }
        }
        let on_their_way_out = |slot: &Slot, binding: &Binding| {
            binding.cluster == *name
                && match binding.state {
                    BindingState::Stopping => true,
                    BindingState::Draining { .. } => self.migrating(slot).is_none(),
                    BindingState::Active | BindingState::Probing => false,
                }
        };
        for (slot, epoch) in self.bindings_where(on_their_way_out) {
            self.stop_binding(&slot, epoch);
        }
        Ok(Applied::Changed)
    }

    pub(super) fn drain_cluster(&mut self, name: &Name, drain: bool) -> Outcome {
        let now = self.log_time_ms;
        let cluster = self
            .clusters
            .get_mut(name)
            .ok_or_else(|| Refusal::UnknownCluster(name.clone()))?;
        if cluster.drained_since_ms.is_some() == drain {
            return Ok(Applied::Unchanged);
        }
        cluster.drained_since_ms = drain.then_some(now);
        // Used again, it stays.
        cluster.leaving_since_ms = None;
        Ok(Applied::Changed)
    }

    /// A cluster is to leave the mesh: it is drained, if it is not already.
    pub(super) fn leave_cluster(&mut self, name: &Name) -> Outcome {
        let now = self.log_time_ms;
        let cluster = self
            .clusters
            .get_mut(name)
            .ok_or_else(|| Refusal::UnknownCluster(name.clone()))?;
        if cluster.leaving_since_ms.is_some() {
            return Ok(Applied::Unchanged);
        }
        cluster.leaving_since_ms = Some(now);
        cluster.drained_since_ms.get_or_insert(now);
        Ok(Applied::Changed)
    }

    /// Takes a lost cluster out. What it has not said to have stopped is in the way, unless it is `abandon`ed: should
    /// the cluster come back all the same, what was placed elsewhere since is stopped there, and what was deleted runs on.
    pub(super) fn forget_cluster(&mut self, name: &Name, abandon: bool) -> Outcome {
        let cluster = self
            .clusters
            .get(name)
            .ok_or_else(|| Refusal::UnknownCluster(name.clone()))?;
        let in_use = |problem: String| {
            Err(Refusal::ClusterInUse {
                cluster: name.clone(),
                problem,
            })
        };
        let ClusterState::Lost { since_ms } = cluster.state else {
            return in_use("its agent is connected: stop the agent first".to_owned());
        };
        if let Some((slot, _)) = self
            .bindings_where(|_, binding| binding.cluster == *name)
            .first()
        {
            return in_use(format!(
                "{slot} is bound there: wait until it is placed elsewhere"
            ));
        }
        if let Some(owed) = self.owed_stops.get(name).filter(|_| !abandon) {
            let first = owed.first();
            let first = first.map(|id| format!("{}/{}", id.service, id.instance));
            return in_use(format!(
                "it has not said that {} of its instances have stopped ({}): if its machines are gone for good, add \
                 --abandon",
                owed.len(),
                first.unwrap_or_default()
            ));
        }
        // Without it nobody would know for how long what ran there may still write.
        let fenced_ms = since_ms + self.fence_margin_ms();
        if self.owed_stops.contains_key(name) && fenced_ms > self.log_time_ms {
            return in_use(format!(
                "what ran there may write for another {} s: wait so long",
                (fenced_ms - self.log_time_ms).div_ceil(1_000)
            ));
        }
        if let Some(cluster) = self.clusters.remove(name) {
            for mut node in cluster.nodes.into_values() {
                self.release_blocks(&mut node);
            }
        }
        self.owed_stops.remove(name);
        self.touch_everything();
        Ok(Applied::Changed)
    }

    /// Ends rests that are over: of numbers, and of nodes that are gone for good.
    pub(super) fn rest(&mut self) {
        let now = self.log_time_ms;
        let mut gone = Vec::new();
        for cluster in self.clusters.values_mut() {
            let over = |node: &Node| {
                node.absent_since_ms
                    .is_some_and(|since| now.saturating_sub(since) >= REST_MS)
            };
            gone.extend(cluster.nodes.extract_if(.., |_, node| over(node)));
        }
        for (_, mut node) in gone {
            self.release_blocks(&mut node);
            self.touch_tables();
        }
        let drained = |(service, before): &(crate::name::ServiceName, u64)| {
            let bound = self.slots.iter().any(|(slot, bindings)| {
                slot.service == *service && bindings.keys().any(|epoch| epoch < before)
            });
            let owed = self
                .owed_stops
                .values()
                .flatten()
                .any(|id| id.epoch < *before && id.service == service.to_string());
            !bound && !owed
        };
        let mut numbers = std::mem::take(&mut self.numbers);
        for pool in [
            &mut numbers.services6,
            &mut numbers.services4,
            &mut numbers.instances4,
            &mut numbers.blocks4,
        ] {
            pool.wake(now, drained);
        }
        self.numbers = numbers;
    }
}

fn overlap(a: IpNet, b: IpNet) -> bool {
    a.contains(&b) || b.contains(&a)
}
