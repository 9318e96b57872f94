//! The CNI door's requests, decided.

use std::{fs, path::Path};

use netmanager_api::cni::{AttachmentKey, Refused, Reply, Request, Reserve, Reserved};

use super::{
    node::{ATTACHMENTS_FILE, Node},
    wall_ms,
};
use crate::{
    attachments::{AttachError, Attachment, Attachments},
    datapath::{Datapath, Hook},
    door::pending_releases,
    follow::chain,
};

/// CNI error codes (spec 1.1, section 5); 100 and up are ours.
const CODE_IO: u32 = 5;
const CODE_CONFIG: u32 = 7;
const CODE_TRY_AGAIN: u32 = 11;
const CODE_NOT_AVAILABLE: u32 = 50;
const CODE_NOT_ATTACHED: u32 = 100;
/// How long a reservation may take to be activated, ms: a runtime gives up an ADD long before.
const RESERVATION_MS: u64 = 60_000;

impl Node {
    /// Answers one request.
    pub(super) async fn answer(&mut self, request: Request) -> Reply {
        let result = match request {
            Request::Reserve(wish) => self.reserve(&wish).map(Reply::Reserved),
            Request::Activate { key, host_ifindex } => self
                .activate(&key, host_ifindex)
                .await
                .map(|()| Reply::Done),
            Request::Release { key } => self.release(&[key]).await.map(|()| Reply::Done),
            Request::Check { key } => self.check(&key).map(|()| Reply::Done),
            Request::Gc { network, keep } => {
                let garbage = self.attachments.not_kept(&network, &keep);
                self.release(&garbage).await.map(|()| Reply::Done)
            }
            Request::Status => self.status().map(|()| Reply::Done),
        };
        result.unwrap_or_else(Reply::Refused)
    }

    fn reserve(&mut self, wish: &Reserve) -> Result<Reserved, Refused> {
        let Some(table) = self.table.clone() else {
            return Err(refused(CODE_TRY_AGAIN, self.why_no_table()));
        };
        let mut next = self.attachments.clone();
        let (gateway6, gateway4) = next
            .node_addresses(&table, wall_ms())
            .map_err(|error| refuse(&error))?;
        let attachment = next
            .reserve(wish, &table, wall_ms())
            .map_err(|error| refuse(&error))?
            .clone();
        self.keep(next)?;
        tracing::info!(
            pod = %format_args!("{}/{}", attachment.pod.namespace, attachment.pod.name),
            addr6 = %attachment.addr6,
            addr4 = ?attachment.addr4,
            link = attachment.host_ifname,
            "reserved an endpoint"
        );
        Ok(Reserved {
            endpoint: attachment.number,
            host_ifname: attachment.host_ifname,
            mac: attachment.mac.to_string(),
            host_mac: attachment.host_mac.to_string(),
            addr6: attachment.addr6,
            addr4: attachment.addr4,
            gateway6,
            gateway4,
            mesh6: table.mesh.prefix6,
            mesh4: table.mesh.prefix4.filter(|_| attachment.addr4.is_some()),
            mtu: self.parts.mtu,
        })
    }

    async fn activate(&mut self, key: &AttachmentKey, ifindex: u32) -> Result<(), Refused> {
        let attachment = self
            .attachments
            .get(key)
            .map_err(|error| refuse(&error))?
            .clone();
        let name = nix::net::if_::if_indextoname(ifindex).ok();
        if name.as_deref().and_then(|name| name.to_str().ok()) != Some(&attachment.host_ifname) {
            let wanted = &attachment.host_ifname;
            let message = format!(
                "link {ifindex} is {name:?}, not {wanted}: make the host-side link by the reserved name in the NetManager's network namespace"
            );
            return Err(refused(CODE_CONFIG, message));
        }
        self.parts
            .datapath
            .attach(ifindex, Hook::Pod)
            .map_err(|error| refused(CODE_IO, chain(&error)))?;
        let mut next = self.attachments.clone();
        next.activate(key, ifindex)
            .map_err(|error| refuse(&error))?;
        self.keep(next)?;
        self.reconcile().await;
        match &self.trouble {
            None => Ok(()),
            Some(trouble) => Err(refused(CODE_TRY_AGAIN, trouble.clone())),
        }
    }

    /// Forgets attachments; goes on after an error and reports all of them.
    async fn release(&mut self, keys: &[AttachmentKey]) -> Result<(), Refused> {
        let mut next = self.attachments.clone();
        let gone: Vec<Attachment> = keys
            .iter()
            .filter_map(|key| next.release(key, wall_ms()))
            .collect();
        if gone.is_empty() {
            return Ok(());
        }
        self.keep(next)?;
        self.reconcile().await;
        let mut errors = Vec::new();
        for attachment in gone {
            tracing::info!(addr6 = %attachment.addr6, link = attachment.host_ifname, "released");
            if let Some(ifindex) = attachment.host_ifindex
                && let Err(error) = self.parts.datapath.detach(ifindex)
            {
                errors.push(chain(&error));
            }
        }
        if errors.is_empty() {
            Ok(())
        } else {
            Err(refused(CODE_IO, errors.join("; ")))
        }
    }

