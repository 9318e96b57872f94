//! `weft lab ...`: what a person, or the demo, can ask of labs.

use std::{
    env, fs, io,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use clap::{Args, Subcommand};
use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};

use crate::{
    attach,
    down::{self, Chosen},
    enter,
    error::LabError,
    folder::{Lab, Manifest, ids},
    machines, mesh,
    process::{self, Found},
    spec::Spec,
    status::{self, Format},
    wan,
};

/// A whole mesh on this machine, in network namespaces.
#[derive(Debug, Subcommand)]
pub enum LabCommand {
    /// Makes a lab of three clusters, starts the product in it and waits until all of it is ready.
    Up(Up),
    /// The labs there are.
    List,
    /// The processes of a lab, with their memory.
    Status {
        /// Which lab.
        #[command(flatten)]
        lab: Which,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Runs a command on a machine or in a pod of a lab.
    Exec {
        /// Which lab.
        #[command(flatten)]
        lab: Which,
        /// The machine (`edge-1`, `lead-a`, `router-fog`), an attached pod, or an instance
        /// (`namespace/application/service/number`).
        name: String,
        /// The command and its arguments; a shell when it is left out.
        #[arg(last = true)]
        command: Vec<String>,
    },
    /// Attaches a pod that no service counts on to a node, by the CNI plugin.
    Attach {
        /// Which lab.
        #[command(flatten)]
        lab: Which,
        /// The node.
        #[arg(long)]
        node: String,
        /// The pod's name, for `exec`.
        #[arg(long)]
        name: String,
    },
    /// Kills the processes of machines, at once and without mercy.
    Kill {
        /// Which lab.
        #[command(flatten)]
        lab: Which,
        /// The machines.
        #[arg(required = true)]
        machines: Vec<String>,
        /// Only processes with this word in their command line.
        #[arg(long)]
        only: Option<String>,
    },
    /// Starts the programs of machines again that do not run.
    Start {
        /// Which lab.
        #[command(flatten)]
        lab: Which,
        /// The machines.
        #[arg(required = true)]
        machines: Vec<String>,
    },
    /// Takes a lab down, and every lab whose maker was killed; nothing of them is left.
    Down {
        /// The lab; when it is left out the dead ones, or else the only one.
        #[arg(long)]
        lab: Option<String>,
        /// Every lab.
        #[arg(long, conflicts_with = "lab")]
        all: bool,
    },
    /// The WAN's forwarder, started by `up`.
    #[command(hide = true)]
    Wan {
        /// Which lab.
        #[command(flatten)]
        lab: Which,
    },
}

/// Which lab is meant.
#[derive(Clone, Debug, Args)]
pub struct Which {
    /// The lab's ID; may be left out when one is up.
    #[arg(long, env = process::MARK)]
    lab: Option<String>,
}

/// How a lab is made.
#[derive(Clone, Debug, Args)]
pub struct Up {
    /// The one-way delay between two sites, for instance `cloud-edge=15ms`.
    #[arg(long = "delay")]
    delays: Vec<String>,
    /// The process with whose end the lab is given up.
    #[arg(long)]
    owner: Option<i32>,
    /// The folder of the product's binaries; that of `weft` itself when it is left out.
    #[arg(long)]
    binaries: Option<PathBuf>,
    /// How long everything may take to be ready, seconds.
    #[arg(long, default_value_t = 60)]
    within: u64,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

impl LabCommand {
    /// Does what was asked; what it has to say goes to standard output.
    ///
    /// # Errors
    /// When the caller is not root, when a lab, machine or program is not there, and when the system refuses.
    pub fn run(self) -> Result<(), LabError> {
        if !nix::unistd::geteuid().is_root() {
            return Err(LabError::NotRoot);
        }
        match self {
            Self::Up(up) => up.run(),
            Self::List => list(),
            Self::Status { lab, json: true } => status::show(&lab.find()?, Format::Json),
            Self::Status { lab, json: false } => status::show(&lab.find()?, Format::Table),
            Self::Exec { lab, name, command } => enter::exec(&lab.find()?, &name, &command),
            Self::Attach { lab, node, name } => attach::attach(&lab.find()?, &node, &name),
            Self::Kill {
                lab,
                machines,
                only,
            } => down::kill_on(&lab.find()?, &machines, only.as_deref()),
            Self::Start { lab, machines } => start(&lab.find()?, &machines),
            Self::Down { lab: Some(id), .. } => down::down(Chosen::One(&id)),
            Self::Down { all: true, .. } => down::down(Chosen::All),
            Self::Down { .. } => down::down(Chosen::Only),
            Self::Wan { lab } => wan::run(&lab.find()?.id),
        }
    }
}

impl Which {
    fn find(&self) -> Result<Lab, LabError> {
        Lab::find(self.lab.as_deref())
    }
}

impl Up {
    fn run(&self) -> Result<(), LabError> {
        let mut spec = Spec::default();
        for delay in &self.delays {
            spec.set_delay(delay)?;
        }
        let binaries = match &self.binaries {
            Some(dir) => fs::canonicalize(dir).map_err(LabError::file(dir))?,
            None => own_folder()?,
        };
        mesh::check_binaries(&binaries)?;
        let own = i32::try_from(std::process::id()).ok();
        let mut manifest = Manifest {
            spec,
            owner: self.owner.or(own).and_then(process::of),
            binaries,
            programs: Vec::new(),
        };
        let lab = Lab::create(&manifest)?;
        let made = self.make(&lab, &mut manifest);
        if made.is_err() {
            // What went wrong first is what the caller must see.
            if let Err(error) = down::one(&lab) {
                tracing::warn!(lab = lab.id, %error, "failed to clean up");
            }
        }
        made
    }

