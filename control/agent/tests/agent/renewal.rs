//! A certificate that is renewed while the agent runs.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use netmanager_api::{
    identity::{BACKDATED, Credentials, Role, SERVER_NAME, Shown},
    stream::{FromNode, Measured},
};
use rcgen::KeyPair;
use rustls::ClientConfig;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::{
    Running,
    authority::Authority,
    fake::{FakeDriver, FakeLead, FakeNode, Renewals, hello, soon},
    log::Log,
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

const DAY: Duration = Duration::from_secs(86_400);

/// Credentials that a lead signed twenty days ago, for a month in all.
fn signed_long_ago(authority: &Authority) -> Credentials {
    let key = KeyPair::generate().unwrap();
    let chain = authority.delegate("a").sign("agent/edge", &key, |params| {
        let issued = SystemTime::now() - 21 * DAY;
        params.not_before = (issued - BACKDATED).into();
        params.not_after = (issued + 30 * DAY).into();
    });
    Credentials::load(&authority.keep("agent/edge", &chain, &key)).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_renews_a_certificate_of_a_lead_s_in_time_and_shows_the_new_one() {
    let authority = Authority::new();
    let own = signed_long_ago(&authority);
    let before = own.shown();
    let renewals = Renewals(authority.delegate("b"));
    let lead = FakeLead::start_with(&authority.issue("lead/b"), Some(renewals)).await;
    let nobody = "127.0.0.1:1".parse().unwrap();
    let leads = vec![nobody, lead.address];
    let agent = Running::start_as(own, leads, None, FakeDriver::new()).await;
    let node: Credentials = authority.issue("node/edge/n1");
    let is_agent = |role: &Role| matches!(role, Role::Agent { .. });
    let tls = node.client(&[b"h2"], is_agent).unwrap();
    soon("the new certificate", async {
        while shown_at(agent.door, tls.clone()).await == before.fingerprint {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    agent.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_whose_certificate_nobody_renews_says_so_and_goes_on() {
    let authority = Authority::new();
    let lead = FakeLead::start(&authority.issue("lead/a")).await;
    let own = signed_long_ago(&authority);
    let before = own.shown().fingerprint;
    let agent = Running::start_as(own, vec![lead.address], None, FakeDriver::new()).await;
    Log::says(&["no lead renews the own certificate"]).await;
    let node: Credentials = authority.issue("node/edge/n1");
    let is_agent = |role: &Role| matches!(role, Role::Agent { .. });
    let tls = node.client(&[b"h2"], is_agent).unwrap();
    assert_eq!(shown_at(agent.door, tls).await, before);
    agent.end().await;
}
