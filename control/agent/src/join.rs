//! `weft agent join`: how this machine becomes a cluster's agent by a token.
//!
//! ```text
//!  key, request --> OUT/join.key join.csr (0600)     kept until it has worked: asked again, it is the same request
//!  lead, known by the authority that the string names --Join--> the certificate
//!  checked --> OUT/tls.crt tls.key ca.crt
//! ```
//!
//! Nobody is believed but who shows an authority whose SHA-256 is in the string.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use control_api::join::{
    ALPN, JoinDoorClient, JoinRequest, JoinString, Joined, MESSAGE_LIMIT, NoJoinString,
};
use netmanager_api::identity::{
    Identity, IdentityError, RevokedList, Role, check_secret_mode, client_by_fingerprints,
    files::{Files, existing, write_new},
    fingerprint,
};
use rustls::ClientConfig;
use rustls_pki_types::{CertificateDer, pem::PemObject};
use tokio::time::{Instant, sleep, timeout};
use tonic::{Code, Status};

use crate::{
    lead::{TlsLines, chain, connect},
    request::KeyRequest,
};

/// How long a lead may take: it writes to the log.
const ANSWER: Duration = Duration::from_secs(15);
/// How long leads are asked that may serve in a moment.
const PATIENCE: Duration = Duration::from_secs(30);
/// The pause between two rounds.
const PAUSE: Duration = Duration::from_secs(1);

