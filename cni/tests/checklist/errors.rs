//! Lines 2, 8 and 9: the codes of errors, STATUS, and what is let through or refused in a call.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{
    door::{FakeDoor, Mood},
    plugin::Plugin,
};

#[test]
fn the_environment_is_refused_with_all_names_at_once() {
    let door = FakeDoor::open();
    let add = Plugin::new("ADD", &door).env("CNI_NETNS", "/run/netns/gone");
    let bare = add
        .clone()
        .unset("CNI_CONTAINERID")
        .unset("CNI_NETNS")
        .unset("CNI_IFNAME");
    let cases = [
        (
            add.clone().unset("CNI_COMMAND"),
            &["CNI_COMMAND", "ADD"][..],
        ),
        (add.clone().command("ATTACH"), &["CNI_COMMAND", "ATTACH"]),
        (bare, &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        (add.clone().env("CNI_NETNS", ""), &["CNI_NETNS"]),
        (
            add.clone().env("CNI_CONTAINERID", "../x"),
            &["CNI_CONTAINERID", "../x"],
        ),
        (add.clone().env("CNI_IFNAME", "a/b"), &["CNI_IFNAME", "a/b"]),
        (
            add.clone().env("CNI_IFNAME", "sixteen-letters-"),
            &["CNI_IFNAME"],
        ),
        (
            add.clone().env("CNI_NETNS", "relative"),
            &["CNI_NETNS", "relative"],
        ),
        (add.clone(), &["CNI_NETNS", "/run/netns/gone"]),
        (
            add.clone().env("CNI_NETNS", "/etc/passwd"),
            &["CNI_NETNS", "/etc/passwd"],
        ),
        (
            add.clone().env("CNI_NETNS", "/proc/self/ns/net"),
            &["CNI_NETNS", "host"],
        ),
        (
            add.clone().env("CNI_ARGS", "K8S_POD_NAME"),
            &["CNI_ARGS", "K8S_POD_NAME"],
        ),
        (
            add.clone().env("CNI_ARGS", "WEFT_SERVICE=a/b/c"),
            &["WEFT_INSTANCE_NUMBER", "WEFT_EPOCH"],
        ),
        (
            add.clone().env(
                "CNI_ARGS",
                "WEFT_EPOCH=1;WEFT_INSTANCE_NUMBER=x;WEFT_SERVICE=a/b/c",
            ),
            &["WEFT_INSTANCE_NUMBER", "x"],
        ),
        (
            add.clone().env(
                "CNI_ARGS",
                "WEFT_EPOCH=1;WEFT_INSTANCE_NUMBER=0;WEFT_SERVICE=c",
            ),
            &["WEFT_SERVICE", "namespace/application/service"],
        ),
        (
            add.env("CNI_ARGS", "MAC=01:00:5e:00:00:01"),
            &["MAC", "group"],
        ),
    ];
    for (plugin, names) in cases {
        let (code, message) = plugin.fail();
        assert_eq!(code, 4, "{message}");
        for name in names {
            assert!(message.contains(name), "{name} in {message:?}");
        }
    }
    assert!(door.asked().is_empty(), "validated before anything is done");
}

#[test]
fn a_wrong_configuration_is_refused_by_its_key_and_value() {
    let door = FakeDoor::open();
    let add = Plugin::new("ADD", &door).env("CNI_NETNS", "/run/netns/gone");
    let ips = json!({"ips": ["10.16.0.9/32"]});
    let annotations = json!({"io.kubernetes.cri.pod-annotations": {"weft.dev/service": "a/b/c"}});
    let cases: [(Plugin, u64, &[&str]); 14] = [
        (add.clone().stdin("{"), 6, &["decode"]),
        (add.clone().stdin(""), 6, &["decode"]),
        (add.clone().stdin("[]"), 1, &["cniVersion"]),
        (add.clone().set("cniVersion", 1), 6, &["cniVersion"]),
        (add.clone().set("name", 7), 6, &["decode"]),
        (add.clone().set("prevResult", "x"), 6, &["decode"]),
        (add.clone().set("name", ""), 7, &["name"]),
        (add.clone().set("name", "a/b"), 7, &["name", "a/b"]),
        (
            add.clone().set("socket", "cni.sock"),
            7,
            &["socket", "cni.sock"],
        ),
        (add.clone().set("ifname", "a b"), 7, &["ifname", "a b"]),
        (
            add.clone()
                .set("prevResult", json!({}))
                .set("ifname", "net1"),
            7,
            &["ifname", "net1"],
        ),
        (
            add.clone().set("ipam", json!({"type": "host-local"})),
            2,
            &["ipam", "host-local"],
        ),
        (
            add.clone().set("runtimeConfig", ips),
            2,
            &["runtimeConfig.ips", "10.16.0.9/32"],
        ),
        (
            add.clone()
                .env("CNI_ARGS", "MAC=02:00:5e:00:00:01;IP=10.0.0.1"),
            2,
            &["IP", "10.0.0.1"],
        ),
    ];
    for (plugin, code, names) in cases {
        let (got, message) = plugin.fail();
        assert_eq!(got, code, "{message}");
        for name in names {
            assert!(message.contains(name), "{name} in {message:?}");
        }
    }
    let (code, message) = add.set("runtimeConfig", annotations).fail();
    assert_eq!(code, 7, "{message}");
    assert!(message.contains("weft.dev/epoch"), "{message}");
    assert!(door.asked().is_empty(), "validated before anything is done");
}

#[test]
fn status_is_truthful() {
    let door = FakeDoor::open();
    let status = Plugin::new("STATUS", &door)
        .unset("CNI_CONTAINERID")
        .unset("CNI_IFNAME");
    assert_eq!(status.succeed(), Value::Null);
    for (mood, code) in [
        (Mood::Refuse(50, "no table yet"), 50),
        (Mood::Refuse(51, "the tunnel is down"), 51),
        (Mood::Refuse(100, "no programs"), 50),
        (Mood::Garble, 50),
    ] {
        door.mood("status", mood.clone());
        let (got, message) = status.fail();
        assert_eq!(got, code, "{mood:?}: {message}");
    }
    let away = FakeDoor::closed();
    let (code, message) = Plugin::new("STATUS", &away).fail();
    assert_eq!(code, 50);
    assert!(
        message.contains(away.socket().to_str().unwrap()),
        "{message}"
    );
}

#[test]
fn a_netmanager_that_never_answers_is_given_up_in_time() {
    let door = FakeDoor::open();
    door.mood("status", Mood::Hang);
    let start = Instant::now();
    let (code, message) = Plugin::new("STATUS", &door).fail();
    assert_eq!(code, 50, "{message}");
    assert!(message.contains("did not answer"), "{message}");
    assert!(
        start.elapsed() < Duration::from_secs(8),
        "{:?}",
        start.elapsed()
    );
}
