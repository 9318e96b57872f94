//! Starts the product in the lab's machines: its own binaries by their own command lines.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::json;

use crate::{
    error::LabError,
    folder::{Lab, Manifest, Program},
    process::{MARK, Start, inside},
    spec::{AGENT_PORT, Kind, LEAD_PORT, Machine, Spec},
};

/// How long a cluster may be silent before its work is bound elsewhere.
const LEASE: &str = "3s";
/// The name of the certificate that the CLI uses.
pub(crate) const USER: &str = "admin";
/// The product's binaries that the lab starts, `weft` itself among them.
const BINARIES: [&str; 3] = ["weft", "weft-netmanager", "weft-cni"];

/// Checks that every binary is there, before anything is made.
pub(crate) fn check_binaries(dir: &Path) -> Result<(), LabError> {
    for name in BINARIES {
        if !dir.join(name).is_file() {
            return Err(LabError::NoBinary {
                name: name.to_owned(),
                dir: dir.to_owned(),
            });
        }
    }
    Ok(())
}

/// Makes the CA, every certificate and the agents' configuration; returns the programs, in starting order.
pub(crate) fn prepare(lab: &Lab, manifest: &Manifest) -> Result<Vec<Program>, LabError> {
    let spec = &manifest.spec;
    for dir in ["log", "config", "credentials"] {
        lab.folder(dir)?;
    }
    let ca = lab.path("ca").display().to_string();
    let mesh = format!("lab-{}", lab.id);
    weft(manifest, &["init", "--dir", &ca, "--mesh", &mesh])?;
    let certify = |role: &str, name: &str, cluster: Option<&str>, out: &str| {
        let out = credentials(lab, out);
        let mut arguments = vec!["cert", "--ca", &ca, "--role", role, "--name", name];
        arguments.extend(cluster.iter().flat_map(|cluster| ["--cluster", cluster]));
        arguments.extend(["--out", &out]);
        weft(manifest, &arguments)
    };
    certify("user", USER, None, USER)?;
    let mut programs = vec![Program {
        machine: "wan".to_owned(),
        command: words(&["weft", "lab", "wan", "--lab", &lab.id]),
    }];
    for machine in spec.machines() {
        let site = &machine.site.name;
        match machine.kind {
            Kind::Lead => certify("lead", &machine.site.lead, None, &machine.name)?,
            Kind::Agent => certify("agent", site, None, &machine.name)?,
            Kind::Node => certify("node", &machine.name, Some(site), &machine.name)?,
        }
    }
    for kind in [Kind::Lead, Kind::Agent, Kind::Node] {
        for machine in spec
            .machines()
            .iter()
            .filter(|machine| machine.kind == kind)
        {
            let command = match kind {
                Kind::Lead => lead(lab, spec, machine)?,
                Kind::Agent => agent(lab, manifest, machine)?,
                Kind::Node => node(lab, spec, machine)?,
            };
            programs.push(Program {
                machine: machine.name.clone(),
                command,
            });
        }
    }
    Ok(programs)
}

/// Starts a program in its machine, detached, with its log.
pub(crate) fn start(lab: &Lab, manifest: &Manifest, program: &Program) -> Result<(), LabError> {
    let (binary, arguments) = program
        .command
        .split_first()
        .expect("every program of the lab has a binary");
    Start {
        netns: lab.netns(&program.machine),
        program: manifest.binaries.join(binary),
        arguments,
        environment: &environment(lab, manifest),
        log: lab.path(format!("log/{}.log", program.machine)),
    }
    .detached()
}

/// What every process of the lab finds in its environment.
pub(crate) fn environment(lab: &Lab, manifest: &Manifest) -> Vec<(&'static str, String)> {
    let path = env::var("PATH").unwrap_or_default();
    vec![
        (MARK, lab.id.clone()),
        ("PATH", format!("{}:{path}", manifest.binaries.display())),
        ("WEFT_LEAD", lead_addresses(&manifest.spec).join(",")),
        ("WEFT_CREDENTIALS", credentials(lab, USER)),
    ]
}

/// Runs the CLI inside the first lead's machine and returns what it says.
pub(crate) fn ask(lab: &Lab, manifest: &Manifest, arguments: &[&str]) -> Result<String, LabError> {
    let machines = manifest.spec.machines();
    let lead = machines
        .iter()
        .find(|machine| machine.kind == Kind::Lead)
        .map_or("wan", |machine| machine.name.as_str());
    inside(&lab.netns(lead), || {
        let mut command = Command::new(manifest.binaries.join("weft"));
        command.args(arguments).envs(environment(lab, manifest));
        output(&mut command)
    })
}

fn weft(manifest: &Manifest, arguments: &[&str]) -> Result<(), LabError> {
    let mut command = Command::new(manifest.binaries.join("weft"));
    output(command.args(arguments)).map(drop)
}

