//! The key, the certificate and the authorities that a process holds, and what takes their place while it runs.
//!
//! ```text
//!  DIR/tls.crt tls.key ca.crt --every few seconds--> the same twice? serves? --> Current
//!                                                                  '--> every new handshake, both sides
//!                                                                  '--> Guarded: who an authority that left vouched for
//! ```
//!
//! So a certificate is renewed, and the mesh's authority replaced, without a restart and without a connection less. Files
//! are replaced one after the other: what does not belong together is not taken, and what served goes on.

#[cfg(test)]
pub(super) mod tests;

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rustls::{
    RootCertStore, SignatureScheme,
    client::{ResolvesClientCert, WebPkiServerVerifier},
    server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier, danger::ClientCertVerifier},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject};
use tokio::time::{Instant, sleep};

use super::{
    Identity, IdentityError, Shown, file_error,
    files::{self, Files},
    fingerprint, provider, verify,
};

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(2);
/// How long before its end a certificate is complained of, and how often.
const SOON: Duration = Duration::from_secs(30 * DAY.as_secs());
/// The same of one that a lead signed: its holder renews it when ten days are left.
const SOON_BY_LEAD: Duration = Duration::from_secs(7 * DAY.as_secs());
const DAY: Duration = Duration::from_secs(86_400);

/// What handshakes use from now on.
pub(super) struct Current {
    files: Files,
    own: Arc<CertifiedKey>,
    shown: Shown,
    /// Fingerprints.
    pub(super) authorities: Vec<String>,
    /// The own chain, and the authorities behind it.
    introducing: Arc<CertifiedKey>,
    pub(super) clients: Arc<dyn ClientCertVerifier>,
    pub(super) servers: Arc<WebPkiServerVerifier>,
}

impl Current {
    pub(super) fn of(files: Files, dir: &Path) -> Result<Self, IdentityError> {
        let certificates = |name: &str, bytes: &[u8]| {
            CertificateDer::pem_slice_iter(bytes)
                .collect::<Result<Vec<_>, _>>()
                .map_err(|source| file_error(&dir.join(name), source))
        };
        let chain = certificates("tls.crt", &files.chain)?;
        let key = PrivateKeyDer::from_pem_slice(&files.key)
            .map_err(|source| file_error(&dir.join("tls.key"), source))?;
        let mut roots = RootCertStore::empty();
        let mut authorities = Vec::new();
        let mut introduction = chain.clone();
        for certificate in certificates("ca.crt", &files.authorities)? {
            authorities.push(fingerprint(&certificate));
            introduction.push(certificate.clone());
            roots.add(certificate).map_err(IdentityError::Tls)?;
        }
        let shown = Shown::of_chain(&chain)?;
        let own = CertifiedKey::from_der(chain, key, &provider()).map_err(IdentityError::Tls)?;
        let introducing = CertifiedKey::new(introduction, own.key.clone());
        let roots = Arc::new(roots);
        let failed = |error: &dyn fmt::Display| IdentityError::Authority(error.to_string());
        let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider())
            .build()
            .map_err(|error| failed(&error))?;
        let servers = WebPkiServerVerifier::builder_with_provider(roots, provider())
            .build()
            .map_err(|error| failed(&error))?;
        Ok(Self {
            files,
            own: Arc::new(own),
            shown,
            authorities,
            introducing: Arc::new(introducing),
            clients,
            servers,
        })
    }

    /// Whether the authorities vouch for who showed this chain.
    pub(super) fn vouch_for(&self, chain: &[CertificateDer<'_>]) -> Result<(), rustls::Error> {
        let Some((certificate, others)) = chain.split_first() else {
            return Err(rustls::Error::NoCertificatesPresented);
        };
        let by = |others: &[CertificateDer<'_>]| {
            self.clients
                .verify_client_cert(certificate, others, UnixTime::now())
        };
        verify::vouched(certificate, others, by).map(drop)
    }

    pub(super) fn shown(&self) -> &Shown {
        &self.shown
    }

    /// Whether the first authority alone vouches for the own certificate.
    pub(super) fn is_of_who_signs(&self) -> bool {
        let Some(first) = self.introducing.cert.get(self.own.cert.len()) else {
            return false;
        };
        let mut roots = RootCertStore::empty();
        let Some((own, others)) = self.own.cert.split_first() else {
            return false;
        };
        if roots.add(first.clone()).is_err() {
            return false;
        }
        let by_first = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
        let Ok(by_first) = by_first.build() else {
            return false;
        };
        let by = |others: &[CertificateDer<'_>]| {
            by_first.verify_client_cert(own, others, UnixTime::now())
        };
        verify::vouched(own, others, by).is_ok()
    }

    /// What the own certificate says, if the own authorities vouch for it: else nobody would open to it, and it to nobody.
    pub(super) fn check(&self) -> Result<&Shown, IdentityError> {
        self.vouch_for(&self.own.cert).map_err(IdentityError::Own)?;
        Ok(&self.shown)
    }
}

