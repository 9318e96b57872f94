//! Attaches a pod to a node as a runtime does: a network namespace and the CNI plugin.

use std::{
    io::Write,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    enter::unknown,
    error::LabError,
    folder::Lab,
    ip, mesh,
    process::{NAMES, inside},
};

/// The interface inside the pod.
const INTERFACE: &str = "net1";
/// What the plugin answers where the node is not ready yet (CNI spec 1.1, section 5 "Error").
const TRY_AGAIN: u64 = 11;
/// How long it is asked again, and how long it is left in peace in between.
const PATIENCE: Duration = Duration::from_secs(10);
const REST: Duration = Duration::from_millis(100);

/// Makes the pod `name` on `node`; prints the plugin's result.
pub(crate) fn attach(lab: &Lab, node: &str, name: &str) -> Result<(), LabError> {
    let manifest = lab.manifest()?;
    let host = lab.netns(node);
    if !Path::new(NAMES).join(&host).exists() {
        return Err(unknown(lab, node));
    }
    let pod = lab.netns(name);
    ip::ip(&["netns", "add", &pod])?;
    let environment = [
        ("CNI_COMMAND", "ADD".to_owned()),
        ("CNI_CONTAINERID", pod.clone()),
        ("CNI_NETNS", format!("{NAMES}/{pod}")),
        ("CNI_IFNAME", INTERFACE.to_owned()),
        ("CNI_PATH", manifest.binaries.display().to_string()),
        (
            "CNI_ARGS",
            format!("K8S_POD_NAMESPACE=lab;K8S_POD_NAME={name}"),
        ),
    ];
    let network = json!({
        "cniVersion": "1.1.0",
        "name": "weft",
        "type": "weft-cni",
        "socket": mesh::socket(lab, node),
    });
    let attached = ip::inside(&pod, &["link set lo up".to_owned()]).and_then(|()| {
        inside(&host, || {
            let start = Instant::now();
            loop {
                let mut command = Command::new(manifest.binaries.join("weft-cni"));
                command.env_clear().envs(environment.iter().cloned());
                let said = run(command, network.to_string().as_bytes())?;
                if said["code"] != TRY_AGAIN || start.elapsed() > PATIENCE {
                    return Ok(said);
                }
                thread::sleep(REST);
            }
        })
    });
    let attached = attached.and_then(|said| match said.get("code") {
        None => Ok(said),
        Some(code) => Err(LabError::Failed {
            what: format!("weft-cni ADD, CNI code {code}"),
            stderr: said["msg"].as_str().unwrap_or_default().to_owned(),
        }),
    });
    match attached {
        Ok(result) => {
            println!("{result}");
            Ok(())
        }
        Err(error) => {
            // The plugin has undone its part; what it said is what the caller must see.
            let _ = ip::ip(&["netns", "delete", &pod]);
            Err(error)
        }
    }
}

/// Executes the plugin; its result or its error object (CNI spec 1.1, section 5).
fn run(mut command: Command, stdin: &[u8]) -> Result<Value, LabError> {
    let start = |source| LabError::Start {
        program: "weft-cni".to_owned(),
        source,
    };
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(start)?;
    if let Some(mut pipe) = child.stdin.take() {
        // A plugin that ends early says why on standard output.
        let _ = pipe.write_all(stdin);
    }
    let output = child.wait_with_output().map_err(start)?;
    serde_json::from_slice(&output.stdout).map_err(|_| LabError::Failed {
        what: "weft-cni ADD".to_owned(),
        stderr: format!(
            "it ended with {} and said nothing that is JSON",
            output.status
        ),
    })
}
