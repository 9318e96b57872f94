//! DEL and GC: everything that can be removed is, errors are all reported, and nothing has to be there.

use netmanager_api::cni::{AttachmentKey, Request};
use rtnetlink::Handle;

use crate::{
    call::Call,
    config::Config,
    door::Door,
    error::Error,
    netns::{Netns, netlink},
    pair, pending, wiring,
};

/// Detaches a pod.
///
/// A DEL does not say whether its ADD was chained (`prevResult` may be there or not in both cases), so it
/// forgets both attachments that it can mean; a mark names exactly one, so nobody else's interface is hit.
pub(crate) async fn del(call: &Call, config: &Config, door: &Door) -> Result<(), Error> {
    let mut keys = vec![config.key(call, &call.ifname)];
    if config.ifname != call.ifname {
        keys.push(config.key(call, &config.ifname));
    }
    let marks: Vec<_> = keys.iter().map(AttachmentKey::mark).collect();
    let mut failures = Vec::new();
    failures.extend(remove_pairs(&marks).await.err());
    let netns = call.netns.as_deref().map(Netns::open);
    if let Some(Ok(netns)) = netns {
        failures.extend(clear_guards(&netns).err());
    }
    for key in &keys {
        failures.extend(release(key, door).await.err());
    }
    Error::gather(failures)
}

/// GC: forgets every attachment of the network that the runtime does not name.
pub(crate) async fn gc(config: &Config, door: &Door) -> Result<(), Error> {
    let Some(valid) = &config.valid else {
        return Err(Error::Config(
            "cni.dev/valid-attachments is missing: GC would forget every pod".to_owned(),
        ));
    };
    let keep = valid
        .iter()
        .flat_map(|valid| {
            [&valid.ifname, &config.ifname].map(|ifname| AttachmentKey {
                network: config.name.clone(),
                container_id: valid.container_id.clone(),
                ifname: ifname.clone(),
            })
        })
        .collect();
    let mut failures = pending::replay(door).await;
    let gc = Request::Gc {
        network: config.name.clone(),
        keep,
    };
    failures.extend(door.request(&gc).await.err());
    Error::gather(failures)
}

/// Removes the pairs of `marks`, both ends.
pub(crate) async fn remove_pairs(marks: &[u32]) -> Result<(), Error> {
    pair::remove(&netlink()?, marks).await
}

/// Removes the pod's guards once it has left the mesh; the host has none of ours.
pub(crate) fn clear_guards(netns: &Netns) -> Result<(), Error> {
    match netns.is_own() {
        Ok(false) => netns.inside(async |pod: &Handle| wiring::clear_guards(pod).await),
        Ok(true) => Ok(()),
        Err(source) => Err(Error::io("tell the pod's network namespace", source)),
    }
}

/// Releases an attachment, now or, when nobody is at the door, later.
pub(crate) async fn release(key: &AttachmentKey, door: &Door) -> Result<(), Error> {
    match door.request(&Request::Release { key: key.clone() }).await {
        Ok(()) => pending::forget(&door.socket, key),
        Err(error) if error.code() == 11 => pending::queue(&door.socket, key),
        Err(error) => Err(error),
    }
}
