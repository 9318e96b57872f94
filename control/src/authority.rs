//! `weft init`, `weft cert`, `weft renew` and `weft authority`.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::{Args, Subcommand, ValueEnum};
use ipnet::{Ipv4Net, Ipv6Net};
use netmanager_api::identity::{Access, Role};
use weft_lead::authority::{self, DEFAULT_PREFIX4, Wish, rotation};

/// Makes a mesh.
#[derive(Debug, Args)]
pub(crate) struct Init {
    /// Where the authority's key, its certificate and the mesh file go.
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// The mesh's name.
    #[arg(long, value_name = "NAME")]
    mesh: String,
    /// The mesh's IPv4 space, /12 to /16.
    #[arg(long, value_name = "PREFIX", default_value_t = DEFAULT_PREFIX4)]
    prefix4: Ipv4Net,
    /// The mesh has no IPv4.
    #[arg(long, conflicts_with = "prefix4")]
    no_ipv4: bool,
    /// The mesh's ULA /48; random when it is left out.
    #[arg(long, value_name = "PREFIX")]
    prefix6: Option<Ipv6Net>,
}

impl Init {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let wish = Wish {
            name: self.mesh,
            prefix4: (!self.no_ipv4).then_some(self.prefix4),
            prefix6: self.prefix6,
        };
        let mesh = authority::init(&self.dir, &wish)?;
        let prefix4 = mesh.prefix4.map(|prefix| format!(" and {prefix}"));
        let dir = self.dir.display();
        println!(
            "mesh {} has {}{}; its authority and mesh.json are in {dir} (keep {dir}/ca.key safe)",
            mesh.name,
            mesh.prefix6,
            prefix4.unwrap_or_default(),
        );
        Ok(())
    }
}

/// What a certificate's holder may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum RoleKind {
    Lead,
    Agent,
    Node,
    User,
}

/// Issues a certificate.
#[derive(Debug, Args)]
pub(crate) struct Cert {
    /// The folder that `weft init` made.
    #[arg(long, value_name = "DIR")]
    ca: PathBuf,
    /// What the holder may be.
    #[arg(long, value_enum)]
    role: RoleKind,
    /// The lead's, node's or user's name; of an agent the cluster's.
    #[arg(long, value_name = "NAME")]
    name: String,
    /// The cluster of a node.
    #[arg(long, value_name = "CLUSTER", required_if_eq("role", "node"))]
    cluster: Option<String>,
    /// What a user may do: viewer, deployer/NAMESPACE[/NAMESPACE...] or admin.
    #[arg(long, value_name = "ACCESS", default_value_t = Access::Admin)]
    access: Access,
    /// Lets a lead sign certificates of agents, for clusters that join by a token: issuer.crt and issuer.key, beside its
    /// own certificate, which is issued, too, where there is none.
    #[arg(long)]
    issuer: bool,
    /// Where tls.crt, tls.key and ca.crt go.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

impl Cert {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let name = self.name;
        if self.issuer {
            ensure!(
                self.role == RoleKind::Lead,
                "--issuer is for --role lead: only leads sign for the authority"
            );
            let identity = authority::delegate(&self.ca, &name, &self.out)?;
            println!(
                "{identity} is in {}, and signs certificates of agents",
                self.out.display()
            );
            return Ok(());
        }
        let role = match self.role {
            RoleKind::Lead => Role::Lead { name },
            RoleKind::User => Role::User {
                name,
                access: self.access,
            },
            RoleKind::Agent => Role::Agent {
                cluster: self.cluster.unwrap_or(name),
            },
            RoleKind::Node => Role::Node {
                cluster: self.cluster.context("--cluster is missing")?,
                node: name,
            },
        };
        let identity = authority::issue(&self.ca, role, &self.out)?;
        println!("{identity} is in {}", self.out.display());
        Ok(())
    }
}

/// Issues new certificates to their holders.
#[derive(Debug, Args)]
pub(crate) struct Renew {
    /// The folder that `weft init` made.
    #[arg(long, value_name = "DIR")]
    ca: PathBuf,
    /// Folders that `weft cert` made: tls.crt, tls.key and ca.crt are replaced, whoever runs with them takes them in seconds.
    #[arg(required = true, value_name = "DIR")]
    folders: Vec<PathBuf>,
}

impl Renew {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        for folder in &self.folders {
            let identity = rotation::renew(&self.ca, folder)?;
            println!("{identity} in {} is new", folder.display());
        }
        Ok(())
    }
}

/// Puts another authority in the place of the mesh's, without an interruption.
#[derive(Debug, Subcommand)]
pub(crate) enum Authority {
    /// Makes the next authority, which counts from now on.
    Prepare(Folder),
    /// Lets the next authority sign, and deletes the old one's key.
    Switch(Folder),
    /// Lets the old authority count no more.
    Retire(Folder),
}

/// Where the authority is.
#[derive(Debug, Args)]
pub(crate) struct Folder {
    /// The folder that `weft init` made.
    #[arg(long, value_name = "DIR")]
    ca: PathBuf,
}

impl Authority {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let (step, folder, next): (fn(&Path) -> _, _, _) = match self {
            Self::Prepare(folder) => (
                rotation::prepare,
                folder,
                "copy it to every folder of a lead, agent, node and user, then: weft authority switch",
            ),
            Self::Switch(folder) => (
                rotation::switch,
                folder,
                "every certificate is to be issued anew (weft renew), then: weft authority retire",
            ),
            Self::Retire(folder) => (
                rotation::retire,
                folder,
                "copy it to every folder of a lead, agent, node and user",
            ),
        };
        step(&folder.ca)?;
        println!("{} is new: {next}", folder.ca.join("ca.crt").display());
        Ok(())
    }
}
