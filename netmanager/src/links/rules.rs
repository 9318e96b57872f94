//! The rules that lead the mesh's packets to our routing table, by rtnetlink.
//!
//! ```text
//!  5746: iif lo to MESH lookup TABLE       the host's own packets
//!  5747: from MESH to MESH blackhole       forwarded, and says to come from the mesh: forged
//!  5748: to MESH lookup TABLE              forwarded for an unattached pod
//! ```
//!
//! What comes out of the node endpoint is believed to be the node's, so only the host's own processes may say
//! so; a forger is not answered, because the answer would go to whom he says he is. (IPv4 drops such a source as a martian by itself, IPv6 does not.)

use std::{fmt, net::IpAddr};

use futures::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily,
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use rtnetlink::IpVersion;

use super::{
    Links, LinksError, failed,
    node::{TABLE, ignore_existing},
};

/// The first of our rules' priorities.
const RULE_PRIORITY: u32 = 5_746;

/// What one of our rules is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RuleKind {
    /// The host's own packets find the mesh.
    Own,
    /// A packet that is forwarded with a source in the mesh goes nowhere: that source is forged.
    Forged,
    /// Other packets that are forwarded find the mesh.
    Foreign,
}

/// One of our rules, for one prefix of the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    mesh: IpNet,
    kind: RuleKind,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the rule {} for {}", self.kind.priority(), self.mesh)
    }
}

impl RuleKind {
    /// In the order in which the kernel asks them.
    const ALL: [Self; 3] = [Self::Own, Self::Forged, Self::Foreign];

    const fn priority(self) -> u32 {
        RULE_PRIORITY
            + match self {
                Self::Own => 0,
                Self::Forged => 1,
                Self::Foreign => 2,
            }
    }
}

impl Rule {
    /// Says it to the kernel.
    fn write(&self, message: &mut RuleMessage) {
        let (network, length) = (self.mesh.network(), self.mesh.prefix_len());
        message.header.family = match self.mesh {
            IpNet::V4(_) => AddressFamily::Inet,
            IpNet::V6(_) => AddressFamily::Inet6,
        };
        message.header.dst_len = length;
        message.attributes.extend([
            RuleAttribute::Priority(self.kind.priority()),
            RuleAttribute::Destination(network),
        ]);
        match self.kind {
            RuleKind::Own => message
                .attributes
                .push(RuleAttribute::Iifname("lo".to_owned())),
            RuleKind::Forged => {
                message.header.src_len = length;
                message.attributes.push(RuleAttribute::Source(network));
            }
            RuleKind::Foreign => {}
        }
        match self.kind {
            RuleKind::Own | RuleKind::Foreign => {
                message.header.action = RuleAction::ToTable;
                message.attributes.push(RuleAttribute::Table(TABLE));
            }
            RuleKind::Forged => message.header.action = RuleAction::Blackhole,
        }
    }

    /// One of our rules, as the kernel tells it; an error where it is ours by its place but like none that this
    /// version makes; `None` where it is somebody else's.
    fn read(message: &RuleMessage) -> Option<Result<Self, ()>> {
        let has = |attribute| message.attributes.contains(&attribute);
        let kind = RuleKind::ALL
            .into_iter()
            .find(|kind| has(RuleAttribute::Priority(kind.priority())))?;
        let is_table = has(RuleAttribute::Table(TABLE));
        let is_guard = message.header.action == RuleAction::Blackhole;
        if !is_table && !is_guard {
            return None;
        }
        let net = |address: &IpAddr, length| IpNet::new(*address, length).ok();
        let mut to = None;
        let mut from = None;
        for attribute in &message.attributes {
            match attribute {
                RuleAttribute::Destination(address) => to = net(address, message.header.dst_len),
                RuleAttribute::Source(address) => from = net(address, message.header.src_len),
                _ => {}
            }
        }
        let is_own = has(RuleAttribute::Iifname("lo".to_owned()));
        let is_whole = match kind {
            RuleKind::Own => is_table && is_own && from.is_none(),
            RuleKind::Forged => is_guard && from == to,
            RuleKind::Foreign => is_table && !is_own && from.is_none(),
        };
        Some(
            to.filter(|_| is_whole)
                .map(|mesh| Self { mesh, kind })
                .ok_or(()),
        )
    }
}

impl Links {
    /// Makes the rules for these prefixes of the mesh, then removes those for others: there is no moment without.
    pub(super) async fn ensure_rules(&self, prefixes: &[IpNet]) -> Result<(), LinksError> {
        let wanted: Vec<Rule> = prefixes
            .iter()
            .flat_map(|&mesh| RuleKind::ALL.map(|kind| Rule { mesh, kind }))
            .collect();
        for rule in &wanted {
            let mut request = self.handle.rule().add();
            rule.write(request.message_mut());
            ignore_existing(request.execute().await)
                .map_err(|source| failed(format!("make {rule}"), source))?;
        }
        for version in [IpVersion::V4, IpVersion::V6] {
            self.remove_stale_rules(version, &wanted).await?;
        }
        Ok(())
    }

    /// Removes all our rules. Goes on after an error and gives the first.
    pub(super) async fn remove_rules(&self) -> Result<(), LinksError> {
        let four = self.remove_stale_rules(IpVersion::V4, &[]).await;
        four.and(self.remove_stale_rules(IpVersion::V6, &[]).await)
    }

    async fn remove_stale_rules(
        &self,
        version: IpVersion,
        wanted: &[Rule],
    ) -> Result<(), LinksError> {
        let rules: Vec<RuleMessage> = self
            .handle
            .rule()
            .get(version)
            .execute()
            .try_collect()
            .await
            .map_err(|source| failed("list rules", source))?;
        for message in rules {
            let is_stale = match Rule::read(&message) {
                Some(Ok(rule)) => !wanted.contains(&rule),
                Some(Err(())) => true,
                None => false,
            };
            if is_stale {
                let result = self.handle.rule().del(message).execute().await;
                result.map_err(|source| failed("remove an old rule", source))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_reads_back_and_only_ours_are_ours() {
        for mesh in ["10.16.0.0/12", "fd12:3456:789a::/48"] {
            let mesh = mesh.parse().unwrap();
            for kind in RuleKind::ALL {
                let rule = Rule { mesh, kind };
                let mut message = RuleMessage::default();
                rule.write(&mut message);
                assert_eq!(Rule::read(&message), Some(Ok(rule)));
                // What an older version had at that place goes.
                message
                    .attributes
                    .retain(|attribute| !matches!(attribute, RuleAttribute::Destination(_)));
                assert_eq!(Rule::read(&message), Some(Err(())));
                message.header.action = RuleAction::Prohibit;
                message
                    .attributes
                    .retain(|attribute| !matches!(attribute, RuleAttribute::Table(_)));
                assert_eq!(Rule::read(&message), None);
            }
        }
    }
}
