//! What the leads know of who may do what, beside certificates: tokens, revocations, and who changed what.
//!
//! ```text
//!  CreateToken, RevokeToken ----> tokens      a name, what its holder may, the hash of its secret
//!  Invite, Withdraw, Join ------> invitations of clusters    see `invitation`
//!  RevokeCertificate -----------> holders, certificates      looked up by every door
//!  Signed{by, what, command} ---> audit       the last AUDIT changes that were made
//! ```
//!
//! What is revoked is shared with whoever looks it up, and is another list only when that changed. Everything is
//! bounded. No secret is here: of a token only the hash, and the CA's key never enters the log.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::{
    base::KnowledgeBase,
    command::{Applied, Command, Outcome, Refusal},
    invitation::Invitations,
    name::Name,
};

/// How many changes the audit log keeps.
pub const AUDIT: usize = 10_000;
/// How many tokens there may be.
const TOKENS: usize = 1_000;
/// How many revocations there may be.
const REVOCATIONS: usize = 10_000;
/// The longest text of a signed command, bytes; longer ones are cut.
const TEXT: usize = 256;
/// The characters of a SHA-256.
const HASH: usize = 64;
/// The longest access, bytes: `deployer` and 16 labels of 63 characters take 1,032.
const ACCESS: usize = 1_100;
/// The longest holder of a certificate, bytes: three labels of 63 characters and what stands between them take 203.
const HOLDER: usize = 256;

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Security {
    /// Holders of certificates that count no more if they were issued up to this time, milliseconds.
    #[serde(default, with = "shared")]
    pub holders: Arc<BTreeMap<String, u64>>,
    /// Certificates that count no more by their fingerprint, with their holder.
    #[serde(default, with = "shared")]
    pub certificates: Arc<BTreeMap<String, String>>,
    /// The tokens by name.
    #[serde(default)]
    pub tokens: BTreeMap<Name, Token>,
    /// The clusters that may join by a token.
    #[serde(default)]
    pub invitations: Invitations,
    /// The last changes, oldest first.
    #[serde(default)]
    pub audit: VecDeque<Audited>,
}

/// What is shared is written as what it is.
mod shared {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<T: Serialize, S: Serializer>(
        value: &Arc<T>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        T::serialize(value, serializer)
    }

    pub(super) fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Arc<T>, D::Error> {
        T::deserialize(deserializer).map(Arc::new)
    }
}

/// A token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// SHA-256 of its secret, in hexadecimal digits.
    pub hash: String,
    /// What its holder may do, as certificates say it.
    pub access: String,
    /// When it was made, log time.
    pub created_ms: u64,
    /// When it ends, log time.
    pub expires_ms: u64,
}

/// A change that was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Audited {
    /// Index of its log entry.
    pub index: u64,
    /// Log time.
    pub at_ms: u64,
    /// Who made it.
    pub by: String,
    /// What it was.
    pub what: String,
}

/// A command and who asked for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signed {
    /// Who asked.
    pub by: String,
    /// What for, in words.
    pub what: String,
    /// What to do; [`Command::Tick`] for what was done outside the Knowledge Base and is only noted.
    pub command: Command,
}

impl Security {
    /// What a copy of the Knowledge Base takes along: what must not be forgotten, and no more.
    #[must_use]
    pub fn sketch(&self) -> Self {
        Self {
            holders: self.holders.clone(),
            certificates: self.certificates.clone(),
            ..Self::default()
        }
    }

    /// This one in the place of `older`'s: nothing that either revoked counts again, and no token comes back.
    pub(crate) fn after(mut self, older: &Self) -> Self {
        let holders = Arc::make_mut(&mut self.holders);
        for (holder, until) in &*older.holders {
            let known = holders.entry(holder.clone()).or_default();
            *known = (*known).max(*until);
        }
        let certificates = Arc::make_mut(&mut self.certificates);
        certificates.extend((*older.certificates).clone());
        self
    }

    fn note(&mut self, audited: Audited) {
        while self.audit.len() >= AUDIT {
            self.audit.pop_front();
        }
        self.audit.push_back(audited);
    }

