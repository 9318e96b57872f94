//! A node and its agent: the real daemon against a door with real TLS.

use netmanager_api::{
    cni::Request,
    stream::{DrainingFlows, FromNode, InstanceRef, Measured, ToNode},
    table::{
        BackendState::{Draining, Probing, Ready},
        Revision, Table,
    },
};
use tokio::{
    runtime::{Builder, Runtime},
    time::timeout,
};
use weft_tests::{
    Netns,
    traffic::{call, echo},
};

use super::{
    agent::{Agent, Authority},
    machine::{Node, SOON, VIP4, table},
};

/// A node that follows an agent, which is the test.
pub(crate) struct Followed {
    pub(crate) node: Node,
    agent: Agent,
    runtime: Runtime,
    _authority: Authority,
}

impl Followed {
    pub(crate) fn start(label: &str) -> Self {
        Self::start_with(label, |_| {})
    }

    /// The same; `prepare` works before the daemon runs.
    pub(crate) fn start_with(label: &str, prepare: impl FnOnce(&Node)) -> Self {
        let authority = Authority::new();
        let netns = Netns::new(label).unwrap();
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let folder = authority.issue("agent/edge");
        let anywhere = "127.0.0.1:0".parse().unwrap();
        let agent = netns.run(|| runtime.block_on(Agent::open(&folder, anywhere)));
        let credentials = authority.issue("node/edge/n1").display().to_string();
        let address = agent.address.to_string();
        let args = ["--agent", &address, "--credentials", &credentials];
        let mut node = Node::prepare_in(netns, 1, &args);
        prepare(&node);
        node.run();
        Self {
            node,
            agent,
            runtime,
            _authority: authority,
        }
    }

    fn tell(&self, table: Table) {
        self.say(ToNode::Table(Box::new(table)));
    }

    /// Says something to the node.
    pub(crate) fn say(&self, word: ToNode) {
        let told = self.agent.tell.send(Ok(word));
        self.runtime.block_on(told).unwrap();
    }

    /// The next word that `wanted` takes.
    fn hear<T>(&mut self, wanted: impl Fn(FromNode) -> Option<T>) -> T {
        let said = &mut self.agent.said;
        let heard = async {
            loop {
                if let Some(found) = wanted(said.recv().await.unwrap()) {
                    return found;
                }
            }
        };
        let heard = self.runtime.block_on(async { timeout(SOON, heard).await });
        heard.unwrap_or_else(|_| {
            let refused = self.agent.refused.try_recv().ok();
            panic!("not said ({refused:?}):\n{}", self.node.log())
        })
    }

    /// Tells a table and waits until the kernel matches it.
    pub(crate) fn apply(&mut self, table: Table) {
        let revision = table.revision;
        self.tell(table);
        self.hear(|word| (word == FromNode::Applied { revision }).then_some(()));
    }

    fn measured(&mut self, wanted: impl Fn(&Measured) -> bool) {
        self.hear(|word| match word {
            FromNode::Measured(measured) if wanted(&measured) => Some(()),
            _ => None,
        });
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_node_says_who_it_is_what_it_holds_and_what_it_measured() {
    let mut lab = Followed::start("agent");
    let hello = lab.hear(|word| match word {
        FromNode::Hello(hello) => Some(hello),
        _ => None,
    });
    assert_eq!((hello.node.as_str(), hello.applied), ("n1", None));
    assert_eq!(hello.public_key.len(), 44, "{}", hello.public_key);
    assert_ne!(hello.tunnel_port, 0);
    lab.node.wait_open();
    let refused = lab.node.refusal(&Request::Status);
    assert_eq!(refused.code, 50);
    assert!(
        refused.message.contains("its agent at 127.0.0.1:"),
        "{refused}"
    );

    lab.apply(table(1, Vec::new()));
    let (client, server) = (lab.node.attach("c"), lab.node.attach("s"));
    server.serve("server");
    lab.hear(|word| match word {
        FromNode::Endpoints { endpoints } if endpoints.len() == 2 => Some(()),
        _ => None,
    });

    let instance = InstanceRef {
        service: "default/shop/web".into(),
        instance: 0,
        epoch: 1,
    };
    lab.apply(table(2, vec![server.backend(0, Probing)]));
    assert!(
        call(&client.netns, VIP4).is_err(),
        "a probing backend takes no traffic"
    );
    lab.measured(|measured| measured.reached == [instance.clone()]);

    lab.apply(table(3, vec![server.backend(0, Ready)]));
    let mut streams = [call(&client.netns, VIP4), call(&client.netns, VIP4)].map(Result::unwrap);
    lab.apply(table(4, vec![server.backend(0, Draining)]));
    let draining = |flows| {
        vec![DrainingFlows {
            instance: instance.clone(),
            flows,
        }]
    };
    lab.measured(|measured| measured.draining_flows == draining(2));
    for (stream, _) in &mut streams {
        echo(stream, b"still here").unwrap();
    }
    drop(streams);
    lab.measured(|measured| measured.draining_flows == draining(0));

    lab.tell(table(2, Vec::new()));
    let restored = Table {
        revision: Revision {
            incarnation: 2,
            index: 1,
        },
        ..table(1, Vec::new())
    };
    lab.tell(restored.clone());
    let next = lab.hear(|word| match word {
        FromNode::Applied { revision } => Some(revision),
        _ => None,
    });
    assert_eq!(
        next, restored.revision,
        "an older table is nothing, a new incarnation is"
    );
}
