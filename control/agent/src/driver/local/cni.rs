//! The runtime's side of CNI: executes the plugin inside a node's network namespace (CNI spec 1.1, sections 2
//! and 4).

use std::{
    fs::File,
    io::{self, Read, Write},
    net::IpAddr,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use control_core::report::InstanceId;
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};

use super::pod::{Pod, on_a_thread};

/// The network's name.
const NETWORK: &str = "weft";
/// The interface inside the pod.
const IFNAME: &str = "net1";
/// The plugin bounds its own time below this.
const PATIENCE: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(5);

/// One node's plugin.
#[derive(Debug)]
pub(super) struct Plugin {
    pub(super) binary: PathBuf,
    /// The CNI socket of the node's NetManager.
    pub(super) socket: PathBuf,
    /// The namespace that plays the node; `None` is the agent's own.
    pub(super) netns: Option<PathBuf>,
    /// The agent's own network namespace.
    pub(super) own: File,
}

/// Why the plugin did not do its work.
#[derive(Debug, thiserror::Error)]
pub(super) enum CniError {
    /// The node's namespace cannot be entered.
    #[error("the node's network namespace {path:?} is not there: {source}")]
    NoNode { path: PathBuf, source: io::Error },
    /// It could not be executed.
    #[error("failed to run {binary:?}: {source}")]
    Run { binary: PathBuf, source: io::Error },
    /// It answered with an error object.
    #[error("{message} (CNI code {code})")]
    Refused { code: u64, message: String },
    /// Its answer is none.
    #[error("the answer of {binary:?} is no CNI result: {text:?}")]
    Strange { binary: PathBuf, text: String },
    /// It took too long, or was not waited for any more.
    #[error("{binary:?} did not answer in time")]
    Late { binary: PathBuf },
}

impl Plugin {
    /// Attaches a pod; its addresses. Gives up when `stop` is set.
    pub(super) fn add(
        &self,
        pod: &Pod,
        id: &InstanceId,
        stop: &AtomicBool,
    ) -> Result<Vec<IpAddr>, CniError> {
        let answer = self.call("ADD", pod, &arguments(pod, id), stop)?;
        addresses(&answer).ok_or_else(|| self.strange(&answer))
    }

    /// Detaches a pod; succeeds when it is not attached, and when its node is no more.
    pub(super) fn del(&self, pod: &Pod) -> Result<(), CniError> {
        match self.call("DEL", pod, "IgnoreUnknown=1", &AtomicBool::new(false)) {
            Ok(_) | Err(CniError::NoNode { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn call(
        &self,
        verb: &str,
        pod: &Pod,
        arguments: &str,
        stop: &AtomicBool,
    ) -> Result<String, CniError> {
        let mut command = Command::new(&self.binary);
        command
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", pod.name())
            .env("CNI_NETNS", pod.netns())
            .env("CNI_IFNAME", IFNAME)
            .env("CNI_ARGS", arguments)
            .env("CNI_PATH", self.binary.parent().unwrap_or(Path::new("/")))
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let config = json!({
            "cniVersion": "1.1.0", "name": NETWORK, "type": "weft-cni", "socket": self.socket,
        });
        let run = |source| CniError::Run {
            binary: self.binary.clone(),
            source,
        };
        let spawned = on_a_thread(|| Ok(self.enter().map(|()| command.spawn())));
        let mut child = spawned.map_err(run)??.map_err(run)?;
        let mut stdin = child.stdin.take().expect("stdin is piped");
        // A plugin that ends without reading says why in its answer.
        let _ = stdin.write_all(config.to_string().as_bytes());
        drop(stdin);
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = child.try_wait().map_err(run)? {
                break status;
            }
            if Instant::now() >= deadline || stop.load(Ordering::Relaxed) {
                child.kill().and_then(|()| child.wait()).map_err(run)?;
                return Err(CniError::Late {
                    binary: self.binary.clone(),
                });
            }
            std::thread::sleep(LOOK);
        };
        let mut answer = String::new();
        let mut stdout = child.stdout.take().expect("stdout is piped");
        stdout.read_to_string(&mut answer).map_err(run)?;
        if status.success() {
            return Ok(answer);
        }
        Err(refusal(&answer).unwrap_or_else(|| self.strange(&answer)))
    }

    fn enter(&self) -> Result<(), CniError> {
        let entered = match &self.netns {
            Some(path) => super::pod::enter(path),
            None => setns(self.own.as_fd(), CloneFlags::CLONE_NEWNET).map_err(io::Error::from),
        };
        entered.map_err(|source| CniError::NoNode {
            path: self.netns.clone().unwrap_or_default(),
            source,
        })
    }

    fn strange(&self, answer: &str) -> CniError {
        CniError::Strange {
            binary: self.binary.clone(),
            text: answer.chars().take(200).collect(),
        }
    }
}

/// `CNI_ARGS`: who is attached.
fn arguments(pod: &Pod, id: &InstanceId) -> String {
    let namespace = id.service.split('/').next().unwrap_or_default();
    format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={};WEFT_SERVICE={};WEFT_INSTANCE_NUMBER={};\
         WEFT_EPOCH={}",
        pod.name(),
        id.service,
        id.instance,
        id.epoch
    )
}

/// The addresses of a result, IPv4 and IPv6.
fn addresses(answer: &str) -> Option<Vec<IpAddr>> {
    let result: Value = serde_json::from_str(answer).ok()?;
    let ips = result.get("ips")?.as_array()?;
    let addresses: Vec<_> = ips
        .iter()
        .map(|ip| {
            let net: ipnet::IpNet = ip.get("address")?.as_str()?.parse().ok()?;
            Some(net.addr())
        })
        .collect::<Option<_>>()?;
    (!addresses.is_empty()).then_some(addresses)
}

fn refusal(answer: &str) -> Option<CniError> {
    let error: Value = serde_json::from_str(answer).ok()?;
    Some(CniError::Refused {
        code: error.get("code")?.as_u64()?,
        message: error.get("msg")?.as_str()?.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_addresses_of_a_result_are_all_of_them_or_none() {
        let good = r#"{"ips":[{"address":"10.16.0.34/32"},{"address":"fd00::2/128"}]}"#;
        let found = addresses(good).unwrap();
        assert_eq!(
            found,
            ["10.16.0.34", "fd00::2"].map(|ip| ip.parse::<IpAddr>().unwrap())
        );
        for bad in ["", "{}", r#"{"ips":[]}"#, r#"{"ips":[{"address":"x"}]}"#] {
            assert_eq!(addresses(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_error_object_keeps_its_code_and_message() {
        let error = refusal(r#"{"cniVersion":"1.1.0","code":11,"msg":"no NetManager"}"#).unwrap();
        assert_eq!(error.to_string(), "no NetManager (CNI code 11)");
        assert!(refusal("segmentation fault").is_none());
    }
}
