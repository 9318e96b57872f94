//! `weft backup`, `weft restore` and `weft lead recover`.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use ::http::Method;
use anyhow::{Context, bail};
use clap::Args;
use control_api::http::Restored;
use weft_lead::Recovery;

use crate::{
    client::{Ask, Leads},
    user::Common,
};

/// Writes all that the leads know into a file.
#[derive(Debug, Args)]
pub(crate) struct Backup {
    /// The file, which must not exist; only its owner may read it.
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    leads: Leads,
}

impl Backup {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let text = self.leads.ask_bytes(&Ask::get("/v1/backup"))?;
        let out = self.out.display();
        let text = std::str::from_utf8(&text).context("the lead's answer is not a backup")?;
        let (header, _) = control_core::backup::read(text).context("the answer is not sound")?;
        write_new(&self.out, text.as_bytes()).with_context(|| format!("failed to write {out}"))?;
        println!(
            "mesh {} up to entry {} is in {out}",
            header.mesh, header.index
        );
        Ok(())
    }
}

fn write_new(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let mut file = options.open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

/// Makes the mesh what a backup says: its applications and their addresses, in another incarnation.
#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// What weft backup wrote.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    #[command(flatten)]
    common: Common,
}

impl Restore {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let file = self.file.display();
        let body = fs::read(&self.file).with_context(|| format!("failed to read {file}"))?;
        let ask = Ask {
            method: Method::POST,
            content_type: "application/x-weft-backup",
            body: body.into(),
            ..Ask::get("/v1/restore")
        };
        let text = |restored: &Restored| {
            format!(
                "the mesh is what it was at entry {}, in incarnation {}: its agents resync, and what runs and is \
                 not in the backup is left alone",
                restored.backup_index, restored.incarnation
            )
        };
        let answer = self.common.answer(&ask, text);
        answer.with_context(|| format!("{file} was not restored"))
    }
}

/// Makes one stopped lead's data a group of their own, when a majority of the leads is lost for good.
#[derive(Debug, Args)]
pub(crate) struct Recover {
    /// The stopped lead's data.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Do it; without this it is only said what would be lost.
    #[arg(long)]
    accept_loss: bool,
}

/// What the loss of a majority means.
const RISK: &str = "\
what may be lost: every change that the lost leads acknowledged and this one had not received. Take the surviving \
lead with the highest term, and among those the highest entry.
what must never happen: that a lead with old data starts again. Two leads of the old group would elect a leader of \
their own, and the mesh would have two. Delete the data of every other lead before this one starts; then add them \
again with weft lead add.";

impl Recover {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let recovery = Recovery::open(self.data.clone())?;
        let found = recovery.survivor();
        println!(
            "lead {} (member {}) has term {}, entry {}, incarnation {}; its group was {}",
            found.name,
            found.id,
            found.term,
            found.index,
            found.incarnation,
            found.members.join(", ")
        );
        if !self.accept_loss {
            bail!("nothing was changed: read this, and repeat it with --accept-loss\n{RISK}");
        }
        let now = recovery.run()?;
        println!(
            "lead {} is a group of its own, in incarnation {}: start it as before\n{RISK}",
            now.name, now.incarnation
        );
        Ok(())
    }
}
