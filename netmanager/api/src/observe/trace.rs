//! What the programs would do with a packet, and why.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use serde::{Deserialize, Serialize};

/// The packet that is asked about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceRequest {
    /// `namespace/name` of a pod of this node, or its name alone; `node` is the node itself.
    pub from: String,
    /// The VIP.
    pub to: IpAddr,
    /// Its port; none asks for the VIP itself, by ICMP echo.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// `tcp`, `udp` or `icmp`.
    pub protocol: String,
    /// The source port, or an echo's identifier: policies pick by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sport: Option<u16>,
    /// Send a marked packet, and tell where it is seen.
    #[serde(default)]
    pub probe: bool,
}

/// What would happen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// The node that answers.
    pub node: String,
    /// Who sends.
    pub from: String,
    /// Its address, and the source port if one is given.
    pub source: SocketAddr,
    /// The VIP and port.
    pub to: SocketAddr,
    /// The protocol.
    pub protocol: String,
    /// The VIP's service, where this node knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// The policy that the address says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// The end of it.
    pub outcome: Outcome,
}

/// What comes of a packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// It is not forwarded.
    Refused {
        /// The reason's name, as in the metrics.
        reason: String,
        /// What is missing or wrong.
        why: String,
        /// What the sender hears.
        answer: String,
    },
    /// It belongs to a flow that is there.
    Existing {
        /// The flow's backend.
        backend: Backend,
        /// What a SYN with another sequence number would open instead; only of TCP.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        anew: Option<Backend>,
    },
    /// It opens a flow.
    Opens {
        /// The slot of the VIP's run that is picked, counted from 0.
        slot: u32,
        /// The length of the run.
        of: u32,
        /// Whom it names.
        backend: Backend,
    },
    /// Which backend depends on the source port, which was not given.
    Depends {
        /// The backends, the likeliest first.
        backends: Vec<Backend>,
    },
}

/// A backend that may be picked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    /// Its index in the kernel.
    pub index: u32,
    /// Its address and port.
    pub address: SocketAddr,
    /// Its slot number, where the table still names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<u32>,
    /// `cluster/node` of its node, else its number.
    pub node: String,
    /// How it is reached.
    pub way: Way,
    /// In how many of a thousand flows it is picked; 1,000 where it is sure.
    pub share: u32,
}

/// How a backend is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "snake_case")]
pub enum Way {
    /// An endpoint of this node: handed to its veth.
    Local {
        /// Its number.
        endpoint: u32,
    },
    /// Through the tunnel.
    Tunnel {
        /// The largest packet that goes through, bytes.
        mtu: u32,
    },
    /// Nobody has the address: a packet is refused.
    Nowhere,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local { endpoint } => write!(f, "local endpoint {endpoint}, no tunnel"),
            Self::Tunnel { mtu } => write!(f, "by tunnel, packets up to {mtu} bytes"),
            Self::Nowhere => f.write_str("no way: there is no tunnel, or nobody has the address"),
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        super::write_address(f, self.address)?;
        if let Some(instance) = self.instance {
            write!(f, " #{instance}")?;
        }
        write!(f, " on {} ({})", self.node, self.way)
    }
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} {} (", self.node, self.protocol, self.from)?;
        super::write_address(f, self.source)?;
        f.write_str(") -> ")?;
        super::write_address(f, self.to)?;
        f.write_str("\n")?;
        match (&self.service, &self.policy) {
            (Some(service), Some(policy)) => writeln!(f, "  vip: {policy} of {service}")?,
            (None, Some(policy)) => {
                writeln!(f, "  vip: {policy}, of no service that this node knows")?
            }
            _ => writeln!(f, "  vip: none")?,
        }
        match &self.outcome {
            Outcome::Refused {
                reason,
                why,
                answer,
            } => write!(
                f,
                "  refused: {reason}: {why}\n  the sender hears: {answer}"
            ),
            Outcome::Existing { backend, anew } => {
                write!(f, "  flow: it exists\n  backend: {backend}")?;
                match anew {
                    Some(backend) => write!(f, "\n  a new connection: {backend}"),
                    None => Ok(()),
                }
            }
            Outcome::Opens { slot, of, backend } => write!(
                f,
                "  flow: a new one\n  slot: {slot} of {of}\n  backend: {backend}"
            ),
            Outcome::Depends { backends } => {
                f.write_str("  flow: a new one; the backend depends on the source port (--sport)")?;
                for backend in backends {
                    let (whole, tenth) = (backend.share / 10, backend.share % 10);
                    write!(f, "\n  {whole:>3}.{tenth} %: {backend}")?;
                }
                Ok(())
            }
        }
    }
}
