//! `weft token`, `weft certificate` and `weft audit`.

use std::{
    fs::OpenOptions,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use ::http::Method;
use anyhow::Context;
use clap::{Args, Subcommand};
use control_api::http::{
    AuditEntry, Changed, Revocation, RevocationRequest, Token as Shown, TokenRequest,
};
use control_core::name::Name;
use netmanager_api::identity::{Access, Shown as Certificate, fingerprint};
use weft_lead::authority;

use crate::{
    client::{Ask, Refused},
    show,
    user::Common,
};

/// Bytes of a token's secret.
const SECRET: usize = 32;

/// Tokens for the control API, for tools that cannot have a certificate.
#[derive(Debug, Subcommand)]
pub(crate) enum Token {
    /// Makes a token; its file is the only place where its secret is.
    Create(Create),
    /// Lists the tokens that count.
    List(List),
    /// Takes a token back.
    Revoke(Revoke),
}

impl Token {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Create(create) => create.run(),
            Self::List(list) => list
                .common
                .answer(&Ask::get("/v1/tokens"), show::list::<Shown>),
            Self::Revoke(revoke) => revoke.run(),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct List {
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Its name, in the audit log.
    name: Name,
    /// What its holder may do: viewer, deployer/NAMESPACE[/NAMESPACE...] or admin.
    #[arg(long, value_name = "ACCESS")]
    access: Access,
    /// How long it lasts.
    #[arg(long, value_name = "DAYS", default_value_t = 30)]
    days: u64,
    /// Where the token goes; the file must not exist, and only its owner may read it.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    common: Common,
}

impl Create {
    fn run(self) -> anyhow::Result<()> {
        let secret = random_secret()?;
        let request = TokenRequest {
            name: self.name.to_string(),
            hash: fingerprint(secret.as_bytes()),
            access: self.access.to_string(),
            days: self.days,
        };
        let out = self.out.display();
        // Written first: a token whose secret nobody has would stand in the way of its name.
        write_new(&self.out, &format!("{}.{secret}\n", self.name))
            .with_context(|| format!("failed to write {out}"))?;
        let ask = Ask {
            method: Method::POST,
            body: serde_json::to_vec(&request)?.into(),
            ..Ask::get("/v1/tokens")
        };
        let text = |_: &Changed| {
            let (name, access, days) = (&self.name, &self.access, self.days);
            format!("token {name} ({access}, {days} days) is in {out}")
        };
        self.common.answer(&ask, text).map_err(|error| {
            if error.is::<Refused>() {
                // It is no token; that the file stays is no harm.
                let _ = std::fs::remove_file(&self.out);
                return error;
            }
            error.context(format!(
                "whether token {} counts is not known (weft token list says); it is in {out}",
                self.name
            ))
        })
    }
}

/// A secret that nobody can guess, in hexadecimal digits.
pub(crate) fn random_secret() -> anyhow::Result<String> {
    let secret = authority::random::<SECRET>()?;
    Ok(secret.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn write_new(path: &Path, content: &str) -> std::io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    options.open(path)?.write_all(content.as_bytes())
}

#[derive(Debug, Args)]
pub(crate) struct Revoke {
    /// Its name.
    name: Name,
    #[command(flatten)]
    common: Common,
}

impl Revoke {
    fn run(self) -> anyhow::Result<()> {
        let path = format!("/v1/tokens/{}", self.name);
        let ask = Ask {
            method: Method::DELETE,
            ..Ask::get(&path)
        };
        let text = |changed: &Changed| match changed.changed {
            true => format!("token {} counts no more", self.name),
            false => format!("there was no token {}", self.name),
        };
        self.common.answer(&ask, text)
    }
}

/// Certificates that count no more.
#[derive(Debug, Subcommand)]
pub(crate) enum Certificates {
    /// Revokes certificates: all that a holder was issued until now, or one.
    Revoke(RevokeCertificate),
    /// Lists what is revoked.
    List(List),
}

impl Certificates {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Revoke(revoke) => revoke.run(),
            Self::List(list) => list
                .common
                .answer(&Ask::get("/v1/revocations"), show::list::<Revocation>),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct RevokeCertificate {
    /// Whose: as in weft://MESH/node/CLUSTER/NODE. All that were issued until now; a new one counts.
    #[arg(required_unless_present = "file")]
    holder: Option<String>,
    /// Only the certificate in this file (a tls.crt).
    #[arg(long, value_name = "FILE", conflicts_with = "holder")]
    file: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

impl RevokeCertificate {
    fn run(self) -> anyhow::Result<()> {
        let request = match (&self.file, self.holder) {
            (Some(file), _) => {
                let certificate = Certificate::of_file(file)
                    .with_context(|| format!("{} is no certificate", file.display()))?;
                RevocationRequest {
                    holder: certificate.identity.to_string(),
                    certificate: Some(certificate.fingerprint),
                }
            }
            (None, holder) => RevocationRequest {
                holder: holder.context("whose certificates? name the holder, or --file")?,
                certificate: None,
            },
        };
        let ask = Ask {
            method: Method::POST,
            body: serde_json::to_vec(&request)?.into(),
            ..Ask::get("/v1/revocations")
        };
        let text = |_: &Changed| match &request.certificate {
            Some(certificate) => {
                format!("certificate {certificate} of {} is revoked", request.holder)
            }
            None => format!(
                "what {} was issued until now is revoked: weft cert issues another",
                request.holder
            ),
        };
        self.common.answer(&ask, text)
    }
}

/// Shows who changed what.
#[derive(Debug, Args)]
pub(crate) struct Audit {
    /// How many changes, the newest first.
    #[arg(long, value_name = "COUNT", default_value_t = 100)]
    limit: usize,
    #[command(flatten)]
    common: Common,
}

impl Audit {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let path = format!("/v1/audit?limit={}", self.limit);
        self.common
            .answer(&Ask::get(&path), show::list::<AuditEntry>)
    }
}
