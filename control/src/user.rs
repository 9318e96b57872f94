//! `weft apply`, `get`, `explain`, `delete`, `migrate` and `status`.

use std::{
    fs,
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use ::http::Method;
use anyhow::Context;
use bytes::Bytes;
use clap::{Args, ValueEnum};
use control_api::http::{self, Changed, MigrationRequest};
use control_core::name::{AppName, Name, NameError, ServiceName, Slot};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    client::{Ask, Leads, Once},
    show::{self, Rows},
};

/// How an answer is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people.
    Table,
    /// As the API gave it.
    Json,
}

/// Where to ask and how to answer.
#[derive(Debug, Args)]
pub(crate) struct Common {
    #[command(flatten)]
    pub(crate) leads: Leads,
    /// How the answer is written.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

impl Common {
    /// Asks, and writes the answer as JSON, or as `text` makes it.
    pub(crate) fn answer<T: Serialize + DeserializeOwned>(
        &self,
        ask: &Ask<'_>,
        text: impl FnOnce(&T) -> String,
    ) -> anyhow::Result<()> {
        self.write(&self.leads.ask(ask)?, text)
    }

    /// Writes an answer as JSON, or as `text` makes it.
    pub(crate) fn write<T: Serialize>(
        &self,
        answer: &T,
        text: impl FnOnce(&T) -> String,
    ) -> anyhow::Result<()> {
        let text = match self.output {
            Format::Json => serde_json::to_string_pretty(answer)?,
            Format::Table => text(answer),
        };
        match writeln!(io::stdout(), "{text}") {
            // Whoever reads has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            written => written.context("failed to write the answer"),
        }
    }
}

/// Applies a goal file.
#[derive(Debug, Args)]
pub(crate) struct Apply {
    /// The goal file; `-` is standard input.
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Only say what would happen.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    once: Once,
    #[command(flatten)]
    common: Common,
}

impl Apply {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let goal = read(&self.file)?;
        let ask = Ask {
            method: Method::POST,
            path: &format!("/v1/applications?dry_run={}", self.dry_run),
            content_type: "application/yaml",
            body: Bytes::from(goal),
            key: self.once.key(),
        };
        let answer = self.common.answer(&ask, show::applied);
        answer.with_context(|| format!("{} was not applied", self.file.display()))
    }
}

fn read(file: &Path) -> anyhow::Result<String> {
    if file == Path::new("-") {
        let mut text = String::new();
        io::stdin()
            .read_to_string(&mut text)
            .context("failed to read standard input")?;
        return Ok(text);
    }
    fs::read_to_string(file).with_context(|| format!("failed to read {}", file.display()))
}

/// What can be listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    #[value(alias = "application", alias = "apps", alias = "app")]
    Applications,
    #[value(alias = "service", alias = "svc")]
    Services,
    #[value(alias = "binding")]
    Bindings,
    #[value(alias = "cluster")]
    Clusters,
    #[value(alias = "node")]
    Nodes,
    #[value(alias = "migration")]
    Migrations,
}

/// Lists things of one kind.
#[derive(Debug, Args)]
pub(crate) struct Get {
    /// Of which kind.
    #[arg(value_enum, default_value = "applications")]
    kind: Kind,
    /// Answer without a leader, from what the asked lead knows.
    #[arg(long)]
    stale: bool,
    #[command(flatten)]
    common: Common,
}

impl Get {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self.kind {
            Kind::Applications => self.list::<http::Application>("applications"),
            Kind::Services => self.list::<http::Service>("services"),
            Kind::Bindings => self.list::<http::Binding>("bindings"),
            Kind::Clusters => self.list::<http::Cluster>("clusters"),
            Kind::Nodes => self.list::<http::Node>("nodes"),
            Kind::Migrations => self.list::<http::Migration>("migrations"),
        }
    }

    fn list<T: Rows + Serialize + DeserializeOwned>(&self, kind: &str) -> anyhow::Result<()> {
        let path = format!("/v1/{kind}?consistent={}", !self.stale);
        self.common.answer(&Ask::get(&path), show::list::<T>)
    }
}

/// Says why a service is where it is.
#[derive(Debug, Args)]
pub(crate) struct Explain {
    /// namespace/application/service.
    service: ServiceName,
    #[command(flatten)]
    common: Common,
}

impl Explain {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let path = format!("/v1/explain/{}", self.service);
        self.common.answer(&Ask::get(&path), show::explained)
    }
}

/// Deletes an application.
#[derive(Debug, Args)]
pub(crate) struct Delete {
    /// namespace/application.
    application: AppName,
    #[command(flatten)]
    once: Once,
    #[command(flatten)]
    common: Common,
}

impl Delete {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let path = format!("/v1/applications/{}", self.application);
        let ask = Ask {
            method: Method::DELETE,
            key: self.once.key(),
            ..Ask::get(&path)
        };
        let text = |_: &Changed| {
            format!(
                "{} is deleted; its instances drain and stop",
                self.application
            )
        };
        self.common.answer(&ask, text)
    }
}

/// Moves a slot to another cluster.
#[derive(Debug, Args)]
pub(crate) struct Migrate {
    /// namespace/application/service/N, N being the slot's number.
    #[arg(value_parser = slot)]
    slot: Slot,
    /// The cluster that it shall go to.
    #[arg(long, value_name = "CLUSTER")]
    to: Name,
    #[command(flatten)]
    once: Once,
    #[command(flatten)]
    common: Common,
}

impl Migrate {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let request = MigrationRequest {
            slot: self.slot.to_string(),
            to: self.to.to_string(),
        };
        let ask = Ask {
            method: Method::POST,
            body: serde_json::to_vec(&request)?.into(),
            key: self.once.key(),
            ..Ask::get("/v1/migrations")
        };
        let text = |_: &Changed| format!("{} moves to {}: weft get migrations", self.slot, self.to);
        self.common.answer(&ask, text)
    }
}

/// Reads `a/b/c/0`, or `a/b/c#0` as the API writes it.
fn slot(text: &str) -> Result<Slot, NameError> {
    match text.rsplit_once('/') {
        Some((service, number)) if service.matches('/').count() == 2 => {
            format!("{service}#{number}").parse()
        }
        _ => text.parse(),
    }
}

/// Says how the leads are.
#[derive(Debug, Args)]
pub(crate) struct Status {
    #[command(flatten)]
    common: Common,
}

impl Status {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        self.common.answer(&Ask::get("/v1/status"), show::status)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_may_be_written_as_a_path() {
        for text in ["a/b/c/0", "a/b/c#0"] {
            assert_eq!(slot(text).map(String::from), Ok("a/b/c#0".to_owned()));
        }
        for text in ["a/b/c", "a/b/0", "a/b/c/x", "a/b/c/d/0", "a/../c/0"] {
            assert!(slot(text).is_err(), "{text}");
        }
    }
}
