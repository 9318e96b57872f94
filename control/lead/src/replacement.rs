//! The commands by which another member takes the place of a lead whose data do not serve any more.

use std::{collections::BTreeMap, fmt, net::SocketAddr, path::PathBuf};

use crate::Options;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replacement {
    name: String,
    data: PathBuf,
    credentials: PathBuf,
    listen: SocketAddr,
    advertise: Option<SocketAddr>,
    tokens: Option<SocketAddr>,
    /// The other leads, as far as they are known.
    others: BTreeMap<String, SocketAddr>,
}

impl Replacement {
    /// Of the lead that was started with `options`, in the group of `members`.
    pub(crate) fn new(options: &Options, members: BTreeMap<String, SocketAddr>) -> Self {
        let mut others = match members.is_empty() {
            true => options
                .peers
                .iter()
                .chain(&options.join)
                .map(|(name, at)| (name.clone(), *at))
                .collect(),
            false => members,
        };
        others.remove(&options.name);
        Self {
            name: options.name.clone(),
            data: options.data.clone(),
            credentials: options.credentials.clone(),
            listen: options.listen,
            advertise: options.advertise.filter(|it| *it != options.listen),
            tokens: options.tokens,
            others,
        }
    }
}

impl fmt::Display for Replacement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, listen, .. } = self;
        let (data, credentials) = (self.data.display(), self.credentials.display());
        let others = self
            .others
            .iter()
            .map(|(name, address)| format!("{name}={address}"));
        let mut join = others.collect::<Vec<_>>().join(",");
        if join.is_empty() {
            join = "NAME=IP:PORT".to_owned();
        }
        writeln!(
            f,
            "what the group acknowledged is with the other leads; put another member in this one's place (with one lead only: weft restore):"
        )?;
        writeln!(f, "mv {data} {data}.damaged")?;
        write!(
            f,
            "weft lead --name {name} --data {data} --credentials {credentials} --listen {listen}"
        )?;
        if let Some(advertise) = self.advertise {
            write!(f, " --advertise {advertise}")?;
        }
        if let Some(tokens) = self.tokens {
            write!(f, " --listen-tokens {tokens}")?;
        }
        writeln!(f, " --join {join}")?;
        let address = self.advertise.unwrap_or(*listen);
        write!(
            f,
            "weft lead replace {name} --with {name} --address {address} --wait 60s"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(number: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, number], 7000))
    }

    #[test]
    fn the_commands_name_the_lead_and_all_others() {
        let options = Options {
            name: "c".to_owned(),
            data: "data-c".into(),
            credentials: "lead-c".into(),
            listen: address(3),
            advertise: None,
            tokens: None,
            mesh: None,
            peers: BTreeMap::new(),
            join: BTreeMap::new(),
            lease: std::time::Duration::from_secs(10),
            timers: crate::Timers::default(),
            reserve: None,
            requests_per_second: crate::REQUESTS,
        };
        let members = [("a", 1), ("b", 2), ("c", 3)];
        let members = members.map(|(name, number)| (name.to_owned(), address(number)));
        let text = Replacement::new(&options, members.into()).to_string();
        let lines: Vec<_> = text.lines().skip(1).collect();
        assert_eq!(
            lines,
            [
                "mv data-c data-c.damaged",
                "weft lead --name c --data data-c --credentials lead-c --listen 192.0.2.3:7000 --join a=192.0.2.1:7000,b=192.0.2.2:7000",
                "weft lead replace c --with c --address 192.0.2.3:7000 --wait 60s",
            ]
        );
        let behind = Options {
            advertise: Some(address(9)),
            peers: [("a".to_owned(), address(1))].into(),
            ..options
        };
        let text = Replacement::new(&behind, BTreeMap::new()).to_string();
        for part in [
            "--advertise 192.0.2.9:7000 --join a=192.0.2.1:7000",
            "--address 192.0.2.9:7000",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}
