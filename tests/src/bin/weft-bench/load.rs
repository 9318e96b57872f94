//! The loads: a TCP stream, a ping-pong of one byte, connections, one after the other, that carry one byte, and
//! small datagrams.
//!
//! Client and server are threads of this process, each in its pod's namespace, with blocking sockets and nothing between them and
//! the kernel. Each has its own CPU, or both share one: what wakes the other's CPU costs the same whichever way the bytes
//! go, on a virtual machine more than all of the way, so that only one CPU shows what the way costs.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, Result};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use serde::Serialize;
use weft_tests::Netns;

mod tcp;
mod udp;

/// The CPUs of the client and of the server, where they have two.
pub(crate) const CPUS: [usize; 2] = [0, 1];
/// How long a single read or connect may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum Metric {
    /// One TCP stream, Gbit/s.
    Throughput,
    /// One byte there and one back on one connection, per second.
    RequestResponse,
    /// The same, the median time of one.
    #[value(name = "p50")]
    Latency,
    /// Connect, one byte, close by the server; per second.
    Connections,
    /// [`Metric::RequestResponse`] where client and server share a CPU.
    #[value(name = "request_response_one_cpu")]
    RequestResponseOneCpu,
    /// [`Metric::Connections`] where client and server share a CPU.
    #[value(name = "connections_one_cpu")]
    ConnectionsOneCpu,
    /// Small datagrams of one socket to one socket that were read, per second.
    #[value(name = "udp")]
    Datagrams,
}

impl Metric {
    pub(crate) const ALL: [Self; 7] = [
        Self::Throughput,
        Self::RequestResponse,
        Self::Latency,
        Self::Connections,
        Self::RequestResponseOneCpu,
        Self::ConnectionsOneCpu,
        Self::Datagrams,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Throughput => "throughput",
            Self::RequestResponse => "request_response",
            Self::Latency => "p50",
            Self::Connections => "connections",
            Self::RequestResponseOneCpu => "request_response_one_cpu",
            Self::ConnectionsOneCpu => "connections_one_cpu",
            Self::Datagrams => "udp",
        }
    }

    pub(crate) const fn unit(self) -> &'static str {
        match self {
            Self::Throughput => "Gbit/s",
            Self::Latency => "us",
            Self::RequestResponse
            | Self::Connections
            | Self::RequestResponseOneCpu
            | Self::ConnectionsOneCpu
            | Self::Datagrams => "1/s",
        }
    }

    /// The CPUs of the client and of the server.
    const fn cpus(self) -> [usize; 2] {
        match self {
            Self::RequestResponseOneCpu | Self::ConnectionsOneCpu => [CPUS[0], CPUS[0]],
            _ => CPUS,
        }
    }

    /// The port that its server listens on, and that the client calls.
    pub(crate) const fn port(self) -> u16 {
        match self {
            Self::Throughput => 5001,
            Self::RequestResponse => 5002,
            Self::Connections => 5003,
            Self::Datagrams => 5004,
            Self::Latency => 5005,
            Self::RequestResponseOneCpu => 5006,
            Self::ConnectionsOneCpu => 5007,
        }
    }
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Family {
    Ipv4,
    Ipv6,
}

impl Family {
    pub(crate) const ALL: [Self; 2] = [Self::Ipv4, Self::Ipv6];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Ipv4 => "ipv4",
            Self::Ipv6 => "ipv6",
        }
    }

    const fn any(self) -> IpAddr {
        match self {
            Self::Ipv4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            Self::Ipv6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        }
    }
}

/// Where a load goes: the pods at both ends, and the address that the client calls.
#[derive(Debug)]
pub(crate) struct Path<'a> {
    pub(crate) client: &'a Netns,
    pub(crate) server: &'a Netns,
    pub(crate) address: IpAddr,
}

impl Path<'_> {
    /// Where the client calls the server of a metric.
    fn target(&self, metric: Metric) -> SocketAddr {
        SocketAddr::new(self.address, metric.port())
    }

    /// Where that server listens.
    pub(crate) fn listen(&self, metric: Metric) -> SocketAddr {
        let family = match self.address {
            IpAddr::V4(_) => Family::Ipv4,
            IpAddr::V6(_) => Family::Ipv6,
        };
        SocketAddr::new(family.any(), metric.port())
    }
}

/// Loads the path for `time` and returns the value in the metric's unit.
pub(crate) fn measure(path: &Path<'_>, metric: Metric, time: Duration) -> Result<f64> {
    match metric {
        Metric::Datagrams => udp::measure(path, time),
        _ => tcp::measure(path, metric, time),
    }
    .with_context(|| format!("{} to {}", metric.name(), path.target(metric)))
}

fn pin(cpu: usize) -> Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu).context("there are not that many CPUs")?;
    sched_setaffinity(Pid::from_raw(0), &cpus)
        .with_context(|| format!("failed to run on CPU {cpu}: the bench needs two"))
}
