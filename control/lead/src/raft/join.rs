//! Joining a group that there is: a first start without a list of all leads asks the group which member it is.
//!
//! It waits until somebody adds it (`weft lead add`); its id comes from the membership, and stays on its disk.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use tokio::time::sleep;

use super::{Member, StartError, network::Network};
use crate::lead::AskError;

/// Where a lead asks for its seat.
pub(crate) const PATH: &str = "/raft/v1/seat";
/// How long one lead may take to answer: as long as it looks for the leader, and a little.
const ANSWER: Duration = Duration::from_secs(8);
/// How long between two rounds of asking.
const AGAIN: Duration = Duration::from_millis(300);

/// How a lead gets into a group that there is.
#[derive(Clone, Debug, Default)]
pub struct Join {
    /// Leads of the group by name; none where this lead does not join.
    pub leads: BTreeMap<String, SocketAddr>,
    /// Where the others will find this lead.
    pub advertised: Option<SocketAddr>,
}

impl Join {
    pub(super) fn is_wanted(&self) -> bool {
        !self.leads.is_empty()
    }

    /// Waits until the group knows a member of this name; its id.
    pub(super) async fn seat(&self, name: &str, network: &Network) -> Result<u64, StartError> {
        let mut said = false;
        loop {
            for (lead, address) in &self.leads {
                let lead = Member::new(lead, *address);
                let answer = network
                    .post::<_, Result<Option<(u64, Member)>, AskError>>(&lead, PATH, &name, ANSWER);
                match answer.await {
                    Ok(Ok(Some((id, member)))) => return self.take(id, &member),
                    Ok(Ok(None)) if said => {}
                    Ok(Ok(None)) => {
                        said = true;
                        let address = self.advertised;
                        tracing::info!(name, ?address, "waiting to be added: weft lead add");
                    }
                    Ok(Err(error)) => tracing::warn!(%error, "the group does not answer"),
                    Err(error) => tracing::warn!(%error, "the group was not reached"),
                }
            }
            sleep(AGAIN).await;
        }
    }

    fn take(&self, id: u64, member: &Member) -> Result<u64, StartError> {
        match self.advertised {
            Some(advertised) if advertised != member.address => Err(StartError::OtherSeat {
                name: member.name.clone(),
                known: member.address,
                advertised,
            }),
            _ => Ok(id),
        }
    }
}
