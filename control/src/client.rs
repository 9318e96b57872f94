//! Asking the control API: the given leads in turn, until one answers.

use std::{
    collections::BTreeSet, fmt::Write, fs, net::SocketAddr, path::PathBuf, sync::Arc,
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use bytes::Bytes;
use clap::Args;
use control_api::http::Problem;
use http::{HeaderValue, Method, Request, StatusCode, header::AUTHORIZATION};
use netmanager_api::identity::{
    Credentials, Role, check_secret_mode, client_without_certificate, fingerprints_of_file,
};
use rustls::ClientConfig;
use serde::de::DeserializeOwned;
use tokio::time::timeout;
use weft_lead::dial::{dial_by, exchange};

/// How long one lead may take; longer than it looks for a leader and waits for the plan.
const ANSWER: Duration = Duration::from_secs(20);

/// How the leads are reached.
#[derive(Clone, Debug, Args)]
pub(crate) struct Leads {
    /// A lead's address; several are tried in turn.
    #[arg(
        long = "lead",
        value_name = "IP:PORT",
        env = "WEFT_LEAD",
        value_delimiter = ',',
        required = true
    )]
    leads: Vec<SocketAddr>,
    /// The folder with tls.crt, tls.key and ca.crt, role user.
    #[arg(
        long,
        value_name = "DIR",
        env = "WEFT_CREDENTIALS",
        required_unless_present = "token"
    )]
    credentials: Option<PathBuf>,
    /// A file with a token, in the place of a certificate; --lead is where the leads take tokens then.
    #[arg(long, value_name = "FILE", env = "WEFT_TOKEN", requires = "ca")]
    token: Option<PathBuf>,
    /// The mesh's ca.crt, for a token.
    #[arg(long, value_name = "FILE", env = "WEFT_CA")]
    ca: Option<PathBuf>,
}

/// How a lead is told who asks.
struct Proof {
    tls: Arc<ClientConfig>,
    /// The value of the header `Authorization`.
    bearer: Option<HeaderValue>,
}

/// The key of a change: asked again with the same one, it is carried out once.
#[derive(Debug, Args)]
pub(crate) struct Once {
    /// A key of this change's own, up to 64 characters: repeat it to ask again without doing it again.
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
}

impl Once {
    pub(crate) fn key(&self) -> Option<String> {
        self.idempotency_key.clone()
    }
}

/// A request for any lead.
pub(crate) struct Ask<'a> {
    pub(crate) method: Method,
    pub(crate) path: &'a str,
    pub(crate) content_type: &'static str,
    pub(crate) body: Bytes,
    /// The idempotency key of a change.
    pub(crate) key: Option<String>,
}

impl<'a> Ask<'a> {
    /// A GET.
    pub(crate) fn get(path: &'a str) -> Self {
        Self {
            method: Method::GET,
            path,
            content_type: "application/json",
            body: Bytes::new(),
            key: None,
        }
    }
}

/// A lead's refusal: what was asked for was not done.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Refused(String);

impl Leads {
    /// Asks the leads in turn and reads the answer of the first that gives one.
    pub(crate) fn ask<T: DeserializeOwned>(&self, ask: &Ask<'_>) -> anyhow::Result<T> {
        serde_json::from_slice(&self.ask_bytes(ask)?)
            .context("the lead's answer cannot be read: is it another version?")
    }

    /// Asks the leads in turn; the answer of the first that gives one, as it is.
    pub(crate) fn ask_bytes(&self, ask: &Ask<'_>) -> anyhow::Result<Bytes> {
        let proof = self.proof()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("failed to start the runtime")?;
        runtime.block_on(self.in_turn(&proof, ask))
    }

    /// The authorities that count for who asks, by their SHA-256.
    pub(crate) fn authorities(&self) -> anyhow::Result<BTreeSet<String>> {
        let path = match (&self.token, &self.ca, &self.credentials) {
            (Some(_), Some(ca), _) => ca.clone(),
            (_, _, Some(dir)) => dir.join("ca.crt"),
            _ => bail!("who asks? --credentials, or --token and --ca"),
        };
        let prints = fingerprints_of_file(&path)
            .with_context(|| format!("{} does not serve as the CA", path.display()))?;
        Ok(prints.into_iter().collect())
    }

