//! The local driver on real processes and namespaces, with a plugin that keeps the CNI protocol and gives the
//! pod its address.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test stops where it cannot go on")]

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use control_core::{
    assignment::{HostLine, Run},
    goal::{Port, Requests, Writers},
    report::InstanceId,
};
use nix::{sys::wait::waitpid, unistd::Pid};
use weft_agent::{
    config::{LocalConfig, LocalNode},
    driver::{
        Driver, State, Status,
        local::{LocalDriver, LocalError},
    },
};

const GRACE: Duration = Duration::from_secs(20);
/// Takes connections on TCP port 8080 and closes them.
const SERVER: &str = "exec perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(Listen => 5, LocalPort => 8080, \
                      ReuseAddr => 1) or die $!; while ($c = $s->accept) { close $c }'";
/// Gives the pod an address on its loopback; writes down each call and the namespace that it is made in.
const PLUGIN: &str = r#"#!/bin/sh
dir=$(dirname "$0")
config=$(cat)
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME $(stat -L -c %i /proc/self/ns/net) $CNI_ARGS $config" >>"$dir/calls"
if [ -e "$dir/fail-$CNI_COMMAND" ]; then
    echo '{"cniVersion":"1.1.0","code":11,"msg":"no NetManager"}'
    exit 1
fi
if [ "$CNI_COMMAND" = ADD ]; then
    nsenter --net="$CNI_NETNS" ip addr add 10.16.0.34/32 dev lo || exit 2
    echo '{"cniVersion":"1.1.0","ips":[{"address":"10.16.0.34/32"}]}'
fi
"#;

/// A run directory, a plugin and a node; everything is gone on drop.
struct Site {
    dir: tempfile::TempDir,
    node: String,
}

impl Site {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let node = format!("weft-driver-{}-{number}", std::process::id());
        ok("ip", &["netns", "add", &node]);
        let dir = tempfile::tempdir().unwrap();
        let plugin = dir.path().join("weft-cni");
        fs::write(&plugin, PLUGIN).unwrap();
        fs::set_permissions(&plugin, fs::Permissions::from_mode(0o755)).unwrap();
        Self { dir, node }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn node_netns(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.node)
    }

    fn config(&self) -> LocalConfig {
        LocalConfig {
            run_dir: self.path("run"),
            cni_plugin: self.path("weft-cni"),
            nodes: vec![LocalNode {
                name: "edge-1".into(),
                netns: Some(self.node_netns()),
                cni_socket: self.path("cni.sock"),
                cpu: "2".parse().unwrap(),
                memory: "1Gi".parse().unwrap(),
                gpus: 0,
            }],
        }
    }

    fn open(&self) -> LocalDriver {
        LocalDriver::open(&self.config()).unwrap()
    }

    fn pod(&self, id: &InstanceId) -> PathBuf {
        let name = id.service.replace('/', ".");
        self.path("run/pods")
            .join(format!("{name}.{}.{}", id.instance, id.epoch))
    }

    fn log(&self, id: &InstanceId) -> String {
        fs::read_to_string(self.pod(id).join("log")).unwrap_or_default()
    }

    /// The process that an instance's state names.
    fn pid(&self, id: &InstanceId) -> i64 {
        let state = fs::read(self.pod(id).join("state.json")).unwrap();
        let state: serde_json::Value = serde_json::from_slice(&state).unwrap();
        state["process"]["pid"].as_i64().unwrap()
    }

    fn calls(&self) -> String {
        fs::read_to_string(self.path("calls")).unwrap_or_default()
    }

    fn verbs(&self) -> Vec<String> {
        let calls = self.calls();
        calls
            .lines()
            .map(|line| line.split(' ').next().unwrap().to_owned())
            .collect()
    }

    /// Takes the pod's address away or gives it back: without it, probes inside the pod fail.
    fn address(&self, id: &InstanceId, verb: &str) {
        let netns = format!("--net={}", self.pod(id).join("netns").display());
        ok(
            "nsenter",
            &[&netns, "ip", "addr", verb, "10.16.0.34/32", "dev", "lo"],
        );
    }

    /// The control groups that the driver made for an instance (lines `N:CONTROLLERS:PATH`).
    fn cgroups(&self, id: &InstanceId) -> Vec<PathBuf> {
        let groups = fs::read_to_string(format!("/proc/{}/cgroup", self.pid(id))).unwrap();
        groups
            .lines()
            .filter(|line| line.ends_with(self.pod(id).file_name().unwrap().to_str().unwrap()))
            .map(|line| {
                let (controller, path) = line.split_once(':').unwrap().1.split_once(':').unwrap();
                Path::new("/sys/fs/cgroup")
                    .join(controller)
                    .join(path.trim_start_matches('/'))
            })
            .collect()
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // Whatever a failed test left: end it and let go of its namespaces.
        for entry in fs::read_dir(self.path("run/pods"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let netns = entry.path().join("netns");
            for pid in in_netns(&netns) {
                let _ = Command::new("kill").args(["-9", &pid]).status();
            }
            let _ = Command::new("umount").arg("-l").arg(netns).output();
        }
        let _ = Command::new("ip")
            .args(["netns", "del", &self.node])
            .output();
    }
}

