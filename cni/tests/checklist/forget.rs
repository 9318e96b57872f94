//! Lines 5 and 7: DEL and GC, as far as they need no namespace.

use netmanager_api::cni::{AttachmentKey, Request};
use serde_json::{Value, json};

use crate::{
    door::{FakeDoor, Mood},
    plugin::Plugin,
};

fn key(ifname: &str) -> AttachmentKey {
    AttachmentKey {
        network: "weft".into(),
        container_id: "c1".into(),
        ifname: ifname.into(),
    }
}

#[test]
fn del_succeeds_when_there_is_nothing_to_delete() {
    let door = FakeDoor::open();
    let del = Plugin::new("DEL", &door);
    let cases = [
        del.clone(),
        del.clone().env("CNI_NETNS", ""),
        del.clone().env("CNI_NETNS", "/run/netns/gone"),
        del.clone().env("CNI_NETNS", "/etc/passwd"),
        del.clone().set(
            "prevResult",
            json!({"interfaces": [{"name": "net1", "sandbox": "/gone"}]}),
        ),
        del.clone().set("prevResult", Value::Null),
    ];
    for plugin in cases {
        assert_eq!(plugin.succeed(), Value::Null);
        assert_eq!(plugin.succeed(), Value::Null, "and again");
    }
    let released = |key| Request::Release { key };
    assert_eq!(
        door.asked()[..2],
        [released(key("net1")), released(key("weft0"))]
    );
    assert!(!door.pending().exists());
}

#[test]
fn del_queues_the_release_when_nobody_is_at_the_door() {
    let door = FakeDoor::closed();
    for _ in 0..2 {
        Plugin::new("DEL", &door).succeed();
    }
    for ifname in ["net1", "weft0"] {
        let file = door.pending().join(key(ifname).file_name());
        let line = std::fs::read_to_string(file).unwrap();
        assert_eq!(
            serde_json::from_str::<Request>(&line).unwrap(),
            Request::Release { key: key(ifname) }
        );
    }
    assert_eq!(std::fs::read_dir(door.pending()).unwrap().count(), 2);
}

#[test]
fn del_queues_the_release_when_the_netmanager_hangs_or_is_busy() {
    for mood in [Mood::Hang, Mood::Refuse(11, "starting")] {
        let door = FakeDoor::open();
        door.mood("release", mood);
        Plugin::new("DEL", &door).succeed();
        assert_eq!(std::fs::read_dir(door.pending()).unwrap().count(), 2);
        door.good_mood();
        Plugin::new("DEL", &door).succeed();
        assert_eq!(
            std::fs::read_dir(door.pending()).unwrap().count(),
            0,
            "done now"
        );
    }
}

#[test]
fn del_goes_on_after_an_error_and_reports_it() {
    let door = FakeDoor::open();
    door.mood("release", Mood::Refuse(100, "the disk is full"));
    let (code, message) = Plugin::new("DEL", &door).fail();
    assert_eq!(code, 100);
    assert_eq!(message, "the disk is full the disk is full");
    assert_eq!(door.ops(), ["release", "release"]);
}

#[test]
fn gc_keeps_the_valid_attachments_chained_or_not() {
    let door = FakeDoor::open();
    let gc = Plugin::new("GC", &door)
        .unset("CNI_CONTAINERID")
        .unset("CNI_IFNAME");
    let valid =
        json!([{"containerID": "c1", "ifname": "net1"}, {"containerID": "c2", "ifname": "eth0"}]);
    gc.set("cni.dev/valid-attachments", valid).succeed();
    let Some(Request::Gc { network, keep }) = door.asked().pop() else {
        panic!("no GC asked: {:?}", door.asked());
    };
    assert_eq!(network, "weft");
    assert_eq!(keep[..2], [key("net1"), key("weft0")]);
    assert_eq!(keep[2].container_id, "c2");
    assert_eq!(keep.len(), 4);
}

#[test]
fn gc_without_the_list_is_an_error_and_an_empty_list_is_none() {
    let door = FakeDoor::open();
    let (code, message) = Plugin::new("GC", &door).fail();
    assert_eq!(code, 7);
    assert!(message.contains("cni.dev/valid-attachments"), "{message}");
    assert!(door.asked().is_empty());
    Plugin::new("GC", &door)
        .set("cni.dev/valid-attachments", json!([]))
        .succeed();
    assert_eq!(door.ops(), ["gc"]);
}

#[test]
fn gc_carries_out_queued_releases_and_goes_on_after_errors() {
    let door = FakeDoor::open();
    door.mood("release", Mood::Refuse(11, "busy"));
    Plugin::new("DEL", &door).succeed();
    std::fs::write(door.pending().join("0-broken.json"), "{").unwrap();
    std::fs::write(door.pending().join(".half-written"), "{").unwrap();
    door.good_mood();
    let gc = Plugin::new("GC", &door).set("cni.dev/valid-attachments", json!([]));
    let (code, message) = gc.fail();
    assert_eq!(code, 5);
    assert!(message.contains("0-broken.json"), "{message}");
    assert_eq!(door.ops()[2..], ["release", "release", "gc"]);
    let left: Vec<_> = std::fs::read_dir(door.pending())
        .unwrap()
        .flatten()
        .map(|e| e.file_name())
        .collect();
    assert_eq!(left.len(), 2, "{left:?}");
    assert!(door.path().exists());
}