    fn make(&self, lab: &Lab, manifest: &mut Manifest) -> Result<(), LabError> {
        machines::make(lab, &manifest.spec)?;
        let bpffs = lab.folder("bpf")?;
        mount(
            Some("bpf"),
            &bpffs,
            Some("bpf"),
            MsFlags::empty(),
            Some("mode=0700"),
        )
        .map_err(LabError::system(format!(
            "mount a bpffs on {}",
            bpffs.display()
        )))?;
        manifest.programs = mesh::prepare(lab, manifest)?;
        lab.write(manifest)?;
        for program in &manifest.programs {
            mesh::start(lab, manifest, program)?;
        }
        wait_ready(lab, manifest, Duration::from_secs(self.within))?;
        if self.owner.is_none() {
            manifest.owner = None;
            lab.write(manifest)?;
        }
        if self.json {
            println!("{}", json!({ "lab": lab.id, "dir": lab.dir }));
        } else {
            println!(
                "lab {} is up; look: weft lab status --lab {}",
                lab.id, lab.id
            );
        }
        Ok(())
    }
}

/// The folder that this program is in.
fn own_folder() -> Result<PathBuf, LabError> {
    let own = env::current_exe().map_err(LabError::file("/proc/self/exe"))?;
    own.parent()
        .map(ToOwned::to_owned)
        .ok_or_else(|| LabError::file(own.clone())(io::Error::other("the program is in no folder")))
}

/// Waits until every cluster and node is ready, as the leads see it.
fn wait_ready(lab: &Lab, manifest: &Manifest, within: Duration) -> Result<(), LabError> {
    let start = Instant::now();
    loop {
        let missing = match missing(lab, manifest) {
            Ok(None) => return Ok(()),
            Ok(Some(missing)) => missing,
            Err(error) => error.to_string(),
        };
        if start.elapsed() > within {
            return Err(LabError::NotReady {
                id: lab.id.clone(),
                seconds: within.as_secs(),
                missing,
                logs: status::last_words(lab, manifest),
            });
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// What is not ready yet, in words.
fn missing(lab: &Lab, manifest: &Manifest) -> Result<Option<String>, LabError> {
    let answer = mesh::ask(lab, manifest, &["get", "nodes", "-o", "json"])?;
    let answer: Value = serde_json::from_str(&answer).map_err(|source| LabError::Manifest {
        path: "weft get nodes -o json".into(),
        source,
    })?;
    let nodes = answer["items"].as_array().map_or(&[][..], Vec::as_slice);
    let wanted: usize = manifest
        .spec
        .sites
        .iter()
        .map(|site| usize::from(site.nodes))
        .sum();
    let ready = nodes.iter().filter(|node| node["ready"] == true).count();
    Ok((ready < wanted).then(|| format!("{ready} of {wanted} nodes are ready")))
}

fn list() -> Result<(), LabError> {
    for lab in Lab::all()? {
        let state = if lab.is_dead() { "dead" } else { "up" };
        let processes = process::of_lab(&lab).len();
        println!("{}  {state}  {processes} processes", lab.id);
    }
    Ok(())
}

fn start(lab: &Lab, machines: &[String]) -> Result<(), LabError> {
    let manifest = lab.manifest()?;
    let running = process::of_lab(lab);
    for machine in machines {
        let mut known = manifest
            .programs
            .iter()
            .filter(|program| program.machine == *machine)
            .peekable();
        if known.peek().is_none() {
            let names: Vec<_> = manifest
                .programs
                .iter()
                .map(|p| p.machine.as_str())
                .collect();
            return Err(LabError::NoMachine {
                id: lab.id.clone(),
                name: machine.clone(),
                known: names.join(", "),
            });
        }
        for program in known {
            let runs = |found: &Found| {
                found.machine.as_ref() == Some(machine) && found.runs(&program.command)
            };
            if !running.iter().any(runs) {
                mesh::start(lab, &manifest, program)?;
            }
        }
    }
    Ok(())
}

/// The labs of which one is meant, for an error.
pub(crate) fn ambiguous(labs: &[Lab]) -> LabError {
    LabError::WhichLab {
        count: labs.len(),
        ids: ids(labs),
    }
}
