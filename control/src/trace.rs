//! `weft trace`.

use std::net::{IpAddr, SocketAddr};

use clap::{Args, ValueEnum};
use netmanager_api::observe::{Request, TraceRequest};

use crate::node_door::Door;

/// Says what this node would do with a packet to a VIP, and why, without sending one.
#[derive(Debug, Args)]
pub(crate) struct Trace {
    /// Who sends: a pod of this node, namespace/name or its name; `node` is the node itself.
    #[arg(long)]
    from: String,
    /// The VIP, with its port: 10.24.0.5:80, [fd12::5]:80; without a port an ICMP echo.
    #[arg(long, value_parser = target)]
    to: Target,
    /// The protocol; else TCP where there is a port.
    #[arg(long, value_enum)]
    proto: Option<Protocol>,
    /// The source port, or an echo's identifier: which backend is picked depends on it.
    #[arg(long)]
    sport: Option<u16>,
    /// Send one marked packet, and show where this node sees it and its answer.
    #[arg(long)]
    probe: bool,
    #[command(flatten)]
    door: Door,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Protocol {
    Tcp,
    Udp,
    Icmp,
}

/// An address, and a port where there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Target(IpAddr, Option<u16>);

fn target(text: &str) -> Result<Target, String> {
    text.parse()
        .map(|address: SocketAddr| Target(address.ip(), Some(address.port())))
        .or_else(|_| text.parse().map(|address| Target(address, None)))
        .map_err(|_| "it is an address or ADDRESS:PORT, IPv6 with a port in brackets".to_owned())
}

impl Trace {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let Target(to, port) = self.to;
        let usual = match port {
            Some(_) => Protocol::Tcp,
            None => Protocol::Icmp,
        };
        let protocol = match self.proto.unwrap_or(usual) {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Icmp => "icmp",
        };
        let request = TraceRequest {
            from: self.from,
            to,
            port,
            protocol: protocol.to_owned(),
            sport: self.sport,
            probe: self.probe,
        };
        self.door.ask(&Request::Trace(request), None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_an_address_with_or_without_a_port() {
        let v4 = IpAddr::from([10, 24, 0, 5]);
        assert_eq!(target("10.24.0.5:80"), Ok(Target(v4, Some(80))));
        assert_eq!(target("10.24.0.5"), Ok(Target(v4, None)));
        let v6 = "fd12::5".parse().unwrap();
        assert_eq!(target("[fd12::5]:80"), Ok(Target(v6, Some(80))));
        assert_eq!(target("fd12::5"), Ok(Target(v6, None)));
        assert!(target("reviews").is_err());
    }
}
