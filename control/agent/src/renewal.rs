//! The agent's own certificate, renewed while the agent runs.
//!
//! What a lead signed lasts for weeks and is renewed by a lead, with another key, when a third of its life is left, or as
//! soon as another authority signs than the one that vouches for it. What the authority itself signed is its operator's to
//! renew (`weft renew`). The authorities that the agent goes by stay as they are: no lead replaces them.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use control_api::join::{RenewDoorClient, RenewRequest};
use netmanager_api::identity::{Credentials, IdentityError, Shown};
use tokio::time::{sleep, timeout};
use tonic::Status;

use crate::{
    lead::{Lines, connect},
    request::KeyRequest,
};

/// How often the certificate is looked at.
const LOOK: Duration = Duration::from_secs(60);
/// How long it stays as it is once it was renewed, also where a lead still signs for the authority of before.
const RENEWED: Duration = Duration::from_secs(600);
/// How long a lead may take: it writes to the log.
const ANSWER: Duration = Duration::from_secs(20);
/// How often it is said that nobody renews.
const COMPLAIN: Duration = Duration::from_secs(3_600);

/// Renews the agent's certificate.
pub(crate) struct Renewal {
    pub(crate) credentials: Arc<Credentials>,
    pub(crate) leads: Vec<SocketAddr>,
    /// The way to them.
    pub(crate) lines: Arc<dyn Lines>,
}

/// Why a lead did not renew it.
#[derive(Debug, thiserror::Error)]
enum RenewalError {
    #[error("no key could be made")]
    Key(#[from] rcgen::Error),
    #[error("failed to connect")]
    Connect(#[from] tonic::transport::Error),
    #[error("the lead refused: {}", .0.message())]
    Refused(Box<Status>),
    #[error("the lead did not answer within {} s", ANSWER.as_secs())]
    Late,
    #[error("the new certificate does not serve")]
    Files(#[from] IdentityError),
}

/// Whether it is time: `is_of_who_signs` says whether the authority that signs now vouches for it.
fn is_due(shown: &Shown, is_of_who_signs: bool, now_ms: u64) -> bool {
    let lasts = shown.expires_ms.saturating_sub(shown.issued_ms);
    let is_late = now_ms >= shown.expires_ms.saturating_sub(lasts / 3);
    shown.is_signed_by_a_lead() && (is_late || !is_of_who_signs)
}

impl Renewal {
    /// Runs until it is dropped.
    pub(crate) async fn run(self) {
        let mut silent_for = Duration::ZERO;
        loop {
            let is_of_who_signs = self.credentials.is_of_who_signs();
            if is_due(&self.credentials.shown(), is_of_who_signs, now_ms()) {
                match self.renew().await {
                    Ok(()) => {
                        silent_for = Duration::ZERO;
                        sleep(RENEWED).await;
                    }
                    Err(failures) if silent_for.is_zero() => {
                        silent_for = COMPLAIN;
                        tracing::warn!(failures, "no lead renews the own certificate");
                    }
                    Err(_) => silent_for = silent_for.saturating_sub(LOOK),
                }
            }
            sleep(LOOK).await;
        }
    }

    /// Asks one lead after the other; why none renewed it.
    async fn renew(&self) -> Result<(), String> {
        let mut failures = Vec::new();
        for lead in &self.leads {
            match self.ask(*lead).await {
                Ok(()) => {
                    tracing::info!(%lead, "the own certificate is renewed");
                    return Ok(());
                }
                Err(error) => failures.push(format!("{lead}: {}", crate::lead::chain(&error))),
            }
        }
        Err(failures.join("; "))
    }

    async fn ask(&self, lead: SocketAddr) -> Result<(), RenewalError> {
        let wish = KeyRequest::new(&self.credentials.identity.to_string())?;
        let channel = connect(lead, self.lines.clone()).await?;
        let mut door = RenewDoorClient::new(channel);
        let request = RenewRequest {
            request: wish.request,
        };
        let answer = timeout(ANSWER, door.renew(request)).await;
        let answer = answer.map_err(|_| RenewalError::Late)?;
        let answer = answer.map_err(|status| RenewalError::Refused(Box::new(status)))?;
        let chain = answer.into_inner().chain;
        Ok(self.credentials.replace(chain.into(), wish.key.into())?)
    }
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    u64::try_from(now.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};
    use rustls_pki_types::CertificateDer;

    use super::*;

    const DAY_MS: u64 = 86_400_000;

    /// What is shown with these certificates; the first one's times are set by the case.
    fn shown(count: usize) -> Shown {
        let certificate = || {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, "x");
            let uri = "weft://m/agent/edge".try_into().unwrap();
            params.subject_alt_names = vec![SanType::URI(uri)];
            let key = KeyPair::generate().unwrap();
            params.self_signed(&key).unwrap().der().clone()
        };
        let chain: Vec<CertificateDer<'_>> = (0..count).map(|_| certificate()).collect();
        let mut shown = Shown::of_chain(&chain).unwrap();
        (shown.issued_ms, shown.expires_ms) = (100 * DAY_MS, 130 * DAY_MS);
        shown
    }

    #[test]
    fn what_a_lead_signed_is_renewed_in_its_last_third_or_for_another_authority() {
        let (by_lead, by_authority) = (shown(2), shown(1));
        for (day, is_of_who_signs, want) in [
            (100, true, false),
            (119, true, false),
            (120, true, true),
            (140, true, true),
            (100, false, true),
        ] {
            let now_ms = day * DAY_MS;
            assert_eq!(is_due(&by_lead, is_of_who_signs, now_ms), want, "{day}");
            assert!(!is_due(&by_authority, is_of_who_signs, now_ms), "{day}");
        }
    }
}
