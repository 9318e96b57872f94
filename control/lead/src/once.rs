//! Idempotency keys: how a request is told from every other, so that asking again does nothing again.
//!
//! A caller who gives no key gets one of this lead's, so that at least the lead's own attempts (a leader that
//! falls, an answer that is lost) carry a change out once.

use std::sync::atomic::{AtomicU64, Ordering};

use axum::{extract::FromRequestParts, http::request::Parts};
use control_core::{
    command::{Command, Outcome},
    once::{Digest, Once, digest},
    security::Signed,
};

use crate::{door::caller::Caller, lead::Lead, problem::Refusal};

/// The header with the caller's key.
pub(crate) const HEADER: &str = "idempotency-key";
/// The longest key of a caller's, characters.
const LONGEST: usize = 64;
/// The feature level that knows commands with a key.
pub(crate) const LEVEL: u32 = 1;
/// The feature level that knows who asked.
pub(crate) const SIGNED: u32 = 2;

/// `command`, with who asked for it; as it is while some lead does not know that.
pub(crate) fn sign(lead: &Lead, by: &str, command: Command) -> Command {
    let what = command.what();
    if lead.replica.read(|base| base.level) < SIGNED {
        // Else the state keeps it: weft audit.
        tracing::info!(by, what, "a change is asked for");
        return command;
    }
    Command::Signed(Box::new(Signed {
        by: by.to_owned(),
        what,
        command,
    }))
}

/// Notes what somebody asks of the group itself, before it is done: afterwards this lead may be no member any more.
///
/// # Errors
/// When it cannot be noted; nothing is done then.
pub(crate) async fn note(lead: &Lead, by: &str, what: String) -> Result<(), Refusal> {
    tracing::info!(by, what, "a change of the leads is asked for");
    if lead.replica.read(|base| base.level) < SIGNED {
        return Ok(());
    }
    let signed = Signed {
        by: by.to_owned(),
        what,
        command: Command::Tick,
    };
    lead.propose(vec![Command::Signed(Box::new(signed))])
        .await?;
    Ok(())
}

/// Whether a command only notes who asked for what: such are taken where others are refused, because who asks may be on the
/// way to mend that.
pub(crate) fn is_note(command: &Command) -> bool {
    matches!(command, Command::Signed(signed) if signed.command == Command::Tick)
}

/// Who asked for what, and with which key.
pub(crate) struct Key {
    user: String,
    chosen: Option<String>,
    /// Method, path and query: not the lead's address, which HTTP/2 puts before them.
    place: String,
}

impl<S: Send + Sync> FromRequestParts<S> for Key {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refusal> {
        let caller = parts.extensions.get::<Caller>();
        let user = caller.map(|caller| caller.name.clone());
        let user = user.ok_or_else(Refusal::nobody)?;
        let chosen = parts.headers.get(HEADER).map(|value| {
            let rule = format!("a key is 1 to {LONGEST} visible ASCII characters");
            match value.to_str() {
                Ok(key) if (1..=LONGEST).contains(&key.len()) => Ok(key.to_owned()),
                Ok(key) => Err(Refusal::field(HEADER, key, rule)),
                Err(_) => Err(Refusal::field(HEADER, "", rule)),
            }
        });
        Ok(Self {
            user,
            chosen: chosen.transpose()?,
            place: format!(
                "{} {}?{}",
                parts.method,
                parts.uri.path(),
                parts.uri.query().unwrap_or_default()
            ),
        })
    }
}

impl Key {
    /// The request whose body this is.
    pub(crate) fn request(self, lead: &Lead, body: &[u8]) -> Request {
        let own = || format!("{}.{}", lead.id, lead.keys.next());
        Request {
            key: match &self.chosen {
                Some(key) => format!("{}/{key}", self.user),
                None => own(),
            },
            by: self.user,
            is_chosen: self.chosen.is_some(),
            body: digest(&[self.place.as_bytes(), body]),
        }
    }
}

/// Numbers for the keys of requests that came without one: no two lives of a lead give the same.
#[derive(Debug)]
pub(crate) struct Keys {
    born_ms: u64,
    given: AtomicU64,
}

impl Keys {
    pub(crate) fn new(born_ms: u64) -> Self {
        Self {
            born_ms,
            given: AtomicU64::new(0),
        }
    }

    fn next(&self) -> String {
        let number = self.given.fetch_add(1, Ordering::Relaxed);
        format!("{}.{number}", self.born_ms)
    }
}

/// A request that changes something.
pub(crate) struct Request {
    by: String,
    key: String,
    is_chosen: bool,
    body: Digest,
}

impl Request {
    /// What came of its commands, if it was asked before.
    pub(crate) fn recall(
        &self,
        lead: &Lead,
        count: usize,
    ) -> Result<Option<Vec<Outcome>>, Refusal> {
        if !self.is_chosen {
            return Ok(None);
        }
        lead.replica.read(|base| {
            let parts = (0..).take(count);
            let outcomes = parts.map(|part| {
                let known = base.memory.recall(&self.key, part, self.body)?;
                Ok(known.cloned())
            });
            outcomes.collect()
        })
    }

    /// Its commands, to be carried out once.
    pub(crate) fn once(
        &self,
        lead: &Lead,
        commands: Vec<Command>,
    ) -> Result<Vec<Command>, Refusal> {
        let level = lead.replica.read(|base| base.level);
        if level < LEVEL {
            return if self.is_chosen {
                Err(Refusal::level("idempotency keys", LEVEL, level))
            } else {
                Ok(commands)
            };
        }
        let once = |(part, command)| {
            Command::Once(Box::new(Once {
                key: self.key.clone(),
                body: self.body,
                part,
                command: sign(lead, &self.by, command),
            }))
        };
        Ok((0..).zip(commands).map(once).collect())
    }
}
