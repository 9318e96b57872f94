//! The observe door: what `weft flows` and `weft trace` ask of a node's NetManager.
//!
//! A unix socket beside the CNI door's, for root alone. One connection carries one request, a line of JSON, and
//! its answers, a line each: a trace is one line (with a probe, one more per hop that was seen); flows go on
//! until the client leaves. Whoever does not read fast enough is told so and cut off ([`Said::Cut`]).

use std::{
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

mod trace;

pub use trace::{Backend, Outcome, Trace, TraceRequest, Way};

/// The socket's usual place.
pub const DEFAULT_SOCKET: &str = "/run/weft/observe.sock";
/// The longest line either side accepts, bytes.
pub const MAX_LINE: usize = 1 << 20;

/// The observe socket of a NetManager with this CNI socket.
#[must_use]
pub fn beside(cni: &Path) -> PathBuf {
    cni.with_file_name("observe.sock")
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Tell what happens to flows, from now on.
    Flows(FlowsRequest),
    /// Say what would happen to a packet.
    Trace(TraceRequest),
}

/// Which flows, and how many.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FlowsRequest {
    /// Which.
    pub filter: Filter,
    /// One flow in so many; the most that any client asks for is what the kernel reports.
    pub sample_every: u32,
    /// At most so many events per second on the whole node; what is beyond is counted.
    pub per_second: u32,
}

impl Default for FlowsRequest {
    fn default() -> Self {
        Self {
            filter: Filter::default(),
            sample_every: 1,
            per_second: 1_000,
        }
    }
}

/// Which events are told: those that fit everything that is set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Filter {
    /// `namespace/application/service`, or its last parts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// `namespace/name` of a pod of this node at either end, or its name alone; `node` is the node itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// What happened.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
}

impl Filter {
    /// Whether an event is told.
    #[must_use]
    pub fn fits(&self, event: &FlowEvent) -> bool {
        let fits = |wanted: &Option<String>, names: &[&Option<String>]| {
            wanted.as_ref().is_none_or(|wanted| {
                let mut names = names.iter().filter_map(|name| name.as_deref());
                names.any(|name| is_named(name, wanted))
            })
        };
        self.verdict.is_none_or(|verdict| verdict == event.verdict)
            && fits(&self.service, &[&event.service])
            && fits(&self.pod, &[&event.from.pod, &event.to.pod])
    }
}

/// Whether `wanted` is `name` or its last parts.
#[must_use]
pub fn is_named(name: &str, wanted: &str) -> bool {
    name.strip_suffix(wanted)
        .is_some_and(|before| before.is_empty() || before.ends_with('/'))
}

/// What happened to a flow or packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// A new flow got its backend.
    Opened,
    /// Both directions of a connection ended, or it was reset.
    Ended,
    /// A packet was dropped or answered instead of forwarded.
    Refused,
    /// A probe was handed to an endpoint of this node.
    Delivered,
    /// A probe was sent into the tunnel.
    Tunnelled,
}

impl Verdict {
    /// Every verdict.
    pub const ALL: [Self; 5] = [
        Self::Opened,
        Self::Ended,
        Self::Refused,
        Self::Delivered,
        Self::Tunnelled,
    ];

    /// The name on the wire and on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Opened => "opened",
            Self::Ended => "ended",
            Self::Refused => "refused",
            Self::Delivered => "delivered",
            Self::Tunnelled => "tunnelled",
        }
    }

    /// The verdict with a name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|verdict| verdict.name() == name)
    }
}

/// One end of a packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Address and port; for an ICMP echo its identifier stands for the port of whom asked.
    pub address: SocketAddr,
    /// The pod of this node that has the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_address(f, self.address)?;
        match &self.pod {
            Some(pod) => write!(f, " ({pod})"),
            None => Ok(()),
        }
    }
}

/// Without a port where there is none.
fn write_address(f: &mut fmt::Formatter<'_>, address: SocketAddr) -> fmt::Result {
    match address.port() {
        0 => write!(f, "{}", address.ip()),
        _ => write!(f, "{address}"),
    }
}

/// An event of the flow log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowEvent {
    /// Milliseconds since the epoch.
    pub time_ms: u64,
    /// The node that saw it, within its cluster.
    pub node: String,
    /// What happened.
    pub verdict: Verdict,
    /// Why it was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// `TCP`, `UDP`, `ICMP`, or a number.
    pub protocol: String,
    /// Who sent it; of a flow, the client.
    pub from: Place,
    /// Whither; of a flow, the VIP.
    pub to: Place,
    /// The VIP's service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// The VIP's policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// Whither it goes in truth; of a flow, the backend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub translated_to: Option<SocketAddr>,
    /// The backend's slot number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<u32>,
    /// The number of the backend's node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend_node: Option<u32>,
    /// How old the connection was at its end, seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age_s: Option<u32>,
    /// Whether it is of a probe.
    #[serde(default)]
    pub probe: bool,
}

impl fmt::Display for FlowEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of_day = self.time_ms % 86_400_000;
        let (minutes, ms) = (of_day / 60_000, of_day % 60_000);
        write!(
            f,
            "{:02}:{:02}:{:02}.{:03} {}: {}",
            minutes / 60,
            minutes % 60,
            ms / 1_000,
            ms % 1_000,
            self.node,
            self.verdict.name()
        )?;
        if let Some(reason) = &self.reason {
            write!(f, " {reason}")?;
        }
        write!(f, " {} {} -> {}", self.protocol, self.from, self.to)?;
        match (&self.service, &self.policy) {
            (Some(service), Some(policy)) => write!(f, " {service} {policy}")?,
            (Some(service), None) => write!(f, " {service}")?,
            _ => {}
        }
        if let Some(address) = self.translated_to {
            f.write_str(" => ")?;
            write_address(f, address)?;
        }
        if let Some(instance) = self.instance {
            write!(f, " #{instance}")?;
        }
        if let Some(node) = self.backend_node {
            write!(f, " on node {node}")?;
        }
        if let Some(age) = self.age_s {
            write!(f, " after {age} s")?;
        }
        if self.probe {
            f.write_str(" [probe]")?;
        }
        Ok(())
    }
}

/// What the door says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Said {
    /// It begins: what is sampled from now on.
    Following {
        /// One flow in so many.
        sample_every: u32,
        /// At most so many events per second.
        per_second: u32,
    },
    /// An event.
    Flow(Box<FlowEvent>),
    /// Events that nobody saw, since the last such line.
    Lost {
        /// Because the second had its share.
        limited: u64,
        /// Because the ring was full.
        full: u64,
    },
    /// The last line to a client that is cut off.
    Cut {
        /// Why, and what to do.
        why: String,
    },
    /// The answer to a trace.
    Trace(Box<Trace>),
    /// The last line of a probe: what is not shown.
    Probed {
        /// Whether an answer of the backend was seen.
        answered: bool,
        /// What cannot be seen from here.
        note: String,
    },
    /// The request is not granted.
    Refused {
        /// Why, and what to do.
        message: String,
    },
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Following {
                sample_every,
                per_second,
            } => write!(
                f,
                "following one flow in {sample_every}, at most {per_second} events per second"
            ),
            Self::Flow(event) => event.fmt(f),
            Self::Lost { limited, full } => write!(
                f,
                "not shown: {limited} events beyond the bound (--per-second, --sample), {full} because the ring was full"
            ),
            Self::Cut { why } => f.write_str(why),
            Self::Trace(trace) => trace.fmt(f),
            Self::Probed { note, .. } => f.write_str(note),
            Self::Refused { message } => f.write_str(message),
        }
    }
}

#[cfg(test)]
mod tests;
