//! Line 6: CHECK.

use serde_json::{Value, json};

use crate::{
    attach::host_and_pod,
    door::{FakeDoor, Mood},
    plugin::Plugin,
};

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn check_names_what_is_gone() {
    for (harm, word) in [
        ("link del net1", "net1 is gone"),
        ("link set net1 down", "net1 is down"),
        (
            "link set net1 address 02:00:00:00:00:77",
            "02:00:00:00:00:77",
        ),
        ("link set net1 group 5", "another interface"),
        ("addr del 10.16.0.34/32 dev net1", "10.16.0.34"),
        ("addr del fd00:1:2::7:0:2/128 dev net1", "fd00:1:2::7:0:2"),
        (
            "route del 10.16.0.0/12 metric 10",
            "route to the mesh via 10.16.0.33",
        ),
        (
            "-6 route del fd00:1:2::/48 metric 10",
            "route to the mesh via fd00:1:2::7:0:1",
        ),
        (
            "-6 route del fd00:1:2::/48 metric 4294967295",
            "unreachable",
        ),
        (
            "neigh del 10.16.0.33 dev net1",
            "permanent neighbour 10.16.0.33",
        ),
    ] {
        let (host, pod) = host_and_pod();
        let door = FakeDoor::open();
        let add = Plugin::new("ADD", &door).on(&host, &pod);
        let check = add
            .clone()
            .command("CHECK")
            .set("prevResult", add.succeed());
        check.succeed();
        pod.ip(harm);
        let (code, message) = check.fail();
        assert_eq!(code, 101, "{harm}: {message}");
        assert!(message.contains(word), "{harm}: {message}");
        add.command("DEL").succeed();
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn check_fails_without_registration_result_or_netmanager() {
    let (host, pod) = host_and_pod();
    let door = FakeDoor::open();
    let add = Plugin::new("ADD", &door).on(&host, &pod);
    let check = add
        .clone()
        .command("CHECK")
        .set("prevResult", add.succeed());
    let (code, message) = check.clone().set("prevResult", Value::Null).fail();
    assert_eq!(code, 7, "{message}");
    let (code, message) = check
        .clone()
        .set("prevResult", json!({"interfaces": []}))
        .fail();
    assert_eq!(code, 101, "{message}");
    let (code, _) = check
        .clone()
        .set("socket", "/run/weft-cni-nowhere/cni.sock")
        .fail();
    assert_eq!(code, 11);
    door.mood("check", Mood::Refuse(100, "not published"));
    let (code, message) = check.fail();
    assert_eq!((code, &*message), (101, "not published"));
}