/// The command line of `weft agent join`.
#[derive(Clone, Debug, clap::Args)]
pub struct JoinArgs {
    /// What weft cluster join-string has printed; - reads it from standard input, where no other user sees it.
    #[arg(value_name = "STRING")]
    pub string: String,
    /// Where tls.crt, tls.key and ca.crt go.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// A cluster that has joined.
#[derive(Clone, Debug)]
pub struct Member {
    /// Who this machine is now.
    pub identity: Identity,
    /// Where the leads are.
    pub leads: Vec<SocketAddr>,
}

/// Why it has not joined.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The string is none.
    #[error(transparent)]
    Form(#[from] NoJoinString),
    /// There is a certificate already.
    #[error("{} exists already: choose another folder", .0.display())]
    Exists(PathBuf),
    /// A file cannot be read or written.
    #[error("failed to {action} {}", path.display())]
    File {
        /// Read or write.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The key cannot be made.
    #[error("no key could be made")]
    Key(#[source] rcgen::Error),
    /// What the leads gave, or what is written, does not serve.
    #[error("the credentials do not serve")]
    Credentials(#[from] IdentityError),
    /// The certificate is of somebody else.
    #[error("the lead answered with a certificate of {0}")]
    Other(Identity),
    /// The leads refuse it.
    #[error("lead {lead}: {why}")]
    Refused {
        /// Who refused.
        lead: SocketAddr,
        /// Why.
        why: String,
    },
    /// No lead served.
    #[error("no lead let this cluster join:{0}")]
    Nobody(String),
}

/// What came of one try at one lead.
enum Attempt {
    Done(Joined),
    /// Every lead would say the same.
    Refused(String),
    /// Another lead may serve, or this one in a moment.
    Failed {
        why: String,
        passes: bool,
    },
}

/// Joins, and writes the credentials.
///
/// # Errors
/// With what to do.
pub async fn join(string: &str, out: &Path) -> Result<Member, JoinError> {
    let string: JoinString = string.parse()?;
    if let Some(path) = existing(out) {
        return Err(JoinError::Exists(path));
    }
    let pending = Pending::open(out, &string)?;
    let is_lead = |role: &Role| matches!(role, Role::Lead { .. });
    let tls = client_by_fingerprints(string.authorities.clone(), &[ALPN], is_lead)?;
    let joined = ask_all(&string, &pending.made.request, &tls).await?;
    let files = Files {
        chain: joined.chain.into(),
        key: pending.made.key.clone().into(),
        authorities: known(&joined.authorities, &string).into(),
    };
    let identity = files.check()?.identity;
    let is_own =
        matches!(&identity.role, Role::Agent { cluster } if *cluster == string.cluster.as_str());
    if !is_own {
        return Err(JoinError::Other(identity));
    }
    files.create(out)?;
    pending.forget();
    Ok(Member {
        identity,
        leads: string.leads,
    })
}

/// Those of the authorities, PEM, that the string names.
fn known(authorities: &str, string: &JoinString) -> String {
    const END: &str = "-----END CERTIFICATE-----";
    let is_named = |pem: &&str| {
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes());
        certificate.is_ok_and(|it| string.authorities.contains(&fingerprint(&it)))
    };
    let pieces = authorities.split_inclusive(END);
    let named: Vec<_> = pieces.filter(is_named).map(str::trim).collect();
    named.iter().map(|pem| format!("{pem}\n")).collect()
}

async fn ask_all(
    string: &JoinString,
    request: &str,
    tls: &Arc<ClientConfig>,
) -> Result<Joined, JoinError> {
    let give_up = Instant::now() + PATIENCE;
    loop {
        let mut failures = String::new();
        let mut may_pass = false;
        for lead in &string.leads {
            match ask(*lead, string, request, tls.clone()).await {
                Attempt::Done(joined) => return Ok(joined),
                Attempt::Refused(why) => return Err(JoinError::Refused { lead: *lead, why }),
                Attempt::Failed { why, passes } => {
                    may_pass |= passes;
                    failures += &format!("\n  lead {lead}: {why}");
                }
            }
        }
        if !may_pass || Instant::now() >= give_up {
            return Err(JoinError::Nobody(failures));
        }
        sleep(PAUSE).await;
    }
}

async fn ask(
    lead: SocketAddr,
    string: &JoinString,
    request: &str,
    tls: Arc<ClientConfig>,
) -> Attempt {
    let lines = TlsLines {
        tls,
        revoked: RevokedList::default(),
    };
    let channel = match connect(lead, Arc::new(lines)).await {
        Ok(channel) => channel,
        Err(error) => {
            return Attempt::Failed {
                why: chain(&error),
                passes: false,
            };
        }
    };
    let mut door = JoinDoorClient::new(channel).max_decoding_message_size(MESSAGE_LIMIT);
    let asked = door.join(JoinRequest {
        cluster: string.cluster.to_string(),
        secret: string.secret.clone(),
        request: request.to_owned(),
    });
    match timeout(ANSWER, asked).await {
        Ok(Ok(joined)) => Attempt::Done(joined.into_inner()),
        Ok(Err(status)) => refused(&status),
        Err(_) => Attempt::Failed {
            why: format!("no answer within {ANSWER:?}"),
            passes: true,
        },
    }
}

fn refused(status: &Status) -> Attempt {
    let why = status.message().to_owned();
    match status.code() {
        Code::Unimplemented => Attempt::Failed { why, passes: false },
        Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::InvalidArgument
        | Code::ResourceExhausted => Attempt::Refused(why),
        _ => Attempt::Failed { why, passes: true },
    }
}

/// A request that may have been answered without that being heard: a token is good for one.
struct Pending {
    made: KeyRequest,
    key: PathBuf,
    request: PathBuf,
}

impl Pending {
    /// What was asked for before in this folder, else something new, on the disk before anybody is asked.
    fn open(out: &Path, string: &JoinString) -> Result<Self, JoinError> {
        let (key, request) = (out.join("join.key"), out.join("join.csr"));
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| JoinError::File {
                action,
                path,
                source,
            }
        };
        let made = if request.exists() {
            check_secret_mode(&key)?;
            KeyRequest {
                key: fs::read_to_string(&key).map_err(failed("read", &key))?,
                request: fs::read_to_string(&request).map_err(failed("read", &request))?,
            }
        } else {
            let made = KeyRequest::new(string.cluster.as_str()).map_err(JoinError::Key)?;
            fs::create_dir_all(out).map_err(failed("make", out))?;
            // A key without its request was asked for nothing.
            match fs::remove_file(&key) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove", &key)(error));
                }
                _ => {}
            }
            write_new(&key, made.key.as_bytes(), 0o600).map_err(failed("write", &key))?;
            write_new(&request, made.request.as_bytes(), 0o600)
                .map_err(failed("write", &request))?;
            made
        };
        Ok(Self { made, key, request })
    }

    /// It has worked.
    fn forget(self) {
        for path in [self.request, self.key] {
            // What stays is of no use to anybody but this machine.
            let _ = fs::remove_file(path);
        }
    }
}
