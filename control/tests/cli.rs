//! The `weft` binary as a user runs it: an authority, three leads, a goal file, and no mercy.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    net::{SocketAddr, TcpListener},
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

const GOAL: &str = "
apiVersion: weft.dev/v1alpha1
kind: MeshApplication
metadata: { name: NAME, namespace: shop }
spec:
  services:
    - name: web
      command: [/bin/true]
      requests: { cpu: 100m, memory: 32Mi }
";
const LIMIT: Duration = Duration::from_secs(60);
const NAMES: [&str; 3] = ["a", "b", "c"];

fn weft(dir: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_weft"))
        .current_dir(dir)
        .args(arguments)
        .env_remove("WEFT_LEAD")
        .env_remove("WEFT_CREDENTIALS")
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs what must work; its standard output.
fn done(dir: &Path, arguments: &[&str]) -> String {
    let output = weft(dir, arguments);
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// Runs what must not work; its exit code and standard error.
fn refused(dir: &Path, arguments: &[&str]) -> (i32, String) {
    let output = weft(dir, arguments);
    (output.status.code().unwrap(), text(&output.stderr))
}

fn cert(dir: &Path, role: &str, name: &str) {
    let out = format!("{role}-{name}");
    done(
        dir,
        &[
            "cert", "--ca", "ca", "--role", role, "--name", name, "--out", &out,
        ],
    );
}

/// Three leads as processes, killed with the test.
struct Leads {
    dir: tempfile::TempDir,
    addresses: Vec<SocketAddr>,
    running: Vec<Child>,
}

impl Leads {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        done(dir.path(), &["init", "--dir", "ca", "--mesh", "demo"]);
        for name in NAMES {
            cert(dir.path(), "lead", name);
        }
        cert(dir.path(), "user", "ann");
        // Held together, so that the system gives three different ports.
        let held = NAMES.map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
        let addresses = held.iter().map(|it| it.local_addr().unwrap()).collect();
        Self {
            dir,
            addresses,
            running: Vec::new(),
        }
    }

    fn start(&mut self, first: bool) {
        for (name, address) in NAMES.iter().zip(&self.addresses) {
            let mut command = Command::new(env!("CARGO_BIN_EXE_weft"));
            command
                .current_dir(self.dir.path())
                .args(["lead", "--name", name, "--lease", "2s"])
                .args(["--data", &format!("data-{name}")])
                .args(["--credentials", &format!("lead-{name}")])
                .args(["--listen", &address.to_string()])
                .stderr(Stdio::null());
            if first {
                command.args(["--mesh", "ca/mesh.json"]);
                for (peer, address) in NAMES.iter().zip(&self.addresses) {
                    command.args(["--peer", &format!("{peer}={address}")]);
                }
            }
            self.running.push(command.spawn().unwrap());
        }
    }

    fn kill(&mut self) {
        for mut child in self.running.drain(..) {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    fn ask(&self, arguments: &[&str]) -> Output {
        let leads: Vec<_> = self.addresses.iter().map(ToString::to_string).collect();
        let leads = leads.join(",");
        let rest = ["--lead", &leads, "--credentials", "user-ann", "-o", "json"];
        weft(self.dir.path(), &[arguments, &rest].concat())
    }

    /// Asks until it works.
    fn answer(&self, arguments: &[&str]) -> Value {
        let end = Instant::now() + LIMIT;
        loop {
            let output = self.ask(arguments);
            if output.status.success() {
                return serde_json::from_slice(&output.stdout).unwrap();
            }
            assert!(
                Instant::now() < end,
                "{arguments:?}: {}",
                text(&output.stderr)
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Applies it with a key: asked again where an answer was lost, it says what it said then.
    fn apply(&self, name: &str, key: &str) -> Value {
        let file = self.dir.path().join(format!("{name}.yaml"));
        std::fs::write(&file, GOAL.replace("NAME", name)).unwrap();
        let file = file.to_str().unwrap();
        let mut answer = self.answer(&["apply", "-f", file, "--idempotency-key", key]);
        answer["applications"][0]["result"].take()
    }
}

impl Drop for Leads {
    fn drop(&mut self) {
        self.kill();
    }
}

#[test]
fn nothing_acknowledged_is_lost_when_every_lead_is_killed() {
    let mut leads = Leads::new();
    leads.start(true);
    assert_eq!(leads.apply("one", "first"), "created");
    assert_eq!(leads.apply("one", "second"), "unchanged");
    assert_eq!(leads.apply("two", "third"), "created");
    leads.kill();

    leads.start(false);
    let list = leads.answer(&["get", "applications"]);
    let names = list["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|app| &app["name"]);
    assert_eq!(names.collect::<Vec<_>>(), ["shop/one", "shop/two"]);
    let delete = ["delete", "shop/one"];
    let once = [&delete[..], &["--idempotency-key", "fourth"]].concat();
    assert_eq!(leads.answer(&once)["changed"], true);
    let end = Instant::now() + LIMIT;
    loop {
        let output = leads.ask(&delete);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{error}");
        if error.contains("no application shop/one") {
            break;
        }
        // While nobody leads it is not even looked for.
        let is_early = error.contains("no lead served the request");
        assert!(is_early && Instant::now() < end, "{error}");
    }
}

#[test]
fn wrong_use_is_2_and_what_does_not_work_is_1_with_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    done(dir, &["init", "--dir", "ca", "--mesh", "demo", "--no-ipv4"]);
    cert(dir, "user", "ann");
    let nobody = ["--lead", "127.0.0.1:1", "--credentials", "user-ann"];
    let cases: [(&[&str], i32, &str); 9] = [
        (&["fly"], 2, "fly"),
        (&["get", "gnomes"], 2, "gnomes"),
        (
            &[
                "init",
                "--dir",
                "x",
                "--mesh",
                "m",
                "--no-ipv4",
                "--prefix4",
                "10.16.0.0/12",
            ],
            2,
            "--prefix4",
        ),
        (
            &[
                "cert", "--ca", "ca", "--role", "node", "--name", "n", "--out", "n",
            ],
            2,
            "--cluster",
        ),
        (
            &["init", "--dir", "ca", "--mesh", "demo"],
            1,
            "exists already",
        ),
        (&["init", "--dir", "x", "--mesh", "Demo"], 1, "\"Demo\""),
        (
            &[
                "cert", "--ca", "no", "--role", "user", "--name", "n", "--out", "n",
            ],
            1,
            "no/mesh.json",
        ),
        (&[&["status"], &nobody[..]].concat(), 1, "127.0.0.1:1"),
        (
            &[&["apply", "-f", "none.yaml"], &nobody[..]].concat(),
            1,
            "none.yaml",
        ),
    ];
    for (arguments, code, part) in cases {
        let (got, error) = refused(dir, arguments);
        assert_eq!(got, code, "{arguments:?}: {error}");
        assert!(error.contains(part), "{arguments:?}: {error}");
    }
}

#[test]
fn the_only_copy_of_a_token_stays_where_no_lead_refused_it() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    done(dir, &["init", "--dir", "ca", "--mesh", "demo"]);
    cert(dir, "user", "ann");
    let create = ["token", "create", "ci", "--access", "viewer"];
    let rest = ["--lead", "127.0.0.1:1", "--credentials", "user-ann"];
    let (code, error) = refused(dir, &[&create[..], &["--out", "ci.token"], &rest].concat());
    assert_eq!(code, 1, "{error}");
    assert!(error.contains("weft token list"), "{error}");
    let kept = std::fs::read_to_string(dir.join("ci.token")).unwrap();
    assert!(kept.starts_with("ci."));
}

#[test]
fn a_lead_says_what_its_first_start_lacks() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    done(dir, &["init", "--dir", "ca", "--mesh", "demo"]);
    cert(dir, "lead", "a");
    cert(dir, "user", "ann");
    let start = |name: &str, credentials: &str, rest: &[&str]| {
        let own = [
            "lead",
            "--name",
            name,
            "--data",
            "data",
            "--listen",
            "127.0.0.1:0",
        ];
        refused(
            dir,
            &[&own[..], &["--credentials", credentials], rest].concat(),
        )
    };
    let elsewhere = ["--peer", "a=127.0.0.1:9"];
    let cases = [
        (start("a", "lead-a", &[]), "--peer NAME=IP:PORT"),
        (start("b", "lead-a", &[]), "weft://demo/lead/a"),
        (start("a", "user-ann", &[]), "--role lead"),
        (start("a", "nowhere", &[]), "nowhere"),
        (start("a", "lead-a", &elsewhere), "would not find this lead"),
        (
            start("a", "lead-a", &["--mesh", "ca/ca.crt"]),
            "not a mesh file",
        ),
    ];
    for ((code, error), part) in cases {
        assert_eq!(code, 1, "{error}");
        assert!(error.contains(part), "{error}");
    }
}

/// A lead of its own group, whose shell did `limits` before.
fn lead_within(dir: &Path, limits: &str) -> Child {
    let address = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = address.local_addr().unwrap().to_string();
    Command::new("sh")
        .args(["-c", &format!("{limits}; exec \"$0\" \"$@\"")])
        .arg(env!("CARGO_BIN_EXE_weft"))
        .args(["lead", "--name", "a", "--data", "data"])
        .args(["--credentials", "lead-a", "--mesh", "ca/mesh.json"])
        .args(["--listen", &address, "--peer", &format!("a={address}")])
        .current_dir(dir)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// What a process may open now, soft and hard (proc_pid_limits(5)).
fn open_files(pid: u32) -> Option<(u64, u64)> {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))?;
    let mut numbers = line.split_whitespace().filter_map(|word| word.parse().ok());
    Some((numbers.next()?, numbers.next()?))
}

#[test]
fn a_lead_raises_its_limit_of_descriptors_and_says_where_it_does_not_serve() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    done(dir, &["init", "--dir", "ca", "--mesh", "demo"]);
    cert(dir, "lead", "a");

    let mut lead = lead_within(dir, "ulimit -Sn 256");
    let end = Instant::now() + LIMIT;
    loop {
        let (soft, hard) = open_files(lead.id()).unwrap();
        let is_lead = std::fs::read_link(format!("/proc/{}/exe", lead.id()))
            .is_ok_and(|program| program.ends_with("weft"));
        // For 4,096 connections of agents and leads, 256 by tokens, and its own.
        if is_lead && soft == hard.min(4_608) {
            break;
        }
        assert!(Instant::now() < end, "{soft}, {hard}");
        std::thread::sleep(Duration::from_millis(20));
    }
    lead.kill().unwrap();
    lead.wait().unwrap();

    let lead = lead_within(dir, "ulimit -Sn 300; ulimit -Hn 300");
    let output = lead.wait_with_output().unwrap();
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("may open 300 files"), "{error}");
    assert!(error.contains("LimitNOFILE"), "{error}");
}
