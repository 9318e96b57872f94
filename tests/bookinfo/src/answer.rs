//! What every service answers: who served, and what those answered whom it called.

use std::{env, net::SocketAddr};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// One service's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// Who served.
    pub(crate) server: Server,
    /// What the service is asked for.
    pub(crate) content: Value,
    /// The answers of the services that it called.
    pub(crate) calls: Vec<Answer>,
    /// Why calls failed; empty when all is well.
    pub(crate) failures: Vec<String>,
}

/// Who served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Server {
    /// Name of the service, with its version: `reviews-v2`.
    pub(crate) service: String,
    /// The slot's number.
    pub(crate) instance: Option<u32>,
    /// The binding's epoch.
    pub(crate) epoch: Option<u64>,
    /// The node, where the driver says it.
    pub(crate) node: Option<String>,
    /// The address on which this request arrived: the instance's endpoint, not the VIP.
    pub(crate) address: Option<SocketAddr>,
}

impl Server {
    /// This process, by its environment.
    pub(crate) fn this(service: String) -> Self {
        let text = |name: &str| env::var(name).ok();
        let number = |name: &str| text(name).and_then(|value| value.parse().ok());
        Self {
            service,
            instance: number("WEFT_INSTANCE").and_then(|value| u32::try_from(value).ok()),
            epoch: number("WEFT_EPOCH"),
            node: text("WEFT_NODE"),
            address: None,
        }
    }

    /// `service@node`, or the address where the driver does not say.
    pub(crate) fn place(&self) -> String {
        let Self { service, .. } = self;
        match (&self.node, self.address) {
            (Some(node), _) => format!("{service}@{node}"),
            (None, Some(address)) => format!("{service}@{}", address.ip()),
            (None, None) => format!("{service}@unknown"),
        }
    }
}

impl Answer {
    /// This answer's server and those of all answers below it.
    pub(crate) fn servers(&self) -> Vec<&Server> {
        let mut servers = vec![&self.server];
        servers.extend(self.calls.iter().flat_map(Self::servers));
        servers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(service: &str, calls: Vec<Answer>) -> Answer {
        Answer {
            server: Server {
                service: service.into(),
                instance: Some(0),
                epoch: Some(3),
                node: None,
                address: Some("[::ffff:10.16.0.5]:9080".parse().unwrap()),
            },
            content: Value::Null,
            calls,
            failures: Vec::new(),
        }
    }

    #[test]
    fn every_server_below_an_answer_is_named() {
        let page = answer(
            "productpage",
            vec![
                answer("details", vec![]),
                answer("reviews-v2", vec![answer("ratings", vec![])]),
            ],
        );
        let names: Vec<_> = page.servers().iter().map(|s| s.service.as_str()).collect();
        assert_eq!(names, ["productpage", "details", "reviews-v2", "ratings"]);
    }

    #[test]
    fn a_place_is_a_node_where_the_driver_says_so_and_else_an_address() {
        let mut server = answer("details", vec![]).server;
        assert_eq!(server.place(), "details@::ffff:10.16.0.5");
        server.node = Some("fog-1".into());
        assert_eq!(server.place(), "details@fog-1");
    }
}
