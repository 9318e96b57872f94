//! What forwards outlives who made it forward: restarts, other layouts, other sizes, a reboot, a second daemon.

use std::{
    fs,
    io::ErrorKind,
    net::{Ipv6Addr, TcpStream},
    path::PathBuf,
    process::{Command, Output},
    thread,
    time::Duration,
};

use aya::maps::{Map, MapData, ProgramArray};
use netmanager_api::{
    cni::{Reply, Request},
    table::{Backend, BackendState::Ready},
};
use nix::{
    mount::{MntFlags, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use weft_tests::{
    mesh::reasons,
    topology,
    traffic::{call, echo},
    wait_for,
};

#[path = "takeover/load.rs"]
mod load;

use self::load::{Load, Report};
use super::machine::{Node, Pod, SOON, VIP4, table, vip6};

/// How long load runs before and after what is tested.
const CALM: Duration = Duration::from_millis(500);
/// Long enough for a call on one machine, short enough to wait for one that is dropped.
const A_MOMENT: Duration = Duration::from_millis(300);

fn succeed(node: &Node, command: &mut Command) -> Output {
    let output = node.netns.output(command).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    output
}

/// What a start that fails says.
fn refusal(node: &Node, command: &mut Command) -> String {
    let output = node.netns.output(command).unwrap();
    assert!(!output.status.success(), "{command:?} started");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What the node's programs refused since its maps of this layout were made.
fn refused(node: &Node, layout: &str) -> Vec<(&'static str, u64)> {
    let counts = reasons(&node.path(&format!("bpf/{layout}/maps/REASONS")));
    counts.into_iter().filter(|(_, count)| *count > 0).collect()
}

fn unharmed(report: &Report) {
    assert_eq!(report.opened.failures, [] as [&str; 0], "{report:?}");
    assert_eq!(report.kept.failures, [] as [&str; 0], "{report:?}");
    assert_eq!(report.retransmitted, 0, "{report:?}");
    assert!(
        report.opened.requests > 100 && report.kept.requests > 100,
        "{report:?}"
    );
    eprintln!("{report:?}");
}

/// Hands a node back to the previous layout and takes it over again, twice, under load, after so many calls that are
/// over. By hand with the daemon of the previous version in between, too: `WEFT_TEST_PREVIOUS` is its path.
fn layouts_change_under_load(label: &str, args: &[&str], calls: usize) {
    let previous = std::env::var_os("WEFT_TEST_PREVIOUS").map(PathBuf::from);
    let mut node = Node::prepare(label, args);
    node.program.clone_from(&previous);
    node.run_ready();
    let (client, server) = (node.attach("c"), node.attach("s"));
    server.serve("server");
    node.follow(&table(2, vec![server.backend(0, Ready)]));
    if previous.is_some() {
        node.kill();
        node.program = None;
        node.run();
        node.wait_ready();
    }
    for _ in 0..calls {
        call(&client.netns, vip6()).unwrap();
    }
    let load = Load::start(&client, &server);
    thread::sleep(CALM);
    let mut counts = Vec::new();
    for _ in 0..2 {
        node.kill();
        counts.push(refused(&node, "v2"));
        succeed(&node, &mut node.downgrade());
        assert!(node.path("bpf/v1/maps/FLOWS").exists());
        assert!(!node.path("bpf/v2").exists(), "what is dead is collected");
        assert_eq!(call(&client.netns, vip6()).unwrap().1, "server");
        if previous.is_some() {
            node.program.clone_from(&previous);
            node.run();
            node.wait_ready();
            thread::sleep(CALM);
            node.kill();
            node.program = None;
        }
        counts.push(refused(&node, "v1"));
        node.run();
        node.wait_ready();
        assert!(node.path("bpf/v2/maps/FLOWS").exists());
        assert!(
            !node.path("bpf/v1/maps/FLOWS").exists(),
            "what is dead is collected"
        );
        // Where the previous version looks for the switch, it finds it.
        assert!(node.path("bpf/v1/maps/PROGRAMS").exists());
        thread::sleep(CALM);
    }
    let report = load.end();
    counts.push(refused(&node, "v2"));
    eprintln!("refused, by layout in turn: {counts:?}");
    // Where layout 1's small table is full, it may evict half of what opens: that SYN is sent again.
    let retransmitted = if calls == 0 { report.retransmitted } else { 0 };
    unharmed(&Report {
        retransmitted,
        ..report
    });
    let late = node.attach("late");
    assert_eq!(call(&late.netns, vip6()).unwrap().1, "server");
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_node_changes_to_the_previous_layout_and_back_and_no_request_fails() {
    layouts_change_under_load("layout", &[], 0);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_node_whose_flow_table_is_full_changes_layouts_and_no_request_fails() {
    // 512 connections: what is over fills it.
    layouts_change_under_load("layoutf", &["--flows", "1024"], 600);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_node_with_classifiers_changes_layouts_and_no_request_fails() {
    layouts_change_under_load("layoutc", &["--hook", "clsact"], 0);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_daemon_that_is_killed_or_restarted_costs_no_request_and_no_retransmission() {
    let mut node = Node::start("restart", &[]);
    let (client, server) = (node.attach("c"), node.attach("s"));
    server.serve("server");
    node.follow(&table(2, vec![server.backend(0, Ready)]));
    let load = Load::start(&client, &server);
    thread::sleep(CALM);
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        kill(Pid::from_raw(node.pid() as i32), signal).unwrap();
        node.kill();
        thread::sleep(CALM);
        node.run();
        node.wait_ready();
    }
    unharmed(&load.end());
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn sizes_that_change_across_a_restart_lose_no_flow_and_one_too_small_is_refused_by_its_option() {
    let mut node = Node::start("sizes", &[]);
    let (client, server) = (node.attach("c"), node.attach("s"));
    server.serve("server");
    node.follow(&table(2, vec![server.backend(0, Ready)]));
    let load = Load::start(&client, &server);
    let (mut old, _) = call(&client.netns, vip6()).unwrap();
    thread::sleep(CALM);
    for sizes in [
        [
            "--flows=8192",
            "--backends=512",
            "--slots=8192",
            "--vips=512",
        ],
        ["--flows=8192", "--backends=64", "--slots=1024", "--vips=64"],
        ["--flows=2048", "--backends=64", "--slots=1024", "--vips=64"],
    ] {
        node.kill();
        node.args = sizes
            .iter()
            .flat_map(|size| size.split('='))
            .map(str::to_owned)
            .collect();
        node.run();
        node.wait_ready();
        echo(&mut old, b"still there").unwrap();
        thread::sleep(CALM / 2);
    }
    unharmed(&load.end());

    let backends: Vec<Backend> = (0..100)
        .map(|instance| Backend {
            addr6: Ipv6Addr::from_bits(
                server.reserved.addr6.to_bits() + 1_000 + u128::from(instance),
            ),
            addr4: None,
            ..server.backend(instance, Ready)
        })
        .collect();
    node.kill();
    node.args = vec!["--backends".into(), "512".into()];
    node.run();
    node.wait_ready();
    node.follow(&table(3, backends));
    node.kill();
    node.args = vec!["--backends".into(), "64".into()];
    let said = refusal(
        &node,
        &mut node.command(&node.path("state"), &node.path("cni.sock")),
    );
    assert!(said.contains("--backends 64 is too small"), "{said}");
    assert!(said.contains("102 are in use"), "{said}");
    node.args = Vec::new();
    node.run();
    node.wait_ready();
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_second_daemon_is_refused_and_told_which_process_is_the_first() {
    let node = Node::start("second", &[]);
    let first = format!("(process {})", node.pid());
    for state in ["state", "state2"] {
        let mut second = node.command(&node.path(state), &node.path("other.sock"));
        let said = refusal(&node, &mut second);
        assert!(
            said.contains("another NetManager") && said.contains(&first),
            "{state}: {said}"
        );
    }
    let said = refusal(&node, &mut node.downgrade());
    assert!(said.contains(&first), "{said}");
    assert_eq!(node.ask(&Request::Status), Reply::Done);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn one_update_switches_every_link_of_a_node() {
    let mut node = Node::start("switch", &[]);
    let server = node.attach("s");
    server.serve("server");
    node.follow(&table(2, vec![server.backend(0, Ready)]));
    let clients = ["a", "b", "c"].map(|name| node.attach(name));
    let connects = |pod: &Pod| {
        let connect = || TcpStream::connect_timeout(&(VIP4, 80).into(), A_MOMENT).map(drop);
        pod.netns.run(connect).map_err(|error| error.kind())
    };
    for client in &clients {
        call(&client.netns, VIP4).unwrap();
    }
    let slots = MapData::from_pin(node.path("bpf/programs/PROGRAMS")).unwrap();
    let mut slots: ProgramArray<MapData> = Map::ProgramArray(slots).try_into().unwrap();
    // The program of pods goes, and a dispatcher without one drops.
    slots.clear_index(&0).unwrap();
    for client in &clients {
        assert_eq!(connects(client), Err(ErrorKind::TimedOut));
    }
    node.kill();
    node.run();
    node.wait_ready();
    for client in &clients {
        call(&client.netns, VIP4).unwrap();
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_node_that_rebooted_without_its_agent_is_back_on_its_last_table() {
    let mut node = Node::start("reboot", &[]);
    let before = node.attach("b");
    // The leads know the endpoint that this node will make next.
    let number = before.reserved.endpoint + 1;
    let addr6 = Ipv6Addr::from_bits(before.reserved.addr6.to_bits() + 1);
    let next = Backend {
        addr6,
        addr4: None,
        ..before.backend(0, Ready)
    };
    node.follow(&table(2, vec![next]));
    node.wait_saved(2);

    node.kill();
    drop(before);
    node.netns.ip("link delete weft-node").unwrap();
    umount2(&node.path("bpf"), MntFlags::MNT_DETACH).unwrap();
    fs::remove_file(node.path("table.json")).unwrap();
    node.run();
    node.wait_ready();
    let (client, server) = {
        let server = node.attach("s");
        (node.attach("c"), server)
    };
    assert_eq!(
        (server.reserved.endpoint, server.reserved.addr6),
        (number, addr6)
    );
    server.serve("server");
    assert_eq!(call(&client.netns, vip6()).unwrap().1, "server");
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn endpoint_numbers_go_on_after_all_that_were_given_when_state_or_pins_are_lost() {
    let mut node = Node::start("numbers", &[]);
    let kept = node.attach("k");
    let released = node.attach("r");
    let key = released.key.clone();
    assert_eq!(node.ask(&Request::Release { key }), Reply::Done);
    let highest = released.reserved.endpoint;
    assert!(highest > kept.reserved.endpoint);
    node.wait_saved(1);
    node.kill();
    fs::remove_file(node.path("state/attachments.json")).unwrap();
    node.run();
    node.wait_ready();
    let next = node.attach("n").reserved.endpoint;
    assert!(next > highest, "{next}");

    // All is lost but what the leads know.
    node.kill();
    node.netns.ip("link delete weft-node").unwrap();
    umount2(&node.path("bpf"), MntFlags::MNT_DETACH).unwrap();
    fs::remove_dir_all(node.path("state")).unwrap();
    let own = Backend {
        addr6: Ipv6Addr::from_bits(kept.reserved.addr6.to_bits() + 70),
        addr4: None,
        ..kept.backend(0, Ready)
    };
    node.write_table(&table(2, vec![own]));
    node.run();
    node.wait_ready();
    let next = node.attach("z").reserved.endpoint;
    assert_eq!(next, kept.reserved.endpoint + 71);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn the_mtu_of_the_underlay_is_followed() {
    let mut node = Node::prepare("mtu", &["--underlay", "192.0.2.1"]);
    node.netns
        .ip("link add up0 mtu 1500 type veth peer name up1")
        .unwrap();
    for device in ["up0", "up1"] {
        node.netns.ip(&format!("link set {device} up")).unwrap();
    }
    topology::address(&node.netns, "up0", "192.0.2.1/24").unwrap();
    node.run_ready();
    assert_eq!(node.attach("a").reserved.mtu, 1_420);
    for (underlay, own) in [(1_400, 1_320), (9_000, 8_920)] {
        node.netns
            .ip(&format!("link set up0 mtu {underlay}"))
            .unwrap();
        wait_for("the node endpoint follows", SOON, || {
            let link = node.netns.ip("-o link show weft-node").unwrap();
            link.contains(&format!("mtu {own} ")).then_some(())
        });
        let pod = node.attach(&format!("p{own}"));
        assert_eq!(pod.reserved.mtu, own);
    }
}
