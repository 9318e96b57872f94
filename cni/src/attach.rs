//! ADD: validate everything, then act; on failure undo what was done, in reverse.

use std::{io, path::Path};

use netmanager_api::cni::{AttachmentKey, Request, Reserve, Reserved};
use rtnetlink::Handle;
use serde_json::Value;

use crate::{
    call::Call,
    config::Config,
    detach,
    door::Door,
    error::Error,
    mac::Mac,
    netns::{Netns, netlink},
    pair, pending,
    result::{self, Made},
    wiring,
};

/// Attaches a pod; returns the result.
pub(crate) async fn add(call: &Call, config: Config, door: &Door) -> Result<Value, Error> {
    let ifname = config.interface(call)?;
    let key = config.key(call, &ifname);
    let mac = config.mac(call)?;
    let instance = config.instance(call)?;
    let path = call
        .netns
        .as_deref()
        .expect("the call was checked to have CNI_NETNS");
    let netns = open(path)?;
    free(&netns, call, &ifname)?;
    let sandbox = path.to_string_lossy().into_owned();
    let reserve = Reserve {
        key: key.clone(),
        netns: sandbox.clone(),
        pod: call.pod(),
        instance,
        mac: mac.map(|mac| mac.to_string()),
    };

    if pending::waits(&door.socket, &key) {
        door.request(&Request::Release { key: key.clone() }).await?;
        pending::forget(&door.socket, &key)?;
    }
    let reserved = match door.reserve(reserve).await {
        Ok(reserved) => reserved,
        Err(error) => return Err(undo(error, Step::Reserve, &key, &netns, door).await),
    };
    if let Err((error, step)) = make(&key, &netns, &reserved, door).await {
        return Err(undo(error, step, &key, &netns, door).await);
    }
    let made = Made {
        version: config.version,
        key: &key,
        sandbox: &sandbox,
        reserved: &reserved,
        legs: &wiring::legs(&reserved),
    };
    match result::success(&made, config.prev_result) {
        Ok(answer) => Ok(answer),
        Err(error) => Err(undo(error, Step::Activate, &key, &netns, door).await),
    }
}

/// How far an ADD came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Reserve,
    Pair,
    Wire,
    Activate,
}

async fn make(
    key: &AttachmentKey,
    netns: &Netns,
    reserved: &Reserved,
    door: &Door,
) -> Result<(), (Error, Step)> {
    let at = |step| move |error| (error, step);
    let host = netlink().map_err(at(Step::Reserve))?;
    let host_mac: Mac = reserved.host_mac.parse().map_err(|why| {
        let error = Error::Protocol(format!("the NetManager gave a wrong host_mac: {why}"));
        (error, Step::Reserve)
    })?;
    let host_ifindex = pair::create(&host, netns, key, reserved)
        .await
        .map_err(at(Step::Pair))?;
    let legs = wiring::legs(reserved);
    netns
        .inside(async |pod: &Handle| wiring::apply(pod, key, &legs, host_mac).await)
        .map_err(at(Step::Wire))?;
    let activate = Request::Activate {
        key: key.clone(),
        host_ifindex,
    };
    door.request(&activate).await.map_err(at(Step::Activate))?;
    pair::set_up(&host, host_ifindex)
        .await
        .map_err(at(Step::Activate))?;
    netns
        .inside(async |pod: &Handle| wiring::carrier(pod, &key.ifname).await)
        .map_err(at(Step::Activate))
}

/// Undoes an ADD that failed at `step`, in reverse, and says so when that fails too.
async fn undo(error: Error, step: Step, key: &AttachmentKey, netns: &Netns, door: &Door) -> Error {
    let mut failures = Vec::new();
    if step >= Step::Pair {
        failures.extend(detach::remove_pairs(&[key.mark()]).await.err());
    }
    if step >= Step::Wire {
        failures.extend(detach::clear_guards(netns).err());
    }
    failures.extend(detach::release(key, door).await.err());
    error.and_then_also(failures)
}

/// The pod's namespace; refuses the host's own.
fn open(path: &Path) -> Result<Netns, Error> {
    let unusable = |why: io::Error| {
        Error::Environment(format!(
            "CNI_NETNS = {} is no network namespace: {why}",
            path.display()
        ))
    };
    let netns = Netns::open(path).map_err(unusable)?;
    if netns.is_own().map_err(unusable)? {
        return Err(Error::Environment(format!(
            "CNI_NETNS = {} is the host's own network namespace: a host-network pod needs no interface, it \
             reaches VIPs through the node endpoint",
            path.display()
        )));
    }
    Ok(netns)
}

/// Refuses an interface name that is taken in the pod.
fn free(netns: &Netns, call: &Call, ifname: &str) -> Result<(), Error> {
    let taken = netns.inside(async |pod: &Handle| pair::by_name(pod, ifname).await)?;
    match taken {
        None => Ok(()),
        Some(_) if ifname == call.ifname => Err(Error::Environment(format!(
            "CNI_IFNAME = {ifname:?} exists in the pod already"
        ))),
        Some(_) => Err(Error::Config(format!(
            "ifname = {ifname:?} exists in the pod already: choose another"
        ))),
    }
}

/// CHECK: the pod is wired as its result says, and the NetManager publishes it.
pub(crate) async fn check(call: &Call, config: &Config, door: &Door) -> Result<(), Error> {
    let Some(prev) = &config.prev_result else {
        return Err(Error::Config(
            "prevResult is missing: CHECK compares the pod with the result of its ADD".to_owned(),
        ));
    };
    let chained = call.ifname != config.ifname && result::has_interface(prev, &config.ifname);
    let ifname = if chained {
        &config.ifname
    } else {
        &call.ifname
    };
    let Some(expected) = result::expected(prev, ifname) else {
        return Err(Error::Differs(vec![format!(
            "prevResult has no interface {ifname} inside the pod"
        )]));
    };
    let key = config.key(call, ifname);
    let path = call
        .netns
        .as_deref()
        .expect("the call was checked to have CNI_NETNS");
    let netns = open(path)?;
    let mut differences =
        netns.inside(async |pod: &Handle| wiring::differences(pod, &key, &expected).await)?;
    match door.request(&Request::Check { key }).await {
        Err(Error::Refused(refused)) => differences.push(refused.message),
        answered => answered?,
    }
    if differences.is_empty() {
        return Ok(());
    }
    Err(Error::Differs(differences))
}