    /// Whether something more may be revoked.
    pub(crate) fn check_room(&self) -> Result<(), Refusal> {
        if self.holders.len() + self.certificates.len() < REVOCATIONS {
            return Ok(());
        }
        Err(Refusal::Exhausted {
            what: "revocations".to_owned(),
            size: REVOCATIONS as u64,
        })
    }
}

fn invalid(path: &str, problem: String) -> Refusal {
    Refusal::Invalid {
        path: path.to_owned(),
        problem,
    }
}

/// Refuses what is no SHA-256 in hexadecimal digits; `path` is the field that it stands in.
///
/// # Errors
/// With that field.
pub fn check_hash(path: &str, hash: &str) -> Result<(), Refusal> {
    let is_hash = hash.len() == HASH
        && hash
            .bytes()
            .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    if is_hash {
        Ok(())
    } else {
        let hash = short(hash);
        let problem = format!("{hash:?} is no SHA-256: write {HASH} of 0-9 and a-f");
        Err(invalid(path, problem))
    }
}

/// Refuses a text that is read again and therefore must not be cut.
pub(crate) fn check_length(path: &str, text: &str, most: usize) -> Result<(), Refusal> {
    match text.len() {
        length if length > most => {
            let problem = format!("it has {length} bytes, the most are {most}");
            Err(invalid(path, problem))
        }
        _ => Ok(()),
    }
}

fn short(text: &str) -> String {
    let cut = (0..=text.len().min(TEXT))
        .rev()
        .find(|at| text.is_char_boundary(*at));
    text[..cut.unwrap_or(0)].to_owned()
}

impl KnowledgeBase {
    pub(crate) fn signed(&mut self, signed: &Signed) -> Outcome {
        let command = &signed.command;
        if matches!(command, Command::Signed(_) | Command::Once(_)) {
            let problem = "holds a command that is signed or keyed itself".to_owned();
            return Err(invalid("signed", problem));
        }
        let outcome = self.apply_one(command);
        let is_note = matches!(command, Command::Tick);
        if is_note || matches!(&outcome, Ok(applied) if *applied != Applied::Unchanged) {
            self.security.note(Audited {
                index: self.index,
                at_ms: self.log_time_ms,
                by: short(&signed.by),
                what: short(&signed.what),
            });
        }
        outcome
    }

    pub(crate) fn create_token(
        &mut self,
        name: &Name,
        hash: &str,
        access: &str,
        lasts_ms: u64,
    ) -> Outcome {
        check_hash("hash", hash)?;
        check_length("access", access, ACCESS)?;
        let (now, tokens) = (self.log_time_ms, &mut self.security.tokens);
        tokens.retain(|_, token| token.expires_ms > now);
        match tokens.get(name) {
            Some(known) if known.hash == hash && known.access == access => {
                return Ok(Applied::Unchanged);
            }
            Some(_) => {
                let problem = format!("token {name} is there already: revoke it first");
                return Err(invalid("name", problem));
            }
            None => {}
        }
        if tokens.len() >= TOKENS {
            return Err(Refusal::Exhausted {
                what: "tokens".to_owned(),
                size: TOKENS as u64,
            });
        }
        let token = Token {
            hash: hash.to_owned(),
            access: access.to_owned(),
            created_ms: now,
            expires_ms: now.saturating_add(lasts_ms),
        };
        tokens.insert(name.clone(), token);
        Ok(Applied::Changed)
    }

    pub(crate) fn revoke_token(&mut self, name: &Name) -> Outcome {
        match self.security.tokens.remove(name) {
            Some(_) => Ok(Applied::Changed),
            None => Ok(Applied::Unchanged),
        }
    }

