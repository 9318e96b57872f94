//! The CNI plugin, called as a container runtime calls it.

use std::{
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

use netmanager_api::stream::InstanceRef;
use serde_json::{Value, json};

use super::SOON;
use crate::{Netns, binary, wait_for};

/// What a plugin answers that should be asked again (CNI spec 1.1, section 5 "Error").
const TRY_AGAIN: u64 = 11;
/// The interface that it makes.
pub(super) const IFNAME: &str = "net1";

/// One pod's call, on one node.
#[derive(Debug)]
pub(super) struct Call<'a> {
    pub(super) node: &'a Netns,
    pub(super) pod: &'a Netns,
    pub(super) socket: &'a Path,
    pub(super) instance: Option<&'a InstanceRef>,
}

impl Call<'_> {
    /// Attaches the pod, as often as the plugin says that it should be tried again; its result.
    pub(super) fn add(&self) -> Value {
        let result = wait_for("an attachment", SOON, || {
            let result = self.execute("ADD");
            (result["code"] != TRY_AGAIN).then_some(result)
        });
        assert!(result["ips"].is_array(), "weft-cni ADD: {result}");
        result
    }

    /// Detaches the pod.
    pub(super) fn del(&self) {
        let result = self.execute("DEL");
        assert!(result.is_null(), "weft-cni DEL: {result}");
    }

    fn execute(&self, command: &str) -> Value {
        let network = json!({
            "cniVersion": "1.1.0", "name": "weft", "type": "weft-cni", "socket": self.socket,
        });
        let args = self.instance.map_or_else(String::new, |instance| {
            format!(
                "WEFT_SERVICE={};WEFT_INSTANCE_NUMBER={};WEFT_EPOCH={}",
                instance.service, instance.instance, instance.epoch
            )
        });
        let program = binary("weft-cni");
        let mut child = self
            .node
            .run(|| {
                Command::new(&program)
                    .env_clear()
                    .env("CNI_COMMAND", command)
                    .env("CNI_CONTAINERID", self.pod.name())
                    .env("CNI_NETNS", self.pod.path())
                    .env("CNI_IFNAME", IFNAME)
                    .env("CNI_PATH", program.parent().unwrap())
                    .env("CNI_ARGS", args)
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .spawn()
            })
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(network.to_string().as_bytes()).unwrap();
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        if output.stdout.is_empty() {
            return Value::Null;
        }
        serde_json::from_slice(&output.stdout).unwrap()
    }
}