    fn check(&self, key: &AttachmentKey) -> Result<(), Refused> {
        let attachment = self.attachments.get(key).map_err(|error| refuse(&error))?;
        let name = &attachment.host_ifname;
        let Some(ifindex) = attachment.host_ifindex else {
            let message = format!("{name} is reserved but was never activated: attach it again");
            return Err(refused(CODE_NOT_ATTACHED, message));
        };
        match self.parts.datapath.is_attached(ifindex, Hook::Pod) {
            Ok(true) => {}
            Ok(false) => {
                let message = format!("{name} has lost its program: attach it again");
                return Err(refused(CODE_NOT_ATTACHED, message));
            }
            Err(error) => return Err(refused(CODE_NOT_ATTACHED, chain(&error))),
        }
        match &self.trouble {
            None => Ok(()),
            Some(trouble) => Err(refused(CODE_NOT_ATTACHED, trouble.clone())),
        }
    }

    fn status(&self) -> Result<(), Refused> {
        let why = match (&self.table, &self.trouble) {
            (Some(_), None) => return Ok(()),
            (Some(_), Some(trouble)) => trouble.clone(),
            (None, _) => self.why_no_table(),
        };
        Err(refused(CODE_NOT_AVAILABLE, why))
    }

    fn why_no_table(&self) -> String {
        let settings = &self.parts.settings;
        match (&settings.agent, &settings.table) {
            (Some(agent), _) => format!(
                "node {} has no number yet: its agent at {} has not handed it a table",
                settings.node, agent.address
            ),
            (None, Some(path)) => format!(
                "node {} has no number yet: {} holds no usable table",
                settings.node,
                path.display()
            ),
            (None, None) => format!(
                "node {} has no number: it follows neither an agent (--agent) nor a file (--table)",
                settings.node
            ),
        }
    }

    /// Takes a new state of attachments once it is on disk.
    fn keep(&mut self, next: Attachments) -> Result<(), Refused> {
        if next != self.attachments {
            self.parts
                .store
                .save(ATTACHMENTS_FILE, &next)
                .map_err(|error| refused(CODE_IO, chain(&error)))?;
            self.attachments = next;
        }
        Ok(())
    }

    /// Releases what is gone without a word: links that vanished with their namespace, reservations that
    /// nobody activated and whose namespace is no more, and releases that wait beside the socket.
    pub(super) async fn collect_garbage(&mut self) {
        let links = match self.parts.links.list().await {
            Ok(links) => links,
            Err(error) => {
                tracing::warn!(error = chain(&error), "failed to look for vanished links");
                return;
            }
        };
        let present = links.iter().map(|link| link.ifindex).collect();
        if let Err(error) = self.parts.datapath.forget_links(&present) {
            tracing::warn!(error = chain(&error), "failed to forget vanished links");
        }
        let oldest = wall_ms().saturating_sub(RESERVATION_MS);
        let is_gone = |attachment: &Attachment| match attachment.host_ifindex {
            Some(ifindex) => !links
                .iter()
                .any(|link| link.ifindex == ifindex && link.name == attachment.host_ifname),
            None => attachment.since_ms < oldest && !Path::new(&attachment.netns).exists(),
        };
        let mut keys: Vec<AttachmentKey> = self
            .attachments
            .iter()
            .filter(|attachment| is_gone(attachment))
            .map(|attachment| attachment.key.clone())
            .collect();
        let queued = pending_releases(&self.parts.settings.socket);
        keys.extend(queued.iter().filter_map(|(_, request)| match request {
            Request::Release { key } => Some(key.clone()),
            _ => None,
        }));
        if let Err(error) = self.release(&keys).await {
            tracing::warn!(%error, "failed to release what is gone");
            return;
        }
        for (path, _) in queued {
            if let Err(error) = fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), %error, "failed to remove a queued release");
            }
        }
    }
}

fn refused(code: u32, message: String) -> Refused {
    Refused { code, message }
}

fn refuse(error: &AttachError) -> Refused {
    let code = match error {
        AttachError::NoAddress4 { .. } => CODE_TRY_AGAIN,
        AttachError::Mac(_) => CODE_CONFIG,
        AttachError::Unknown { .. } => CODE_NOT_ATTACHED,
        AttachError::NoNumber | AttachError::Mesh(_) | AttachError::NameTaken { .. } => {
            CODE_NOT_AVAILABLE
        }
    };
    refused(code, error.to_string())
}
