//! A certificate as its holder shows it at a door.

use std::{
    io,
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant, SystemTime},
};

use rustls::CommonState;
use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{Identity, IdentityError, RevokedList, fingerprint};

/// Certificates begin this long before they are issued, because clocks differ.
pub const BACKDATED: Duration = Duration::from_secs(300);

/// How long a connection may go on when its authority counts no more: new ones are made at once, and what was asked on
/// the old one is answered there.
const UNDER_WAY: Duration = Duration::from_secs(10);

/// What a certificate says, and which one it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Its holder.
    pub identity: Identity,
    /// The SHA-256 of its DER form, in hexadecimal digits.
    pub fingerprint: String,
    /// When it was issued: [`BACKDATED`] after its validity begins; milliseconds since the Unix epoch.
    pub issued_ms: u64,
    /// When it ends, milliseconds since the Unix epoch.
    pub expires_ms: u64,
    /// All that was shown, the holder's own certificate first; empty where it was not shown on a connection.
    pub(super) chain: Vec<CertificateDer<'static>>,
    /// Who signed it for the authority, as far as that was shown: what is revoked of theirs is revoked of it.
    pub(super) signers: Vec<Shown>,
}

impl Shown {
    /// Reads a certificate; whether it is worth anything is the chain's to say.
    ///
    /// # Errors
    /// When it cannot be parsed, or does not name exactly one identity.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let identity = Identity::of_certificate(certificate)?;
        let (_, parsed) = X509Certificate::from_der(certificate)
            .map_err(|error| IdentityError::Certificate(error.to_string()))?;
        let ms = |seconds: i64| u64::try_from(seconds).unwrap_or(0).saturating_mul(1000);
        let validity = parsed.validity();
        let backdated = i64::try_from(BACKDATED.as_secs()).unwrap_or(0);
        Ok(Self {
            identity,
            fingerprint: fingerprint(certificate),
            issued_ms: ms(validity.not_before.timestamp().saturating_add(backdated)),
            expires_ms: ms(validity.not_after.timestamp()),
            chain: Vec::new(),
            signers: Vec::new(),
        })
    }

    /// Reads a chain, the holder's own certificate first; it ends with the first of them that does.
    ///
    /// # Errors
    /// As [`Shown::of_certificate`], and when there is none.
    pub fn of_chain(chain: &[CertificateDer<'_>]) -> Result<Self, IdentityError> {
        let (own, others) = chain.split_first().ok_or(IdentityError::Count(0))?;
        let own = Self::of_certificate(own)?;
        // What names nobody signs for nobody: see `verify`.
        let signers: Vec<_> = others
            .iter()
            .filter_map(|it| Self::of_certificate(it).ok())
            .collect();
        let ends = signers.iter().map(|signer| signer.expires_ms);
        Ok(Self {
            expires_ms: ends.fold(own.expires_ms, u64::min),
            chain: chain
                .iter()
                .cloned()
                .map(CertificateDer::into_owned)
                .collect(),
            signers,
            ..own
        })
    }

    /// Reads the chain in a file, PEM.
    ///
    /// # Errors
    /// As [`Shown::of_chain`], and when the file cannot be read.
    pub fn of_file(path: &Path) -> Result<Self, IdentityError> {
        Self::of_chain(&super::certificates(path)?)
    }

    /// Reads what the other end of a connection showed.
    ///
    /// # Errors
    /// As [`Shown::of_certificate`], and when it showed nothing.
    pub fn of_peer(session: &CommonState) -> Result<Self, IdentityError> {
        Self::of_chain(session.peer_certificates().unwrap_or_default())
    }

    /// Whether a lead signed it for the authority, as far as that was shown.
    #[must_use]
    pub fn is_signed_by_a_lead(&self) -> bool {
        !self.signers.is_empty()
    }

    /// How long until it expires; zero once it has.
    #[must_use]
    pub fn expires_in(&self) -> Duration {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Duration::from_millis(self.expires_ms).saturating_sub(now.unwrap_or_default())
    }
}

/// A connection whose other end showed a certificate; it breaks when that one is revoked or expires, or its
/// authority is one of the mesh's no more.
///
/// Looked at whenever something is read: pings make that a matter of seconds, of who knocks as of who opens.
#[derive(Debug)]
pub struct Guarded<S> {
    stream: S,
    shown: Arc<Shown>,
    revoked: RevokedList,
    /// Which authorities vouched for it last.
    vouched: u64,
    /// Since when none does.
    alone_since: Option<Instant>,
}

impl<S> Guarded<S> {
    /// The connection `stream` with who showed `shown`.
    pub fn new(stream: S, shown: Arc<Shown>, revoked: RevokedList) -> Self {
        Self {
            stream,
            shown,
            revoked,
            vouched: 0,
            alone_since: None,
        }
    }

    /// What the other end showed.
    #[must_use]
    pub fn shown(&self) -> &Arc<Shown> {
        &self.shown
    }

    /// Whether no authority has vouched for it for long enough that what was under way has ended.
    fn is_alone(&mut self) -> bool {
        if !self
            .revoked
            .has_an_authority_for(&self.shown, &mut self.vouched)
        {
            self.alone_since = Some(Instant::now());
        }
        self.alone_since
            .is_some_and(|since| since.elapsed() >= UNDER_WAY)
    }

    fn check(&mut self) -> io::Result<()> {
        let problem = if self.revoked.holds(&self.shown) {
            "is revoked"
        } else if self.shown.expires_in().is_zero() {
            "has expired"
        } else if self.is_alone() {
            "is of an authority that counts no more"
        } else {
            return Ok(());
        };
        let identity = &self.shown.identity;
        tracing::warn!(%identity, "a connection ends: its certificate {problem}");
        let error = format!("the certificate of {identity} {problem}");
        Err(io::Error::new(io::ErrorKind::PermissionDenied, error))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
