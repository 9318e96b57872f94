//! The shop by itself, without Weft: each service in a namespace of its own on one bridge.

#![expect(
    clippy::unwrap_used,
    reason = "a test whose machines cannot be made fails"
)]

use std::{
    collections::BTreeMap,
    process::{Command, Stdio},
    time::Duration,
};

use serde_json::Value;
use weft_tests::{Netns, Process, topology, wait_for};

/// Each service, its arguments, and its host number on the bridge.
const SERVICES: [(&str, &[&str], u8); 6] = [
    ("details", &["details"], 2),
    ("reviews-v1", &["reviews", "--version", "v1"], 3),
    ("reviews-v2", &["reviews", "--version", "v2"], 4),
    ("reviews-v3", &["reviews", "--version", "v3"], 5),
    ("ratings", &["ratings"], 6),
    ("productpage", &["productpage"], 1),
];

struct Shop {
    running: BTreeMap<&'static str, Process>,
    hosts: Vec<Netns>,
    bridge: Netns,
}

impl Shop {
    fn open() -> Self {
        let bridge = Netns::new("shop").unwrap();
        bridge.ip("link add lan type bridge").unwrap();
        topology::address(&bridge, "lan", "192.0.2.254/24").unwrap();
        topology::address(&bridge, "lan", "2001:db8::fe/64").unwrap();
        bridge.ip("link set lan up").unwrap();
        let mut shop = Self {
            running: BTreeMap::new(),
            hosts: Vec::new(),
            bridge,
        };
        for (name, arguments, number) in SERVICES {
            shop.start(name, arguments, number);
        }
        shop
    }

    fn start(&mut self, name: &'static str, arguments: &[&str], number: u8) {
        let host = Netns::new("shop").unwrap();
        topology::veth(&host, "eth0", &self.bridge, &format!("p{number}")).unwrap();
        self.bridge
            .ip(&format!("link set p{number} master lan"))
            .unwrap();
        topology::address(&host, "eth0", &format!("192.0.2.{number}/24")).unwrap();
        topology::address(&host, "eth0", &format!("2001:db8::{number}/64")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_bookinfo"));
        command
            .args(arguments)
            .env("WEFT_NODE", format!("node-{number}"));
        for (other, _, number) in SERVICES {
            let variable = format!(
                "WEFT_{}_BALANCED_ADDR",
                other.replace('-', "_").to_uppercase()
            );
            command.env(variable, format!("192.0.2.{number}"));
        }
        self.running.insert(name, host.spawn(&mut command).unwrap());
        self.hosts.push(host);
    }

    /// What a client on the bridge gets from the page, `count` times.
    fn pages(&self, host: &str, count: u32) -> Value {
        let url = format!("http://{host}:9080/productpage");
        let mut client = Command::new(env!("CARGO_BIN_EXE_bookinfo"));
        client
            .args(["client", &url, "--count", &count.to_string()])
            .stderr(Stdio::null());
        let output = self.bridge.output(&mut client).unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_page_is_made_by_all_services_in_turn_and_says_so() {
    let shop = Shop::open();
    wait_for("the first pages", Duration::from_secs(10), || {
        (shop.pages("192.0.2.1", 3)["ok"] == 3).then_some(())
    });
    for host in ["192.0.2.1", "[2001:db8::1]"] {
        let pages = shop.pages(host, 6);
        let served = |place: &str| pages["served"][place].as_u64().unwrap();
        assert_eq!(
            (&pages["ok"], &pages["failed"]),
            (&6.into(), &0.into()),
            "{pages}"
        );
        assert_eq!(served("productpage@node-1"), 6);
        assert_eq!(served("details@node-2"), 6);
        for version in [
            "reviews-v1@node-3",
            "reviews-v2@node-4",
            "reviews-v3@node-5",
        ] {
            assert_eq!(served(version), 2);
        }
        assert_eq!(served("ratings@node-6"), 4);
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_page_without_ratings_fails_and_names_them() {
    let mut shop = Shop::open();
    wait_for("the first pages", Duration::from_secs(10), || {
        (shop.pages("192.0.2.1", 3)["ok"] == 3).then_some(())
    });
    drop(shop.running.remove("ratings"));
    let pages = shop.pages("192.0.2.1", 6);
    assert_eq!(
        (&pages["ok"], &pages["failed"]),
        (&2.into(), &4.into()),
        "{pages}"
    );
    let failures = pages["failures"].as_object().unwrap();
    assert!(
        failures
            .keys()
            .all(|why| why.contains("ratings: connect: connection refused")),
        "{pages}"
    );
}