/// What a process holds now; its TLS looks here with each handshake.
pub(super) struct Held {
    dir: PathBuf,
    current: RwLock<Arc<Current>>,
    /// Counts what was taken.
    generation: AtomicU64,
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held")
            .field("dir", &self.dir)
            .finish_non_exhaustive()
    }
}

/// What became of the files at a look.
#[derive(Debug)]
enum Look {
    /// Nothing is new, or it is new since this look only.
    Wait,
    Taken,
    /// Said once.
    Refused(IdentityError),
}

/// What the last looks saw.
#[derive(Default)]
struct Seen {
    /// New, and not yet seen twice.
    once: Option<Files>,
    /// Seen, and of no use.
    refused: Option<Files>,
    /// Why nothing could be read.
    unread: Option<String>,
}

impl Held {
    pub(super) fn load(dir: &Path) -> Result<Self, IdentityError> {
        files::mend(dir)?;
        let current = Current::of(Files::read(dir)?, dir)?;
        Ok(Self {
            dir: dir.to_owned(),
            current: RwLock::new(Arc::new(current)),
            generation: AtomicU64::new(0),
        })
    }

    pub(super) fn current(&self) -> Arc<Current> {
        self.current
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(super) fn identity(&self) -> Identity {
        self.current().shown.identity.clone()
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// False when what is held has changed since `asked`, and vouches for `shown` no more.
    pub(super) fn vouches_for(&self, shown: &Shown, asked: &mut u64) -> bool {
        let generation = self.generation();
        if generation == *asked {
            return true;
        }
        *asked = generation;
        self.current().vouch_for(&shown.chain).is_ok()
    }

    /// Takes what is new in the folder; runs until the task is dropped.
    pub(super) async fn follow(&self) {
        let mut seen = Seen::default();
        let mut complained: Option<Instant> = None;
        loop {
            match self.look(&mut seen) {
                Look::Wait => {}
                Look::Taken => {
                    let current = self.current();
                    let expires = current.shown.expires_in();
                    tracing::info!(
                        dir = %self.dir.display(),
                        authorities = current.authorities.len(),
                        days = expires.as_secs() / DAY.as_secs(),
                        "new credentials"
                    );
                }
                Look::Refused(error) => {
                    let error: &dyn std::error::Error = &error;
                    tracing::warn!(error, "the credentials in the folder are not taken");
                }
            }
            let current = self.current();
            let expires = current.shown.expires_in();
            let (soon, way_out) = match current.shown.is_signed_by_a_lead() {
                true => (
                    SOON_BY_LEAD,
                    "a lead with an issuer renews it (weft lead list)",
                ),
                false => (SOON, "weft renew"),
            };
            if expires < soon && complained.is_none_or(|at| at.elapsed() >= DAY) {
                complained = Some(Instant::now());
                let hours = expires.as_secs() / 3600;
                tracing::warn!(hours, "the own certificate expires soon: {way_out}");
            }
            sleep(LOOK).await;
        }
    }

    fn look(&self, seen: &mut Seen) -> Look {
        let files = match Files::read(&self.dir) {
            Ok(files) => files,
            Err(error) => {
                seen.once = None;
                let text = error.to_string();
                return match seen.unread.replace(text.clone()) {
                    Some(before) if before == text => Look::Wait,
                    _ => Look::Refused(error),
                };
            }
        };
        seen.unread = None;
        if files == self.current().files {
            *seen = Seen::default();
            return Look::Wait;
        }
        if seen.refused.as_ref() == Some(&files) {
            return Look::Wait;
        }
        if seen.once.as_ref() != Some(&files) {
            seen.once = Some(files);
            return Look::Wait;
        }
        seen.once = None;
        match self.take(files.clone()) {
            Ok(()) => Look::Taken,
            Err(error) => {
                seen.refused = Some(files);
                Look::Refused(error)
            }
        }
    }

    /// See [`Credentials::replace`](super::Credentials::replace).
    pub(super) fn replace(&self, chain: Vec<u8>, key: Vec<u8>) -> Result<(), IdentityError> {
        let files = Files {
            chain,
            key,
            authorities: self.current().files.authorities.clone(),
        };
        let is = files.check()?.identity;
        self.check_identity(&is)?;
        files.replace(&self.dir)
    }

    fn check_identity(&self, is: &Identity) -> Result<(), IdentityError> {
        let was = self.identity();
        if *is == was {
            return Ok(());
        }
        Err(IdentityError::Changed {
            was: was.to_string(),
            is: is.to_string(),
        })
    }

    fn take(&self, files: Files) -> Result<(), IdentityError> {
        let next = Current::of(files, &self.dir)?;
        self.check_identity(&next.shown.identity)?;
        next.check()?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(next);
        self.generation.fetch_add(1, Ordering::Release);
        Ok(())
    }
}

impl ResolvesServerCert for Held {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current().own.clone())
    }
}

impl ResolvesClientCert for Held {
    fn resolve(
        &self,
        _authorities: &[&[u8]],
        _schemes: &[SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        Some(self.current().own.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Shows the authorities behind the own chain.
#[derive(Debug)]
pub(super) struct Introducing(pub(super) Arc<Held>);

impl ResolvesServerCert for Introducing {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.current().introducing.clone())
    }
}