    fn proof(&self) -> anyhow::Result<Proof> {
        let is_lead = |role: &Role| matches!(role, Role::Lead { .. });
        if let (Some(token), Some(ca)) = (&self.token, &self.ca) {
            let bad = || format!("the token in {} does not serve", token.display());
            check_secret_mode(token).with_context(bad)?;
            let text = fs::read_to_string(token).with_context(bad)?;
            let mut bearer =
                HeaderValue::from_str(&format!("Bearer {}", text.trim())).with_context(bad)?;
            bearer.set_sensitive(true);
            let tls = client_without_certificate(ca, &[b"h2"], is_lead)
                .with_context(|| format!("{} does not serve as the CA", ca.display()))?;
            return Ok(Proof {
                tls,
                bearer: Some(bearer),
            });
        }
        let dir = self.credentials.as_ref();
        let dir = dir.context("who asks? --credentials, or --token and --ca")?;
        let tls = Credentials::load(dir)
            .and_then(|credentials| credentials.client(&[b"h2"], is_lead))
            .with_context(|| format!("the credentials in {} do not serve", dir.display()))?;
        Ok(Proof { tls, bearer: None })
    }

    async fn in_turn(&self, proof: &Proof, ask: &Ask<'_>) -> anyhow::Result<Bytes> {
        let mut failures = String::new();
        for lead in &self.leads {
            match one(*lead, proof, ask).await {
                Ok((status, body)) if status.is_success() => return Ok(body),
                Ok((StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS, body)) => {
                    write!(failures, "\n  lead {lead}: {}", problem(&body))?;
                }
                // A lead that failed to answer before may have done it.
                Ok((status, body)) if status.is_client_error() && failures.is_empty() => {
                    return Err(Refused(problem(&body)).into());
                }
                Ok((_, body)) => bail!("{}", problem(&body)),
                Err(error) => write!(failures, "\n  lead {lead}: {error:#}")?,
            }
        }
        bail!("no lead served the request:{failures}")
    }
}

async fn one(
    lead: SocketAddr,
    proof: &Proof,
    ask: &Ask<'_>,
) -> anyhow::Result<(StatusCode, Bytes)> {
    let channel = dial_by(proof.tls.clone(), lead);
    let mut request = Request::builder()
        .method(&ask.method)
        .uri(ask.path)
        .header("content-type", ask.content_type);
    if let Some(key) = &ask.key {
        request = request.header("idempotency-key", key);
    }
    if let Some(bearer) = &proof.bearer {
        request = request.header(AUTHORIZATION, bearer);
    }
    let request = request.body(ask.body.clone())?;
    match timeout(ANSWER, exchange(channel, request)).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(anyhow!(
            "failed to reach it: {}",
            anyhow!(error).root_cause()
        )),
        Err(_) => bail!("no answer within {ANSWER:?}"),
    }
}

/// A problem as people read it.
fn problem(body: &[u8]) -> String {
    match serde_json::from_slice::<Problem>(body) {
        Ok(problem) => lines(&problem),
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    }
}

fn lines(problem: &Problem) -> String {
    let mut text = String::new();
    if let Some(line) = problem.line {
        text += &format!("line {line}: ");
    }
    if let Some(field) = &problem.field {
        text += &format!("{field}: ");
    }
    text += &problem.error;
    if let Some(hint) = &problem.hint {
        text += &format!(" ({hint})");
    }
    for more in &problem.more {
        text += &format!("\n{}", lines(more));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_reads_as_lines_with_the_place_and_the_way_out() {
        let body = br#"{"error":"unknown unit","field":"spec.cpu","line":3,"hint":"use m","more":[{"error":"also"}]}"#;
        assert_eq!(
            problem(body),
            "line 3: spec.cpu: unknown unit (use m)\nalso"
        );
        assert_eq!(problem(b"upstream failure"), "upstream failure");
    }
}
