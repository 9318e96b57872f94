//! Line 1 and 3: VERSION, and which version has which command.

use serde_json::json;

use crate::{door::FakeDoor, plugin::Plugin};

#[test]
fn version_answers_whatever_is_on_stdin() {
    let door = FakeDoor::closed();
    for (stdin, version) in [
        (r#"{"cniVersion":"1.0.0"}"#, "1.0.0"),
        (r#"{"cniVersion":"0.4.0","name":7}"#, "0.4.0"),
        (r#"{"cniVersion":9}"#, "1.1.0"),
        ("", "1.1.0"),
        ("not json", "1.1.0"),
    ] {
        let plugin = Plugin::new("VERSION", &door).stdin(stdin);
        let answer = plugin
            .unset("CNI_CONTAINERID")
            .unset("CNI_IFNAME")
            .succeed();
        assert_eq!(
            answer,
            json!({
                "cniVersion": version,
                "supportedVersions": ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"],
            }),
            "{stdin}"
        );
    }
    let binary = Plugin::new("VERSION", &door).stdin([0xff, 0x00]).succeed();
    assert_eq!(binary["cniVersion"], "1.1.0");
}

#[test]
fn a_command_that_a_version_lacks_is_refused_with_the_version_that_has_it() {
    let door = FakeDoor::open();
    for (command, version, since) in [
        ("CHECK", "0.3.1", "0.4.0"),
        ("GC", "1.0.0", "1.1.0"),
        ("STATUS", "0.4.0", "1.1.0"),
    ] {
        let plugin = Plugin::new(command, &door).set("cniVersion", version);
        let (code, message) = plugin.env("CNI_NETNS", "/run/netns/gone").fail();
        assert_eq!(code, 1, "{message}");
        assert!(
            message.contains(version) && message.contains(since),
            "{message}"
        );
    }
    assert!(door.asked().is_empty());
}

#[test]
fn an_unknown_version_is_refused_with_the_known_ones() {
    let door = FakeDoor::open();
    for version in [json!("0.2.0"), json!("2.0.0"), json!(null)] {
        let (code, message) = Plugin::new("DEL", &door).set("cniVersion", version).fail();
        assert_eq!(code, 1, "{message}");
        assert!(message.contains("1.1.0"), "{message}");
    }
}
