use std::time::Duration;

use control_core::goal::Writers;
use netmanager_api::stream::{DrainingFlows, Endpoint, FromNode, InstanceRef, Measured};

use super::*;
use crate::reconcile::tests::{Scene, id, run};

/// A scene in which instance s@1 is to run and is in `state` on n1.
fn with(state: State) -> Scene {
    let mut scene = Scene::new();
    scene.order(&id("s", 1), run(1, Writers::Many));
    scene.has(&id("s", 1), "n1", state);
    scene
}

fn attached(mut scene: Scene) -> Scene {
    let endpoints = vec![Endpoint {
        number: 2,
        addr6: "fd00::2".parse().unwrap(),
        addr4: Some("10.16.0.2".parse().unwrap()),
        instance: Some(InstanceRef {
            service: "s".to_owned(),
            instance: 0,
            epoch: 1,
        }),
    }];
    let now = scene.now;
    let node = scene.nodes.get_mut("n1").unwrap();
    assert!(node.said(1, FromNode::Endpoints { endpoints }, now));
    scene
}

fn told_of(scene: &Scene) -> InstanceReport {
    report(&scene.view()).instances.remove(0)
}

#[test]
fn an_instance_is_ready_once_it_serves_and_its_node_names_its_endpoint() {
    assert_eq!(told_of(&with(State::Serving)).phase, Phase::Starting);
    let ready = told_of(&attached(with(State::Serving)));
    assert_eq!(ready.phase, Phase::Ready);
    let endpoint = ready.endpoint.unwrap();
    assert_eq!(endpoint.addr6.to_string(), "fd00::2");
    for (state, phase) in [
        (State::Starting, Phase::Starting),
        (State::Silent, Phase::NotReady),
        (State::Restarting, Phase::NotReady),
        (State::Refused, Phase::Refused),
        (State::Stopping, Phase::Starting),
        (State::Gone, Phase::Starting),
    ] {
        assert_eq!(told_of(&attached(with(state))).phase, phase, "{state:?}");
    }
}

#[test]
fn an_order_to_stop_is_answered_with_stopped_only_when_nothing_is_left() {
    for (state, phase) in [
        (State::Serving, Phase::NotReady),
        (State::Stopping, Phase::NotReady),
        (State::Gone, Phase::Stopped),
        (State::Refused, Phase::Stopped),
    ] {
        let mut scene = attached(with(state));
        scene.order(&id("s", 1), Want::Stop);
        assert_eq!(told_of(&scene).phase, phase, "{state:?}");
    }
}

#[test]
fn a_verdict_is_told_when_nothing_of_the_instance_is_left() {
    let refused = Verdict::Refused("no room".to_owned());
    for (verdict, phase) in [(Verdict::Fenced, Phase::Stopped), (refused, Phase::Refused)] {
        let mut scene = attached(with(State::Stopping));
        scene.ledger.verdicts.insert(id("s", 1), verdict);
        assert_eq!(told_of(&scene).phase, Phase::NotReady);
        scene.has(&id("s", 1), "n1", State::Gone);
        assert_eq!(told_of(&scene).phase, phase);
    }
}

#[test]
fn an_instance_on_a_node_that_is_away_is_not_ready_unless_it_serves_on_undisturbed() {
    let mut scene = attached(with(State::Serving));
    let now = scene.now;
    scene.nodes.get_mut("n1").unwrap().broke(1, now);
    assert_eq!(told_of(&scene).phase, Phase::NotReady);
    scene.seen.insert(id("s", 1), 1);
    assert_eq!(told_of(&scene).phase, Phase::Ready);
    scene.after(Duration::from_secs(30));
    assert_eq!(told_of(&scene).phase, Phase::NotReady);
    assert!(!report(&scene.view()).nodes["n1"].ready);
    assert!(report(&scene.view()).nodes["n2"].ready);
}

#[test]
fn what_no_order_names_is_reported_so_that_it_can_be_adopted() {
    let mut scene = attached(with(State::Serving));
    scene.orders.clear();
    let stranger = told_of(&scene);
    assert_eq!((stranger.id, stranger.phase), (id("s", 1), Phase::Ready));
}

#[test]
fn a_node_passes_on_what_it_measured_without_the_noise() {
    let mut scene = Scene::new();
    let instance = InstanceRef {
        service: "s".to_owned(),
        instance: 0,
        epoch: 1,
    };
    let now = scene.now;
    let node = scene.nodes.get_mut("n1").unwrap();
    let measured = |rtt, flows| {
        FromNode::Measured(Measured {
            rtt_us: [(2, rtt)].into(),
            unreachable: Vec::new(),
            reached: vec![instance.clone()],
            draining_flows: vec![DrainingFlows {
                instance: instance.clone(),
                flows,
            }],
            coordinate: None,
        })
    };
    node.said(1, measured(20_000, 250), now);
    let first = report(&scene.view());
    assert_eq!(first.nodes["n1"].reached, [id("s", 1)]);
    assert_eq!(first.nodes["n1"].draining_flows, [(id("s", 1), 128)]);
    let node = scene.nodes.get_mut("n1").unwrap();
    node.said(1, measured(20_400, 131), now);
    assert_eq!(report(&scene.view()), first);
}