fn output(command: &mut Command) -> Result<String, LabError> {
    let output = command.output().map_err(|source| LabError::Start {
        program: command.get_program().to_string_lossy().into_owned(),
        source,
    })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let arguments: Vec<_> = command
        .get_args()
        .map(|word| word.to_string_lossy())
        .collect();
    Err(LabError::Failed {
        what: format!("weft {}", arguments.join(" ")),
        stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

fn lead(lab: &Lab, spec: &Spec, machine: &Machine<'_>) -> Result<Vec<String>, LabError> {
    let own = format!("{}:{LEAD_PORT}", machine.address);
    let mesh = lab.path("ca/mesh.json");
    let data = lab.folder(format!("lead/{}", machine.site.lead))?;
    let mut command = words(&[
        "weft",
        "lead",
        "--name",
        &machine.site.lead,
        "--lease",
        LEASE,
    ]);
    command.extend(words(&["--data", &text(&data), "--mesh", &text(&mesh)]));
    command.extend(words(&["--credentials", &credentials(lab, &machine.name)]));
    command.extend(words(&["--listen", &own, "--advertise", &own]));
    for peer in spec
        .machines()
        .iter()
        .filter(|peer| peer.kind == Kind::Lead)
    {
        let peer = format!("{}={}:{LEAD_PORT}", peer.site.lead, peer.address);
        command.extend(words(&["--peer", &peer]));
    }
    Ok(command)
}

fn agent(lab: &Lab, manifest: &Manifest, machine: &Machine<'_>) -> Result<Vec<String>, LabError> {
    let (site, spec) = (machine.site, &manifest.spec);
    let config = lab.path(format!("config/{}.yaml", machine.name));
    let run_dir = lab.folder(format!("agent/{}/run", site.name))?;
    let facts = &site.facts;
    let nodes: Vec<_> = spec
        .machines()
        .iter()
        .filter(|node| node.kind == Kind::Node && node.site.number == site.number)
        .map(|node| {
            json!({
                "name": node.name,
                "netns": format!("/run/netns/{}", lab.netns(&node.name)),
                "cni_socket": socket(lab, &node.name),
                "cpu": facts.cpu.to_string(),
                "memory": format!("{}Gi", facts.memory_gib),
            })
        })
        .collect();
    // JSON is YAML.
    let content = json!({
        "cluster": site.name,
        "facts": {
            "tier": facts.tier,
            "region": facts.region,
            "cpu_price_ueur_h": facts.cpu_price_ueur_h,
            "memory_price_ueur_h": facts.memory_price_ueur_h,
            "egress_price_ueur_gib": facts.egress_price_ueur_gib,
            "cpu_power_mw": facts.cpu_power_mw,
            "carbon_g_kwh": facts.carbon_g_kwh,
        },
        "driver": { "local": {
            "run_dir": run_dir,
            "cni_plugin": manifest.binaries.join("weft-cni"),
            "nodes": nodes,
        } },
    });
    fs::write(&config, format!("{content:#}\n")).map_err(LabError::file(&config))?;
    let mut command = words(&["weft", "agent", "--config", &text(&config)]);
    command.extend(words(&["--credentials", &credentials(lab, &machine.name)]));
    for lead in lead_addresses(spec) {
        command.extend(words(&["--lead", &lead]));
    }
    let state = lab.folder(format!("agent/{}/state", site.name))?;
    let listen = format!("{}:{AGENT_PORT}", machine.address);
    command.extend(words(&["--listen", &listen, "--state", &text(&state)]));
    Ok(command)
}

fn node(lab: &Lab, spec: &Spec, machine: &Machine<'_>) -> Result<Vec<String>, LabError> {
    let agent = spec
        .machines()
        .iter()
        .find(|agent| agent.kind == Kind::Agent && agent.site.number == machine.site.number)
        .map(|agent| format!("{}:{AGENT_PORT}", agent.address))
        .expect("every site has an agent");
    let state = lab.folder(format!("node/{}/state", machine.name))?;
    let bpffs = lab.folder(format!("bpf/{}", machine.name))?;
    let [.., host] = machine.address.octets();
    // The sockets of userspace tunnels are one folder for the whole machine, so that the name is the lab's own.
    let device = format!("wl{}{}-{host}", lab.id, machine.site.number);
    let mut command = words(&["weft-netmanager", "run", "--node", &machine.name]);
    command.extend(words(&["--agent", &agent]));
    command.extend(words(&["--credentials", &credentials(lab, &machine.name)]));
    command.extend(words(&["--state", &text(&state), "--bpffs", &text(&bpffs)]));
    command.extend(words(&["--socket", &text(&socket(lab, &machine.name))]));
    command.extend(words(&["--underlay", &machine.address.to_string()]));
    command.extend(words(&["--tunnel-device", &device]));
    Ok(command)
}

/// Where a node's NetManager is asked for attachments.
pub(crate) fn socket(lab: &Lab, node: &str) -> PathBuf {
    lab.path(format!("node/{node}/cni.sock"))
}

fn credentials(lab: &Lab, name: &str) -> String {
    text(&lab.path(format!("credentials/{name}")))
}

fn lead_addresses(spec: &Spec) -> Vec<String> {
    spec.machines()
        .iter()
        .filter(|machine| machine.kind == Kind::Lead)
        .map(|machine| format!("{}:{LEAD_PORT}", machine.address))
        .collect()
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
