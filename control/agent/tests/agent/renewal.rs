//! A certificate that is renewed while the agent runs.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use netmanager_api::{
    identity::{Credentials, Role, SERVER_NAME, Shown},
    stream::{FromNode, Measured},
};
use rustls::ClientConfig;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::{
    Running,
    authority::Authority,
    fake::{FakeDriver, FakeNode, hello, soon},
};

/// Which certificate the agent shows.
async fn shown_at(door: SocketAddr, tls: Arc<ClientConfig>) -> String {
    let tcp = TcpStream::connect(door).await.unwrap();
    let name = SERVER_NAME.try_into().unwrap();
    let stream = TlsConnector::from(tls).connect(name, tcp).await.unwrap();
    Shown::of_peer(stream.get_ref().1).unwrap().fingerprint
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_shows_a_renewed_certificate_and_its_streams_go_on() {
    let authority = Authority::new();
    let nobody = vec!["127.0.0.1:1".parse().unwrap()];
    let agent = Running::start(&authority, nobody, None, FakeDriver::new()).await;
    let node: Credentials = authority.issue("node/edge/n1");
    let is_agent = |role: &Role| matches!(role, Role::Agent { .. });
    let tls = node.client(&[b"h2"], is_agent).unwrap();
    let stream = FakeNode::dial(agent.door, &node, hello("n1"))
        .await
        .unwrap();
    let before = shown_at(agent.door, tls.clone()).await;
    assert_eq!(shown_at(agent.door, tls.clone()).await, before);

    authority.forge("agent/edge", "agent-edge", |_| {});
    soon("the new certificate", async {
        while shown_at(agent.door, tls.clone()).await == before {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    stream.say(FromNode::Measured(Measured::default())).await;
    agent.end().await;
}