fn ok(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The processes whose network namespace is that file.
fn in_netns(path: &Path) -> Vec<String> {
    let Ok(ours) = fs::metadata(path) else {
        return Vec::new();
    };
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter(|entry| {
            fs::metadata(entry.path().join("ns/net"))
                .is_ok_and(|netns| (netns.dev(), netns.ino()) == (ours.dev(), ours.ino()))
        })
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect()
}

fn id(epoch: u64) -> InstanceId {
    InstanceId {
        service: "shop/bookinfo/reviews".into(),
        instance: 0,
        epoch,
    }
}

fn shell(script: &str) -> Run {
    Run {
        image: None,
        command: ["sh", "-c", script].map(str::to_owned).to_vec(),
        env: BTreeMap::from([("WEFT_EPOCH".to_owned(), "1".to_owned())]),
        hosts: vec![HostLine {
            address: "10.24.0.7".parse().unwrap(),
            names: vec!["balanced.ratings".into(), "ratings".into()],
        }],
        requests: Requests {
            cpu: "100m".parse().unwrap(),
            memory: "64Mi".parse().unwrap(),
            gpus: 0,
        },
        ports: vec![Port {
            name: "http".parse().unwrap(),
            protocol: control_core::goal::Protocol::Tcp,
            port: 80,
            target_port: 8080,
            follow: false,
        }],
        writers: Writers::default(),
    }
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn status(driver: &LocalDriver, id: &InstanceId) -> Status {
    driver.statuses().borrow()[id].clone()
}

fn wait_for_state(driver: &LocalDriver, id: &InstanceId, state: State) -> Status {
    wait_for(&format!("{state:?}"), || status(driver, id).state == state);
    status(driver, id)
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn an_instance_runs_in_its_own_namespace_with_its_own_hosts_file_and_serves() {
    let site = Site::new();
    let driver = site.open();
    let hosts_before = fs::read("/etc/hosts").unwrap();
    driver.run(
        &id(1),
        "edge-1",
        &shell(&format!(
            "cat /etc/hosts; env; ls -L -i /proc/self/ns/net; {SERVER}"
        )),
    );
    assert_eq!(status(&driver, &id(1)).state, State::Starting, "at once");
    let serving = wait_for_state(&driver, &id(1), State::Serving);
    assert_eq!((serving.life, &*serving.reason), (1, ""));

    let log = site.log(&id(1));
    for line in [
        "10.24.0.7 balanced.ratings ratings",
        "10.16.0.34 reviews-0",
        "127.0.0.1 localhost",
        "WEFT_EPOCH=1",
        "WEFT_NODE=edge-1",
    ] {
        assert!(log.lines().any(|have| have == line), "{line:?} in {log}");
    }
    assert!(
        !log.contains("CARGO_"),
        "the agent's environment stays its own: {log}"
    );
    assert_eq!(fs::read("/etc/hosts").unwrap(), hosts_before);
    let inode = fs::metadata(site.pod(&id(1)).join("netns")).unwrap().ino();
    assert!(log.contains(&format!("{inode} /proc/self/ns/net")), "{log}");
    assert_ne!(inode, fs::metadata("/proc/self/ns/net").unwrap().ino());

    let calls = site.calls();
    let node = fs::metadata(site.node_netns()).unwrap().ino();
    let call = format!(
        "ADD shop.bookinfo.reviews.0.1 net1 {node} IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;"
    );
    assert!(calls.starts_with(&call), "{calls}");
    for word in [
        "WEFT_SERVICE=shop/bookinfo/reviews",
        "WEFT_INSTANCE_NUMBER=0",
        "WEFT_EPOCH=1",
        &format!("\"socket\":\"{}\"", site.path("cni.sock").display()),
    ] {
        assert!(calls.contains(word), "{word} in {calls}");
    }
    let cgroups = site.cgroups(&id(1));
    for cgroup in &cgroups {
        assert!(cgroup.is_dir(), "{cgroup:?}");
    }

    let netns = site.pod(&id(1)).join("netns");
    assert_eq!(in_netns(&netns).len(), 1);
    driver.stop(&id(1), GRACE);
    assert_eq!(status(&driver, &id(1)).state, State::Stopping, "at once");
    wait_for_state(&driver, &id(1), State::Gone);
    assert!(!site.pod(&id(1)).exists());
    for cgroup in &cgroups {
        assert!(!cgroup.exists(), "{cgroup:?}");
    }
    assert_eq!(site.verbs(), ["ADD", "DEL"]);
    driver.forget(&id(1));
    assert!(driver.statuses().borrow().is_empty());
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_process_that_is_killed_is_started_again_with_the_same_attachment() {
    let site = Site::new();
    let driver = site.open();
    driver.run(&id(1), "edge-1", &shell(SERVER));
    wait_for_state(&driver, &id(1), State::Serving);
    ok("kill", &["-9", &site.pid(&id(1)).to_string()]);
    let restarting = wait_for_state(&driver, &id(1), State::Restarting);
    assert_eq!(restarting.reason, "its process was ended by SIGKILL");
    assert_eq!(wait_for_state(&driver, &id(1), State::Serving).life, 2);
    assert_eq!(site.verbs(), ["ADD"]);
    driver.stop(&id(1), GRACE);
    wait_for_state(&driver, &id(1), State::Gone);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_stop_ends_the_stubborn_and_those_that_left_the_group() {
    let site = Site::new();
    let driver = site.open();
    let mut run = shell(
        "trap '' TERM; setsid sleep 1000 & setsid sh -c \"trap '' TERM; sleep 1000\" & wait; wait",
    );
    run.ports.clear();
    driver.run(&id(1), "edge-1", &run);
    let netns = site.pod(&id(1)).join("netns");
    wait_for("all processes", || in_netns(&netns).len() == 4);
    let pids = in_netns(&netns);
    let start = Instant::now();
    driver.stop(&id(1), GRACE);
    driver.stop(&id(1), Duration::from_millis(200));
    wait_for_state(&driver, &id(1), State::Gone);
    assert!(start.elapsed() < GRACE / 2, "the shorter grace counts");
    for pid in pids {
        assert!(!Path::new("/proc").join(pid).join("ns/net").exists());
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_new_driver_adopts_what_runs_without_a_gap() {
    let site = Site::new();
    let first = site.open();
    first.run(&id(1), "edge-1", &shell(SERVER));
    wait_for_state(&first, &id(1), State::Serving);
    let pid = site.pid(&id(1));
    assert!(matches!(
        LocalDriver::open(&site.config()),
        Err(LocalError::Busy { .. })
    ));
    drop(first);

    let second = site.open();
    let adopted = status(&second, &id(1));
    assert_eq!(
        (adopted.state, adopted.life, &*adopted.node),
        (State::Serving, 1, "edge-1")
    );
    second.run(&id(1), "edge-1", &shell(SERVER));
    assert_eq!(site.pid(&id(1)), pid, "nothing happens to it");
    site.address(&id(1), "del");
    wait_for_state(&second, &id(1), State::Silent);
    site.address(&id(1), "add");
    wait_for_state(&second, &id(1), State::Serving);
    ok("kill", &["-9", &pid.to_string()]);
    wait_for("a second life", || {
        let status = status(&second, &id(1));
        (status.state, status.life) == (State::Serving, 2)
    });
    drop(second);

    let third = site.open();
    third.stop(&id(1), GRACE);
    wait_for_state(&third, &id(1), State::Gone);
    assert!(!site.pod(&id(1)).exists());
    assert_eq!(site.verbs(), ["ADD", "DEL"]);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn what_died_while_nobody_looked_is_cleaned_up_and_may_start_afresh() {
    let site = Site::new();
    let first = site.open();
    first.run(&id(1), "edge-1", &shell(SERVER));
    wait_for_state(&first, &id(1), State::Serving);
    let pid = site.pid(&id(1));
    drop(first);
    ok("kill", &["-9", &pid.to_string()]);
    // Its namespaces are gone before it is: a driver that finds it so takes it over, and runs it again.
    waitpid(Pid::from_raw(pid.try_into().unwrap()), None).unwrap();
    // A folder that says nothing any more goes too.
    let broken = site.path("run/pods/shop.bookinfo.ratings.0.1");
    fs::create_dir_all(&broken).unwrap();
    fs::write(broken.join("state.json"), "{").unwrap();

    let second = site.open();
    assert!(!broken.exists());
    wait_for_state(&second, &id(1), State::Gone);
    assert!(!site.pod(&id(1)).exists());
    second.run(&id(1), "edge-1", &shell(SERVER));
    assert_eq!(wait_for_state(&second, &id(1), State::Serving).life, 2);
    second.stop(&id(1), GRACE);
    wait_for_state(&second, &id(1), State::Gone);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn what_cannot_run_here_is_refused_and_leaves_nothing() {
    let site = Site::new();
    let driver = site.open();
    let image = Run {
        image: Some("registry.example/reviews:1".into()),
        command: Vec::new(),
        ..shell("")
    };
    let missing = Run {
        command: vec!["/no/such/program".into()],
        ..shell("")
    };
    let unnamed = InstanceId {
        service: "reviews".into(),
        ..id(5)
    };
    for (id, node, run, words) in [
        (
            id(1),
            "edge-1",
            &image,
            ["registry.example/reviews:1", "command"],
        ),
        (
            id(2),
            "edge-1",
            &missing,
            ["/no/such/program", "No such file"],
        ),
        (id(3), "edge-9", &shell("true"), ["edge-9", "edge-1"]),
        (
            unnamed,
            "edge-1",
            &shell("true"),
            ["\"reviews\"", "namespace/application/service"],
        ),
    ] {
        driver.run(&id, node, run);
        let refused = wait_for_state(&driver, &id, State::Refused);
        for word in words {
            assert!(
                refused.reason.contains(word),
                "{word} in {:?}",
                refused.reason
            );
        }
        assert!(!site.pod(&id).exists());
        driver.stop(&id, GRACE);
        assert_eq!(status(&driver, &id).state, State::Gone);
    }
    assert_eq!(
        site.verbs(),
        ["ADD", "DEL"],
        "only what got so far was attached"
    );
    let never = id(9);
    driver.stop(&never, GRACE);
    assert_eq!(
        status(&driver, &never).state,
        State::Gone,
        "also when it never knew it"
    );
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn an_instance_waits_for_its_nodes_netmanager_and_says_so() {
    let site = Site::new();
    let driver = site.open();
    fs::write(site.path("fail-ADD"), "").unwrap();
    driver.run(&id(1), "edge-1", &shell(SERVER));
    wait_for("a reason", || {
        status(&driver, &id(1)).reason == "no NetManager (CNI code 11)"
    });
    assert_eq!(status(&driver, &id(1)).state, State::Starting);
    wait_for("a second attempt", || site.verbs().len() >= 4);
    assert_eq!(site.verbs()[..4], ["ADD", "DEL", "ADD", "DEL"]);
    fs::remove_file(site.path("fail-ADD")).unwrap();
    wait_for_state(&driver, &id(1), State::Serving);

    // The plugin is broken when it is to be detached: its namespace goes all the same.
    fs::write(site.path("fail-DEL"), "").unwrap();
    driver.stop(&id(1), GRACE);
    wait_for_state(&driver, &id(1), State::Gone);
    assert!(!site.pod(&id(1)).exists());
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn an_instance_that_stops_answering_is_silent_and_one_without_ports_serves_by_running() {
    let site = Site::new();
    let driver = site.open();
    driver.run(&id(1), "edge-1", &shell(SERVER));
    let mut idle = shell("sleep 1000");
    idle.ports.clear();
    wait_for_state(&driver, &id(1), State::Serving);
    site.address(&id(1), "del");
    let silent = wait_for_state(&driver, &id(1), State::Silent);
    assert!(silent.reason.contains("TCP port 8080"), "{}", silent.reason);
    site.address(&id(1), "add");
    assert_eq!(wait_for_state(&driver, &id(1), State::Serving).life, 1);

    driver.run(&id(2), "edge-1", &idle);
    wait_for_state(&driver, &id(2), State::Serving);
    for id in [id(1), id(2)] {
        driver.stop(&id, GRACE);
        wait_for_state(&driver, &id, State::Gone);
    }
}

#[test]
fn a_plugin_that_is_not_there_is_refused_by_its_path() {
    let dir = tempfile::tempdir().unwrap();
    let config = LocalConfig {
        run_dir: dir.path().join("run"),
        cni_plugin: dir.path().join("weft-cni"),
        nodes: Vec::new(),
    };
    let error = LocalDriver::open(&config).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("driver.local.cni_plugin"), "{text}");
    assert!(text.contains(config.cni_plugin.to_str().unwrap()), "{text}");
    fs::write(&config.cni_plugin, "not executable").unwrap();
    assert!(matches!(
        LocalDriver::open(&config),
        Err(LocalError::Plugin { .. })
    ));
}
