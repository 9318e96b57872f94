//! Measures how long messages take to the other leads and back, which is what the timers go by.
//!
//! Every lead asks every other one now and then, whoever leads: who elects the next leader, or is elected, has to know
//! before, and a lead that cannot be reached in time would never hear who leads.

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc, time::Duration};

use futures::{StreamExt, stream::FuturesUnordered};
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::{
    lead::Lead,
    raft::{Member, PULSE, Pulse},
};

/// How often each lead is asked: a longer way is known within three of these.
const OFTEN: Duration = Duration::from_millis(500);
/// How often while its way is not known well.
const SOON: Duration = Duration::from_millis(50);
/// How long an answer may take, with the connection to be made: much longer than the timers follow.
const LIMIT: Duration = Duration::from_secs(3);

/// Measures until the task is dropped; a lead that has heard of no member yet asks those it was started with.
pub(crate) async fn run(lead: Arc<Lead>, introduced: Vec<Member>) {
    let mut asked = BTreeSet::new();
    let mut under_way = FuturesUnordered::new();
    loop {
        let members = lead.members_by_id();
        let others: Vec<_> = match members.is_empty() {
            true => introduced.clone(),
            false => {
                let others = members.into_iter().filter(|(id, _)| *id != lead.id);
                others.map(|(_, member)| member).collect()
            }
        };
        let addresses: Vec<_> = others.iter().map(|member| member.address).collect();
        lead.pace.keep(&addresses);
        for member in others {
            if asked.insert(member.address) {
                under_way.push(ask(&lead, member));
            }
        }
        let pause = if lead.pace.is_known() { OFTEN } else { SOON };
        let end = Instant::now() + pause;
        // Who does not answer holds nobody else's turn up.
        while let Ok(Some(address)) = timeout_at(end, under_way.next()).await {
            asked.remove(&address);
        }
        sleep_until(end).await;
    }
}

/// Asks one lead; which it was.
async fn ask(lead: &Lead, member: Member) -> SocketAddr {
    let sent = Instant::now();
    let pulse = lead.network.post::<_, Pulse>(&member, PULSE, &(), LIMIT);
    let pulse = pulse.await.ok();
    lead.pace.note(member.address, sent.elapsed(), pulse);
    member.address
}