    pub(crate) fn revoke_certificate(
        &mut self,
        holder: &str,
        certificate: Option<&String>,
    ) -> Outcome {
        check_length("holder", holder, HOLDER)?;
        if let Some(certificate) = certificate {
            check_hash("certificate", certificate)?;
        }
        let known = match certificate {
            Some(certificate) => self.security.certificates.contains_key(certificate),
            None => self.security.holders.contains_key(holder),
        };
        if !known {
            self.security.check_room()?;
        }
        if certificate.is_none() {
            self.withdraw_of(holder);
        }
        let security = &mut self.security;
        let before = match certificate {
            Some(certificate) => {
                let certificate = certificate.clone();
                let certificates = Arc::make_mut(&mut security.certificates);
                let before = certificates.insert(certificate, holder.to_owned());
                before.map(|_| self.log_time_ms)
            }
            None => {
                Arc::make_mut(&mut security.holders).insert(holder.to_owned(), self.log_time_ms)
            }
        };
        if before == Some(self.log_time_ms) {
            Ok(Applied::Unchanged)
        } else {
            Ok(Applied::Changed)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::{apply, founded};

    fn create(name: &str, hash: char, lasts_ms: u64) -> Command {
        Command::CreateToken {
            name: name.parse().unwrap(),
            hash: hash.to_string().repeat(HASH),
            access: "viewer".to_owned(),
            lasts_ms,
        }
    }

    fn signed(by: &str, command: Command) -> Command {
        Command::Signed(Box::new(Signed {
            by: by.to_owned(),
            what: "something".to_owned(),
            command,
        }))
    }

    #[test]
    fn a_token_is_made_once_and_gives_its_name_back() {
        let mut base = founded();
        assert_eq!(
            apply(&mut base, 1_000, create("ci", 'a', 50)),
            Ok(Applied::Changed)
        );
        assert_eq!(
            apply(&mut base, 1_010, create("ci", 'a', 50)),
            Ok(Applied::Unchanged)
        );
        let taken = apply(&mut base, 1_020, create("ci", 'b', 50));
        assert!(matches!(taken, Err(Refusal::Invalid { .. })), "{taken:?}");
        // Expired, or revoked, it is nobody's.
        assert_eq!(
            apply(&mut base, 1_050, create("ci", 'b', 50)),
            Ok(Applied::Changed)
        );
        let revoke = Command::RevokeToken {
            name: "ci".parse().unwrap(),
        };
        assert_eq!(
            apply(&mut base, 1_060, revoke.clone()),
            Ok(Applied::Changed)
        );
        assert_eq!(apply(&mut base, 1_060, revoke), Ok(Applied::Unchanged));
        assert!(base.security.tokens.is_empty());
        let no_hash = apply(&mut base, 1_070, create("ci", 'g', 50));
        assert!(
            matches!(no_hash, Err(Refusal::Invalid { .. })),
            "{no_hash:?}"
        );
    }

    #[test]
    fn what_is_read_again_is_kept_whole_or_refused() {
        let mut base = founded();
        let create = |access: String| Command::CreateToken {
            name: "ci".parse().unwrap(),
            hash: "a".repeat(HASH),
            access,
            lasts_ms: 50,
        };
        let labels = (0..16).map(|n| format!("/{}{n:02}", "n".repeat(61)));
        let longest = format!("deployer{}", labels.collect::<String>());
        apply(&mut base, 1_000, create(longest.clone())).unwrap();
        let token = &base.security.tokens[&"ci".parse::<Name>().unwrap()];
        assert_eq!(token.access, longest);
        let again = apply(&mut base, 1_001, create(longest));
        assert_eq!(again, Ok(Applied::Unchanged));
        let longer = create(format!("deployer/{}", "n".repeat(ACCESS)));
        let holder = Command::RevokeCertificate {
            holder: "n".repeat(HOLDER + 1),
            certificate: None,
        };
        for too_long in [longer, holder] {
            let refused = apply(&mut base, 1_060, too_long);
            assert!(
                matches!(refused, Err(Refusal::Invalid { .. })),
                "{refused:?}"
            );
        }
    }

    #[test]
    fn what_was_changed_is_noted_and_what_was_not_is_not() {
        let mut base = founded();
        apply(&mut base, 1_000, signed("ann", create("ci", 'a', 50))).unwrap();
        apply(&mut base, 1_001, signed("bob", create("ci", 'a', 50))).unwrap();
        apply(&mut base, 1_002, signed("bob", create("ci", 'b', 50))).unwrap_err();
        apply(&mut base, 1_003, signed("eve", Command::Tick)).unwrap();
        let by: Vec<_> = base.security.audit.iter().map(|it| &*it.by).collect();
        assert_eq!(by, ["ann", "eve"]);
        assert_eq!(
            (base.security.audit[0].index, base.security.audit[0].at_ms),
            (2, 1_000)
        );
        let nested = signed("ann", signed("bob", Command::Tick));
        apply(&mut base, 1_004, nested).unwrap_err();
    }

    #[test]
    fn the_audit_log_and_its_texts_are_bounded() {
        let mut security = Security::default();
        for index in 0..=AUDIT as u64 {
            security.note(Audited {
                index,
                at_ms: 0,
                by: String::new(),
                what: String::new(),
            });
        }
        assert_eq!((security.audit.len(), security.audit[0].index), (AUDIT, 1));
        assert_eq!(short(&"é".repeat(TEXT)).len(), TEXT);
        assert_eq!(short(&format!("a{}", "é".repeat(TEXT))).len(), TEXT - 1);
    }

    #[test]
    fn what_is_revoked_is_the_same_list_until_something_is_revoked() {
        let mut base = founded();
        let revoke = |certificate: Option<char>| Command::RevokeCertificate {
            holder: "weft://test/user/ann".to_owned(),
            certificate: certificate.map(|digit| digit.to_string().repeat(HASH)),
        };
        let same = |a: &Security, b: &Security| {
            (
                Arc::ptr_eq(&a.holders, &b.holders),
                Arc::ptr_eq(&a.certificates, &b.certificates),
            )
        };
        apply(&mut base, 1_000, revoke(None)).unwrap();
        let seen = base.security.clone();
        apply(&mut base, 1_001, create("ci", 'a', 50)).unwrap();
        assert_eq!(same(&seen, &base.security), (true, true));
        assert_eq!(same(&seen, &base.sketch().security), (true, true));
        apply(&mut base, 1_002, revoke(Some('b'))).unwrap();
        assert_eq!(same(&seen, &base.security), (true, false));
        apply(&mut base, 1_003, revoke(None)).unwrap();
        assert_eq!(same(&seen, &base.security), (false, false));
        assert_eq!(seen.holders["weft://test/user/ann"], 1_000);
        let text = serde_json::to_string(&base.security).unwrap();
        assert!(
            text.contains(r#""holders":{"weft://test/user/ann":1003}"#),
            "{text}"
        );
        assert_eq!(
            serde_json::from_str::<Security>(&text).unwrap(),
            base.security
        );
    }

    #[test]
    fn a_restore_revokes_no_less_and_brings_no_token_back() {
        let mut base = founded();
        let revoke = |holder: &str| Command::RevokeCertificate {
            holder: holder.to_owned(),
            certificate: None,
        };
        apply(&mut base, 1_000, revoke("weft://test/user/ann")).unwrap();
        apply(&mut base, 1_000, create("ci", 'a', 50)).unwrap();
        let backup = base.sketch();
        assert!(backup.security.tokens.is_empty());
        let token = Command::RevokeToken {
            name: "ci".parse().unwrap(),
        };
        apply(&mut base, 1_001, token).unwrap();
        apply(&mut base, 1_002, revoke("weft://test/node/edge/n1")).unwrap();
        let restore = Command::Restore(Box::new(backup.clone()));
        apply(&mut base, 1_003, signed("ann", restore)).unwrap();
        assert_eq!(base.security.holders.len(), 2);
        assert!(base.security.tokens.is_empty());
        assert_eq!(base.security.audit.len(), 1);
        // A mesh that is built anew from it knows what was revoked, too.
        let mut anew = founded();
        apply(&mut anew, 1_004, Command::Restore(Box::new(backup))).unwrap();
        assert_eq!(anew.security.holders.len(), 1);
    }
}
