//! Attaches a pod to a node as a runtime does: a network namespace and the CNI plugin.

use std::{
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

use serde_json::json;

use crate::{
    enter::unknown,
    error::LabError,
    folder::Lab,
    ip, mesh,
    process::{NAMES, inside},
};

/// The interface inside the pod.
const INTERFACE: &str = "net1";

/// Makes the pod `name` on `node`; prints the plugin's result.
pub(crate) fn attach(lab: &Lab, node: &str, name: &str) -> Result<(), LabError> {
    let manifest = lab.manifest()?;
    let host = lab.netns(node);
    if !Path::new(NAMES).join(&host).exists() {
        return Err(unknown(lab, node));
    }
    let pod = lab.netns(name);
    ip::ip(&["netns", "add", &pod])?;
    let attached = ip::inside(&pod, &["link set lo up".to_owned()]).and_then(|()| {
        inside(&host, || {
            let mut command = Command::new(manifest.binaries.join("weft-cni"));
            command.env_clear().envs([
                ("CNI_COMMAND", "ADD"),
                ("CNI_CONTAINERID", &pod),
                ("CNI_NETNS", &format!("{NAMES}/{pod}")),
                ("CNI_IFNAME", INTERFACE),
                ("CNI_PATH", &manifest.binaries.display().to_string()),
                (
                    "CNI_ARGS",
                    &format!("K8S_POD_NAMESPACE=lab;K8S_POD_NAME={name}"),
                ),
            ]);
            let network = json!({
                "cniVersion": "1.1.0",
                "name": "weft",
                "type": "weft-cni",
                "socket": mesh::socket(lab, node),
            });
            run(command, network.to_string().as_bytes())
        })
    });
    match attached {
        Ok(result) => {
            println!("{}", result.trim_end());
            Ok(())
        }
        Err(error) => {
            // The plugin has undone its part; what it said is what the caller must see.
            let _ = ip::ip(&["netns", "delete", &pod]);
            Err(error)
        }
    }
}

fn run(mut command: Command, stdin: &[u8]) -> Result<String, LabError> {
    let start = |source| LabError::Start {
        program: "weft-cni".to_owned(),
        source,
    };
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(start)?;
    if let Some(mut pipe) = child.stdin.take() {
        // A plugin that ends early says why on standard output.
        let _ = pipe.write_all(stdin);
    }
    let output = child.wait_with_output().map_err(start)?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(said);
    }
    Err(LabError::Failed {
        what: "weft-cni ADD".to_owned(),
        stderr: said,
    })
}
