use netmanager_api::table::{Mesh, Node, Revision};

use super::*;

const NOW: u64 = 1_800_000_000_000;

fn table(blocks4: &[&str]) -> Table {
    Table {
        revision: Revision::default(),
        mesh: Mesh {
            prefix6: "fd12:3456:789a::/48".parse().unwrap(),
            prefix4: Some("10.16.0.0/12".parse().unwrap()),
            seed: 1,
        },
        node: Node {
            number: 9,
            blocks4: blocks4.iter().map(|block| block.parse().unwrap()).collect(),
            carbon_g_kwh: None,
        },
        peers: Vec::new(),
        services: Vec::new(),
        spliced: Vec::new(),
    }
}

fn wish(container: &str) -> Reserve {
    Reserve {
        key: AttachmentKey {
            network: "weft".into(),
            container_id: container.into(),
            ifname: "net1".into(),
        },
        netns: format!("/run/netns/{container}"),
        pod: PodRef::default(),
        instance: None,
        mac: None,
    }
}

#[test]
fn a_node_that_lost_its_state_begins_after_every_number_it_can_have_given() {
    let mut attachments = Attachments::default();
    attachments.raise_numbers(7);
    attachments.begin_anew((EPOCH_S + 3_600) * 1_000);
    assert_eq!(attachments.last_number, 3_600);
    attachments.begin_anew(0);
    assert_eq!(
        attachments.last_number, 3_600,
        "a clock that was set back lowers nothing"
    );
}

#[test]
fn the_same_key_gets_the_same_answer() {
    let table = table(&["10.16.0.0/27"]);
    let mut attachments = Attachments::default();
    let first = attachments
        .reserve(&wish("a"), &table, NOW)
        .unwrap()
        .clone();
    assert_eq!(first.number, 2, "1 is the node endpoint");
    assert_eq!(
        first.addr6,
        "fd12:3456:789a::9:0:2".parse::<Ipv6Addr>().unwrap()
    );
    assert_eq!(first.addr4, Some(Ipv4Addr::new(10, 16, 0, 1)));
    assert!(first.host_ifname.len() == 13 && first.host_ifname.starts_with("wf"));
    assert_eq!(attachments.reserve(&wish("a"), &table, NOW + 1), Ok(&first));
    let second = attachments.reserve(&wish("b"), &table, NOW).unwrap();
    assert_eq!(
        (second.number, second.addr4),
        (3, Some(Ipv4Addr::new(10, 16, 0, 2)))
    );
    assert_ne!(second.host_ifname, first.host_ifname);
}

#[test]
fn numbers_are_never_given_again_and_ipv4_addresses_rest() {
    let table = table(&["10.16.0.0/27"]);
    let mut attachments = Attachments::default();
    attachments.reserve(&wish("a"), &table, NOW).unwrap();
    attachments.release(&wish("a").key, NOW).unwrap();
    let next = attachments.reserve(&wish("b"), &table, NOW + 1).unwrap();
    assert_eq!(
        (next.number, next.addr4),
        (3, Some(Ipv4Addr::new(10, 16, 0, 2)))
    );
    let rested = attachments
        .reserve(&wish("c"), &table, NOW + REST4_MS)
        .unwrap();
    assert_eq!(
        (rested.number, rested.addr4),
        (4, Some(Ipv4Addr::new(10, 16, 0, 1)))
    );
}

#[test]
fn the_address_that_rests_the_longest_is_taken_before_an_attachment_fails() {
    let table = table(&["10.16.0.32/27"]);
    let mut attachments = Attachments::default();
    for number in 0..32 {
        attachments
            .reserve(&wish(&format!("c{number}")), &table, NOW)
            .unwrap();
    }
    assert_eq!(
        attachments.reserve(&wish("late"), &table, NOW).cloned(),
        Err(AttachError::NoAddress4 { blocks: 1 })
    );
    attachments.release(&wish("c7").key, NOW + 1);
    attachments.release(&wish("c3").key, NOW + 2);
    let late = attachments.reserve(&wish("late"), &table, NOW + 3).unwrap();
    assert_eq!(late.addr4, Some(Ipv4Addr::new(10, 16, 0, 32 + 7)));
}

#[test]
fn a_node_without_blocks_gives_ipv6_only() {
    let mut attachments = Attachments::default();
    assert_eq!(
        attachments
            .reserve(&wish("a"), &table(&[]), NOW)
            .unwrap()
            .addr4,
        None
    );
}

#[test]
fn the_node_endpoint_keeps_its_address_and_nobody_else_gets_it() {
    let both = table(&["10.16.0.0/27", "10.16.0.32/27"]);
    let mut attachments = Attachments::default();
    let (addr6, addr4) = attachments.node_addresses(&both, NOW).unwrap();
    assert_eq!(addr6, "fd12:3456:789a::9:0:1".parse::<Ipv6Addr>().unwrap());
    assert_eq!(addr4, Some(Ipv4Addr::new(10, 16, 0, 1)));
    assert_ne!(
        attachments.reserve(&wish("a"), &both, NOW).unwrap().addr4,
        addr4
    );
    assert_eq!(attachments.node_addresses(&both, NOW).unwrap().1, addr4);
    let moved = attachments
        .node_addresses(&table(&["10.16.0.32/27"]), NOW)
        .unwrap();
    assert_eq!(moved.1, Some(Ipv4Addr::new(10, 16, 0, 32)));
}

#[test]
fn only_activated_attachments_are_published_and_garbage_is_by_network() {
    let table = table(&["10.16.0.0/27"]);
    let mut attachments = Attachments::default();
    for name in ["a", "b"] {
        attachments.reserve(&wish(name), &table, NOW).unwrap();
    }
    attachments.activate(&wish("b").key, 17).unwrap();
    assert_eq!(
        attachments
            .pods()
            .iter()
            .map(|pod| pod.ifindex)
            .collect::<Vec<_>>(),
        [17]
    );
    assert_eq!(attachments.endpoints().len(), 1);
    assert_eq!(
        attachments.not_kept("weft", &[wish("b").key]),
        [wish("a").key]
    );
    assert_eq!(attachments.not_kept("other", &[]), []);
    assert!(attachments.activate(&wish("c").key, 1).is_err());
    assert_eq!(attachments.release(&wish("c").key, NOW), None);
}

#[test]
fn a_mac_that_is_asked_for_is_given_or_refused_and_then_nothing_is_taken() {
    let table = table(&["10.16.0.0/27"]);
    let mut attachments = Attachments::default();
    let asked = |mac: &str| Reserve {
        mac: Some(mac.into()),
        ..wish("a")
    };
    assert!(
        attachments
            .reserve(&asked("01:00:00:00:00:01"), &table, NOW)
            .is_err()
    );
    assert_eq!(attachments, Attachments::default());
    let given = attachments
        .reserve(&asked("02:12:34:56:78:9a"), &table, NOW)
        .unwrap();
    assert_eq!(given.mac.to_string(), "02:12:34:56:78:9a");
}
