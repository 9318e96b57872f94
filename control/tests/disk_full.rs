//! A lead on a file system that fills: changes are refused before it is full, and a lead that wrote beyond that ends, and goes
//! on where it stopped once there is room.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(50);
const MI: u64 = 1 << 20;
/// More goals of [`LARGE`] than fit.
const MANY: u32 = 1_000;
/// Bytes.
const LARGE: usize = 200_000;

fn weft(dir: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_weft"))
        .current_dir(dir)
        .args(arguments)
        .env_remove("WEFT_LEAD")
        .env_remove("WEFT_CREDENTIALS")
        .output()
        .unwrap()
}

fn done(dir: &Path, arguments: &[&str]) -> String {
    let output = weft(dir, arguments);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// A file system in a mount namespace of its own; both are gone with it.
struct Disk {
    holder: Child,
    place: PathBuf,
}

impl Disk {
    fn new(place: &Path, size: u64) -> Self {
        let mount = format!("mount -t tmpfs -o size={size} none \"$0\" && echo ready && exec cat");
        let mut holder = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "--", "sh", "-c"])
            .arg(mount)
            .arg(place)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut said = BufReader::new(holder.stdout.take().unwrap());
        said.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "it takes root to mount");
        let place = place.to_owned();
        Self { holder, place }
    }

    /// A program that sees it.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        let mount = format!("--mount=/proc/{}/ns/mnt", self.holder.id());
        command.args([&mount, "--", program]);
        command
    }

    /// A file of it, as it is seen from outside.
    fn file(&self, name: &str) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.holder.id()));
        let place = self.place.strip_prefix("/").unwrap();
        root.join(place).join(name)
    }

    /// Takes `bytes`, or all that there is; what was taken before is given back.
    fn take(&self, bytes: Option<u64>) {
        let mut file = File::create(self.file("filler")).unwrap();
        let page = [1; 4096];
        let mut left = bytes.unwrap_or(u64::MAX);
        while left > 0 {
            let part = usize::try_from(left).unwrap_or(usize::MAX).min(page.len());
            match file.write(&page[..part]) {
                Ok(written) => left -= u64::try_from(written).unwrap(),
                Err(error) if bytes.is_some() => panic!("{error}"),
                Err(_) => return,
            }
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// A lead of its own, with its data on a [`Disk`].
struct Lead {
    running: Option<Child>,
    disk: Disk,
    address: SocketAddr,
    dir: tempfile::TempDir,
}

impl Lead {
    fn new(size: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        done(dir.path(), &["init", "--dir", "ca", "--mesh", "demo"]);
        for (role, name) in [("lead", "a"), ("user", "ann")] {
            let cert = ["cert", "--ca", "ca", "--role", role, "--name", name];
            done(dir.path(), &[&cert[..], &["--out", name]].concat());
        }
        let place = dir.path().join("disk");
        fs::create_dir(&place).unwrap();
        let held = TcpListener::bind("127.0.0.1:0").unwrap();
        Self {
            running: None,
            disk: Disk::new(&place, size),
            address: held.local_addr().unwrap(),
            dir,
        }
    }

    fn data(&self) -> PathBuf {
        self.disk.place.join("data")
    }

    /// Starts it; what it says is in `a.log`.
    fn start(&mut self, reserve: &str) {
        let dir = self.dir.path();
        let address = self.address.to_string();
        let log = File::create(dir.join("a.log")).unwrap();
        let lead = self
            .disk
            .command(env!("CARGO_BIN_EXE_weft"))
            .args(["lead", "--name", "a", "--disk-reserve", reserve])
            .args(["--listen", &address, "--peer", &format!("a={address}")])
            .arg("--data")
            .arg(self.data())
            .arg("--credentials")
            .arg(dir.join("a"))
            .arg("--mesh")
            .arg(dir.join("ca/mesh.json"))
            .stderr(log)
            .spawn();
        self.running = Some(lead.unwrap());
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("a.log")).unwrap()
    }

    fn end(&mut self) {
        if let Some(mut lead) = self.running.take() {
            // It may be gone already.
            let _ = lead.kill();
            let _ = lead.wait();
        }
    }

    /// How it ended by itself, if it did.
    fn ended(&mut self) -> Option<ExitStatus> {
        self.running.as_mut().unwrap().try_wait().unwrap()
    }

    fn ask(&self, arguments: &[&str]) -> Output {
        let address = self.address.to_string();
        let to = ["--lead", &address, "--credentials", "ann"];
        weft(self.dir.path(), &[arguments, &to].concat())
    }

    fn apply(&self, name: &str, size: usize) -> Result<(), String> {
        let word = "x".repeat(size);
        let goal = format!(
            "apiVersion: weft.dev/v1alpha1\nkind: MeshApplication\nmetadata: {{ name: {name} }}\n\
             spec: {{ services: [{{ name: web, command: [/bin/true, {word}x] }}] }}\n"
        );
        fs::write(self.dir.path().join("goal.yaml"), goal).unwrap();
        let output = self.ask(&["apply", "-f", "goal.yaml"]);
        match output.status.success() {
            true => Ok(()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    /// The applications, by a read that waits for the leader.
    fn applications(&self) -> Option<Vec<String>> {
        let output = self.ask(&["get", "applications", "-o", "json"]);
        let list: Value = serde_json::from_slice(&output.stdout).ok()?;
        let names = list["items"].as_array()?.iter();
        Some(
            names
                .map(|it| it["name"].as_str().unwrap().to_owned())
                .collect(),
        )
    }

    /// What it says of its disk.
    fn disk(&self) -> Option<(u64, bool)> {
        let output = self.ask(&["lead", "list", "-o", "json"]);
        let list: Value = serde_json::from_slice(&output.stdout).ok()?;
        let disk = &list["items"][0]["disk"];
        Some((disk["free_bytes"].as_u64()?, disk["is_short"].as_bool()?))
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        self.end();
    }
}

#[track_caller]
fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + LIMIT;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "waited {LIMIT:?} for {what}");
        sleep(LOOK);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn below_the_reserve_changes_are_refused_and_reads_are_answered() {
    let mut lead = Lead::new(64 * MI);
    lead.start("8Mi");
    wait_for("a change", || lead.apply("one", 0).ok());
    let (free, _) = wait_for("its disk", || lead.disk());
    lead.disk.take(Some(free - 4 * MI));
    wait_for("it to be short", || lead.disk().filter(|(_, short)| *short));
    let refused = wait_for("a refusal", || lead.apply("two", 0).err());
    assert!(refused.contains("changes are refused"), "{refused}");
    assert!(
        refused.contains("a has") && refused.contains("8Mi"),
        "{refused}"
    );
    assert_eq!(lead.applications().unwrap(), ["default/one"]);

    // A little more than the reserve is not enough.
    lead.disk.take(Some(free - 9 * MI));
    wait_for("it to see that", || {
        lead.disk().filter(|(free, _)| *free > 8 * MI)
    });
    lead.apply("two", 0).unwrap_err();
    lead.disk.take(Some(0));
    wait_for("a change", || lead.apply("two", 0).ok());
    assert_eq!(lead.applications().unwrap(), ["default/one", "default/two"]);
    assert_eq!(lead.ended(), None);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_lead_whose_disk_is_full_ends_and_goes_on_where_it_stopped_once_there_is_room() {
    let mut lead = Lead::new(64 * MI);
    lead.start("0Mi");
    wait_for("a change", || lead.apply("one", 0).ok());
    lead.disk.take(None);
    let mut acknowledged = vec!["default/one".to_owned()];
    for number in 0..MANY {
        let name = format!("large-{number}");
        match lead.apply(&name, LARGE) {
            Ok(()) => acknowledged.push(format!("default/{name}")),
            Err(_) => break,
        }
    }
    let status = wait_for("it to end", || lead.ended());
    let log = lead.log();
    println!("{} acknowledged\n{log}", acknowledged.len());
    assert_eq!(status.code(), Some(1), "{log}");
    let data = lead.data().display().to_string();
    for part in ["the disk is full", &data, "--data", "start the lead again"] {
        assert!(log.contains(part), "{part} is not in {log}");
    }
    assert!(!log.contains("panicked"), "{log}");

    // Whoever starts it meanwhile need not start it again and again.
    lead.start("8Mi");
    wait_for("it to say so", || {
        lead.log()
            .contains("too little room to start")
            .then_some(())
    });
    assert_eq!(lead.ended(), None);
    lead.disk.take(Some(0));
    let now = wait_for("it to serve", || lead.applications());
    for name in acknowledged {
        assert!(now.contains(&name), "{name} is lost: {now:?}");
    }
    wait_for("a change", || lead.apply("two", 0).ok());
}
