//! How a cluster joins by a token, and how its agent's certificate is renewed: what is said at the leads' doors.
//!
//! ```text
//!  agent -> lead   JoinRequest    at the door for who has no certificate (ALPN), once
//!                  RenewRequest   at the agents' door, by the certificate that it has
//!  lead -> agent   Joined, Certificate    the agent's certificate, then who signed it
//! ```
//!
//! The key stays with the agent: a request (CSR, RFC 2986) shows that it has it, and of what else a request says nothing
//! counts. What an admin hands over is a [`JoinString`].

use std::{collections::BTreeSet, fmt, net::SocketAddr, str::FromStr};

use control_core::name::Name;
use netmanager_api::identity::fingerprint;
use serde::{Deserialize, Serialize};

/// What a connection without a certificate asks for in its handshake (ALPN) to get to the door for joins.
pub const ALPN: &[u8] = b"weft-join/1";

/// The largest message at the door for joins, bytes.
pub const MESSAGE_LIMIT: usize = 32 * 1024;

/// Who wants to join.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequest {
    /// As which cluster.
    pub cluster: String,
    /// The token's secret.
    pub secret: String,
    /// For which key: a certificate signing request, PEM.
    pub request: String,
}

impl fmt::Debug for JoinRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinRequest")
            .field("cluster", &self.cluster)
            .finish_non_exhaustive()
    }
}

/// An agent whose certificate is to be renewed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenewRequest {
    /// For which key: a certificate signing request, PEM.
    pub request: String,
}

/// The answer to who joins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joined {
    /// The agent's certificate, then who signed it, PEM.
    pub chain: String,
    /// The authorities that count, PEM; the agent believes in those that it was told of before.
    pub authorities: String,
}

/// The answer to who renews.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// The agent's certificate, then who signed it, PEM.
    pub chain: String,
}

/// All that the other machine needs to know.
///
/// ```text
///  weft-join://edge:SECRET@192.0.2.1:7000,192.0.2.2:7000/SHA256[+SHA256]
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct JoinString {
    /// As which cluster.
    pub cluster: Name,
    /// The token's secret, hexadecimal digits.
    pub secret: String,
    /// Where the leads are.
    pub leads: Vec<SocketAddr>,
    /// The authorities that count, by their SHA-256: two while another takes the place of the mesh's.
    pub authorities: BTreeSet<String>,
}

impl fmt::Debug for JoinString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinString")
            .field("cluster", &self.cluster)
            .field("leads", &self.leads)
            .field("authorities", &self.authorities)
            .finish_non_exhaustive()
    }
}

/// No join string.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this is no join string ({0}): copy the whole line that weft cluster join-string prints")]
pub struct NoJoinString(&'static str);

const SCHEME: &str = "weft-join://";
/// The digits of a secret and of a fingerprint.
const DIGITS: usize = 64;

impl JoinString {
    /// What the leads know of the secret.
    #[must_use]
    pub fn hash(&self) -> String {
        fingerprint(self.secret.as_bytes())
    }
}

impl fmt::Display for JoinString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let leads: Vec<_> = self.leads.iter().map(ToString::to_string).collect();
        let authorities: Vec<_> = self.authorities.iter().map(String::as_str).collect();
        let (cluster, secret) = (&self.cluster, &self.secret);
        let (leads, authorities) = (leads.join(","), authorities.join("+"));
        write!(f, "{SCHEME}{cluster}:{secret}@{leads}/{authorities}")
    }
}

impl FromStr for JoinString {
    type Err = NoJoinString;

    fn from_str(text: &str) -> Result<Self, NoJoinString> {
        let is_hash = |text: &str| {
            let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
            text.len() == DIGITS && text.bytes().all(digit)
        };
        let rest = text.trim().strip_prefix(SCHEME);
        let rest = rest.ok_or(NoJoinString("it does not begin with weft-join://"))?;
        let (token, rest) = rest.split_once('@').ok_or(NoJoinString("no @"))?;
        let (cluster, secret) = token.split_once(':').ok_or(NoJoinString("no token"))?;
        let (leads, authorities) = rest.split_once('/').ok_or(NoJoinString("no authority"))?;
        let leads: Result<Vec<SocketAddr>, _> = leads.split(',').map(str::parse).collect();
        let authorities: BTreeSet<_> = authorities.split('+').map(str::to_owned).collect();
        if !is_hash(secret) {
            return Err(NoJoinString("its secret is not whole"));
        }
        if !authorities.iter().all(|it| is_hash(it)) {
            return Err(NoJoinString("its authority is not whole"));
        }
        Ok(Self {
            cluster: cluster
                .parse()
                .map_err(|_| NoJoinString("no cluster's name"))?,
            secret: secret.to_owned(),
            leads: leads.map_err(|_| NoJoinString("no lead's address"))?,
            authorities,
        })
    }
}

#[allow(
    clippy::all,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    unreachable_pub,
    unused_qualifications,
    reason = "generated"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/weft.agent.v1.RenewDoor.rs"));
    include!(concat!(env!("OUT_DIR"), "/weft.join.v1.JoinDoor.rs"));
}
pub use generated::{
    join_door_client::JoinDoorClient, join_door_server, renew_door_client::RenewDoorClient,
    renew_door_server,
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_join_string_survives_its_text_and_a_part_of_one_is_none() {
        let whole = JoinString {
            cluster: "edge".parse().unwrap(),
            secret: "5".repeat(DIGITS),
            leads: ["192.0.2.1:7000", "[2001:db8::1]:7000"]
                .map(|it| it.parse().unwrap())
                .to_vec(),
            authorities: ["a", "b"].map(|it| it.repeat(DIGITS)).into(),
        };
        let text = whole.to_string();
        assert_eq!(text.parse(), Ok(whole.clone()));
        assert_eq!(format!(" {text}\n").parse(), Ok(whole.clone()));
        for cut in 0..text.len() {
            // Without one of two authorities it is one for the other.
            if text[..cut].ends_with(&"a".repeat(DIGITS)) {
                continue;
            }
            assert!(text[..cut].parse::<JoinString>().is_err(), "{cut}");
        }
        assert!(!format!("{whole:?}").contains(&whole.secret));
    }
}
