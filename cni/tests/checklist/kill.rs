//! Line 10: a plugin killed at any step leaves nothing that a DEL does not clean.

use std::{
    process::Child,
    time::{Duration, Instant},
};

use crate::{
    door::{FakeDoor, Mood},
    netns::Netns,
    plugin::Plugin,
};

fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn killed_while_the_netmanager_thinks() {
    let (host, pod) = (Netns::new("host"), Netns::new("pod"));
    let (host_before, pod_before) = (host.snapshot(), pod.snapshot());
    for op in ["reserve", "activate"] {
        let door = FakeDoor::open();
        door.mood(op, Mood::Hang);
        let add = Plugin::new("ADD", &door).on(&host, &pod);
        let child = add.start();
        door.wait_for(op);
        kill(child);
        if op == "activate" {
            assert!(
                host.ip("link show weft2").contains("state DOWN"),
                "nothing leaves before the programs"
            );
        }
        door.good_mood();
        add.clone().command("DEL").succeed();
        assert_eq!(host.snapshot(), host_before, "{op}");
        assert_eq!(pod.snapshot(), pod_before, "{op}");
        assert!(door.reservations().is_empty(), "{op}");
        add.succeed();
        add.command("DEL").succeed();
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn killed_at_any_moment() {
    let (host, pod) = (Netns::new("host"), Netns::new("pod"));
    let (host_before, pod_before) = (host.snapshot(), pod.snapshot());
    let door = FakeDoor::open();
    let add = Plugin::new("ADD", &door).on(&host, &pod);
    let del = add.clone().command("DEL");
    for step in 0..40 {
        let child = add.start();
        // The moment of the kill is what varies here, not something that is waited for.
        std::thread::sleep(Duration::from_micros(step * 400));
        kill(child);
        if step % 4 == 0 {
            let child = del.start();
            std::thread::sleep(Duration::from_micros(step * 100));
            kill(child);
        }
        del.succeed();
        assert_eq!(host.snapshot(), host_before, "step {step}");
        assert_eq!(pod.snapshot(), pod_before, "step {step}");
        assert!(door.reservations().is_empty(), "step {step}");
    }
    add.succeed();
    del.succeed();
    assert_eq!(pod.snapshot(), pod_before);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_netmanager_that_hangs_ends_the_add_in_time_with_everything_undone() {
    let (host, pod) = (Netns::new("host"), Netns::new("pod"));
    let (host_before, pod_before) = (host.snapshot(), pod.snapshot());
    let door = FakeDoor::open();
    door.mood("activate", Mood::Hang);
    let start = Instant::now();
    let (code, message) = Plugin::new("ADD", &door).on(&host, &pod).fail();
    assert_eq!(code, 11, "{message}");
    assert!(
        start.elapsed() < Duration::from_secs(14),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(host.snapshot(), host_before);
    assert_eq!(pod.snapshot(), pod_before);
    let queued = std::fs::read_dir(door.pending()).unwrap().count();
    assert_eq!(
        queued, 1,
        "the reservation is released as soon as somebody listens"
    );
}
