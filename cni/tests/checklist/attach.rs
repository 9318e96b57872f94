//! Lines 4, 5 and 10: ADD and DEL on real links.

use std::{
    thread,
    time::{Duration, Instant},
};

use netmanager_api::{
    cni::{AttachmentKey, Request, Reserve},
    stream::InstanceRef,
};
use serde_json::{Value, json};

use crate::{
    door::{FakeDoor, Mood, reservation},
    netns::Netns,
    plugin::{Plugin, finish},
};

/// A host and a pod with a primary interface of another plugin.
pub(crate) fn host_and_pod() -> (Netns, Netns) {
    let (host, pod) = (Netns::new("host"), Netns::new("pod"));
    let no_detection = "echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad";
    pod.exec(&["sh", "-c", no_detection]);
    pod.ip("link add eth0 type veth peer name other");
    pod.ip("addr add 10.244.0.7/24 dev eth0");
    pod.ip("link set other up");
    pod.ip("link set eth0 up");
    pod.ip("route add default via 10.244.0.1");
    settle(&pod);
    (host, pod)
}

/// Waits for what the kernel does of itself once both links are up, in its own time: their state, and the routes of
/// their link-local addresses.
fn settle(pod: &Netns) {
    let end = Instant::now() + Duration::from_secs(30);
    let count = |what: &str, word: &str| pod.ip(what).matches(word).count();
    while count("-br link show up", " UP ") < 2
        || count("-6 route show table local", "local fe80") < 2
    {
        assert!(Instant::now() < end, "{}", pod.snapshot());
        thread::sleep(Duration::from_millis(5));
    }
}

fn reserve_of(door: &FakeDoor) -> Reserve {
    door.asked()
        .into_iter()
        .find_map(|request| match request {
            Request::Reserve(reserve) => Some(reserve),
            _ => None,
        })
        .expect("a reservation was asked for")
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn add_wires_the_pod_and_del_leaves_it_as_it_was() {
    let (host, pod) = host_and_pod();
    let (host_before, pod_before) = (host.snapshot(), pod.snapshot());
    let door = FakeDoor::open();
    let add = Plugin::new("ADD", &door).on(&host, &pod);
    let result = add.succeed();
    let given = reservation(2);

    let link = pod.ip_json("link show net1").remove(0);
    assert_eq!(link["address"], given.mac, "{link}");
    assert_eq!(link["mtu"], 1420, "{link}");
    assert_eq!(link["operstate"], "UP", "{link}");
    assert_eq!(link["inet6_addr_gen_mode"], "none", "{link}");
    let addresses: Vec<_> = pod.ip_json("addr show net1")[0]["addr_info"]
        .as_array()
        .unwrap()
        .iter()
        .map(|addr| {
            (
                addr["local"].clone(),
                addr["prefixlen"].clone(),
                addr["tentative"].clone(),
            )
        })
        .collect();
    assert_eq!(
        addresses,
        [
            (json!("10.16.0.34"), json!(32), Value::Null),
            (json!("fd00:1:2::7:0:2"), json!(128), Value::Null),
        ]
    );
    let routes = pod.ip("-4 route show proto 87") + &pod.ip("-6 route show proto 87");
    let routes: Vec<_> = routes.lines().map(str::trim).collect();
    assert_eq!(
        routes,
        [
            "10.16.0.0/12 via 10.16.0.33 dev net1 src 10.16.0.34 metric 10 onlink",
            "unreachable 10.16.0.0/12 metric 4294967295",
            "fd00:1:2::/48 via fd00:1:2::7:0:1 dev net1 src fd00:1:2::7:0:2 metric 10 onlink pref medium",
            "unreachable fd00:1:2::/48 dev lo metric 4294967295 pref medium",
        ]
    );
    let neighbours = pod.ip("neigh show dev net1 nud permanent");
    for gateway in ["10.16.0.33", "fd00:1:2::7:0:1"] {
        let line = format!("{gateway} lladdr {} PERMANENT", given.host_mac);
        assert!(neighbours.contains(&line), "{line} in {neighbours}");
    }
    for (setting, value) in [
        ("ipv4/conf/net1/rp_filter", "2"),
        ("ipv6/conf/net1/accept_ra", "0"),
        ("ipv6/conf/net1/disable_ipv6", "0"),
    ] {
        let path = format!("/proc/sys/net/{setting}");
        assert_eq!(pod.exec(&["cat", &path]).trim(), value, "{setting}");
    }
    let host_link = host.ip_json("link show weft2").remove(0);
    assert_eq!(host_link["address"], given.host_mac, "{host_link}");
    assert_eq!(host_link["operstate"], "UP", "{host_link}");
    assert_eq!(door.ops(), ["reserve", "activate"]);
    assert_eq!(
        door.active().into_values().collect::<Vec<_>>(),
        [host_link["ifindex"].as_u64().unwrap() as u32]
    );

    let check = add.clone().command("CHECK").set("prevResult", result);
    assert_eq!(check.succeed(), Value::Null);
    for _ in 0..2 {
        assert_eq!(add.clone().command("DEL").succeed(), Value::Null);
    }
    assert_eq!(host.snapshot(), host_before);
    assert_eq!(pod.snapshot(), pod_before);
    assert!(door.reservations().is_empty());
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn the_result_has_the_shape_of_the_asked_version() {
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let (host, pod) = host_and_pod();
        let door = FakeDoor::open();
        let add = Plugin::new("ADD", &door)
            .on(&host, &pod)
            .set("cniVersion", version);
        let mut result = add.succeed();
        assert_eq!(
            result["interfaces"][1]["sandbox"],
            pod.path().to_str().unwrap()
        );
        result["interfaces"][1]["sandbox"] = "SANDBOX".into();
        insta::with_settings!({snapshot_path => "../golden", prepend_module_to_snapshot => false}, {
            insta::assert_json_snapshot!(format!("result-{version}"), result);
        });
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_pod_whose_default_is_no_ipv6_gets_it_on_this_interface_alone() {
    let host = Netns::new("host");
    let pod = Netns::new("pod");
    let default = "/proc/sys/net/ipv6/conf/default/disable_ipv6";
    pod.exec(&["sh", "-c", &format!("echo 1 >{default}")]);
    let door = FakeDoor::open();
    Plugin::new("ADD", &door).on(&host, &pod).succeed();
    assert!(pod.ip("-6 addr show net1").contains("fd00:1:2::7:0:2/128"));
    assert_eq!(pod.exec(&["cat", default]).trim(), "1");
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn chained_it_adds_its_own_interface_and_keeps_the_result_before() {
    let (host, pod) = host_and_pod();
    let (host_before, pod_before) = (host.snapshot(), pod.snapshot());
    let door = FakeDoor::open();
    let prev = json!({
        "cniVersion": "1.1.0",
        "interfaces": [
            {"name": "cali1", "mac": "02:00:00:00:00:09", "socketPath": "/x"},
            {"name": "eth0", "sandbox": pod.path(), "com.example/colour": "blue"},
        ],
        "ips": [{"address": "10.244.0.7/24", "gateway": "10.244.0.1", "interface": 1, "unknown": [1]}],
        "routes": [{"dst": "0.0.0.0/0", "scope": 0}],
        "dns": {"nameservers": ["10.96.0.10"]},
        "com.example/future": {"kept": true},
    });
    let add = Plugin::new("ADD", &door)
        .on(&host, &pod)
        .env("CNI_IFNAME", "eth0")
        .set("prevResult", prev.clone());
    let result = add.succeed();
    for key in ["interfaces", "ips", "routes"] {
        let (before, now) = (
            prev[key].as_array().unwrap(),
            result[key].as_array().unwrap(),
        );
        assert_eq!(now[..before.len()], before[..], "{key}");
        assert_eq!(now.len(), before.len() + 2, "{key}");
    }
    assert_eq!(result["dns"], prev["dns"]);
    assert_eq!(result["com.example/future"], prev["com.example/future"]);
    assert_eq!(result["interfaces"][3]["name"], "weft0");
    assert_eq!(result["ips"][1]["interface"], 3);
    assert_eq!(reserve_of(&door).key.ifname, "weft0");

    let check = add
        .clone()
        .command("CHECK")
        .set("prevResult", result.clone());
    check.succeed();
    // A later plugin of the chain adds something and tunes our interface.
    let mut later = result;
    later["interfaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"name": "lo2", "sandbox": "x"}));
    pod.ip("link set weft0 txqueuelen 99");
    pod.ip("addr add 192.0.2.1/32 dev weft0");
    check.clone().set("prevResult", later).succeed();
    // The runtime lost both the result and the namespace.
    let del = add
        .command("DEL")
        .set("prevResult", Value::Null)
        .env("CNI_NETNS", "");
    del.succeed();
    assert_eq!(host.snapshot(), host_before);
    assert!(!pod.link_names().contains(&"weft0".to_owned()));
    assert!(door.reservations().is_empty());
    del.on(&host, &pod).succeed();
    assert_eq!(
        pod.snapshot(),
        pod_before,
        "with the namespace the guards go too"
    );
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn an_interface_that_exists_is_refused_and_survives_the_del() {
    let (host, pod) = host_and_pod();
    let (host_before, pod_before) = (host.snapshot(), pod.snapshot());
    let door = FakeDoor::open();
    let add = Plugin::new("ADD", &door)
        .on(&host, &pod)
        .env("CNI_IFNAME", "eth0");
    let (code, message) = add.fail();
    assert_eq!(code, 4, "{message}");
    assert!(message.contains("eth0"), "{message}");
    assert!(door.asked().is_empty());
    add.command("DEL").succeed();
    assert_eq!(pod.snapshot(), pod_before);

    let chained = Plugin::new("ADD", &door)
        .on(&host, &pod)
        .set("prevResult", json!({}))
        .set("ifname", "eth0");
    let (code, message) = chained.fail();
    assert_eq!(code, 7, "{message}");
    assert_eq!(host.snapshot(), host_before);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_second_attachment_of_a_pod_is_refused_and_the_first_lives_on() {
    let (host, pod) = host_and_pod();
    let door = FakeDoor::open();
    let first = Plugin::new("ADD", &door).on(&host, &pod);
    let result = first.succeed();
    let (host_before, pod_before) = (host.snapshot(), pod.snapshot());
    let second = first.clone().env("CNI_IFNAME", "net2");
    let (code, message) = second.fail();
    assert_eq!(code, 7, "{message}");
    assert!(message.contains("10.16.0.0/12"), "{message}");
    second.command("DEL").succeed();
    assert_eq!(host.snapshot(), host_before);
    assert_eq!(pod.snapshot(), pod_before);
    assert_eq!(door.reservations().len(), 1);
    first.command("CHECK").set("prevResult", result).succeed();
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_failed_add_is_rolled_back_in_full() {
    let (host, pod) = host_and_pod();
    let (host_before, pod_before) = (host.snapshot(), pod.snapshot());
    for (op, mood, code) in [
        ("reserve", Mood::Refuse(11, "no table yet"), 11),
        ("reserve", Mood::Garble, 102),
        ("activate", Mood::Refuse(104, "the verifier said no"), 104),
        ("activate", Mood::Garble, 102),
    ] {
        let door = FakeDoor::open();
        door.mood(op, mood.clone());
        let add = Plugin::new("ADD", &door).on(&host, &pod);
        let (got, message) = add.fail();
        assert_eq!(got, code, "{op} {mood:?}: {message}");
        assert_eq!(door.ops().last(), Some(&"release"), "{op} {mood:?}");
        assert_eq!(host.snapshot(), host_before, "{op} {mood:?}");
        assert_eq!(pod.snapshot(), pod_before, "{op} {mood:?}");
        add.command("DEL").succeed();
    }
    let away = FakeDoor::closed();
    let (code, message) = Plugin::new("ADD", &away).on(&host, &pod).fail();
    assert_eq!(code, 11);
    assert!(
        message.contains(away.socket().to_str().unwrap()),
        "{message}"
    );
    assert_eq!(pod.snapshot(), pod_before);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_read_only_proc_sys_is_named_unless_the_settings_are_right_already() {
    let read_only = "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys";
    let (host, pod) = host_and_pod();
    let pod_before = pod.snapshot();
    let door = FakeDoor::open();
    let add = Plugin::new("ADD", &door).on(&host, &pod).after(read_only);
    let (code, message) = add.fail();
    assert_eq!(code, 5, "{message}");
    for word in [
        "ipv6/conf/net1/accept_ra",
        "read-only",
        "let the runtime start the plugin on the host",
    ] {
        assert!(message.contains(word), "{word} in {message}");
    }
    assert_eq!(pod.snapshot(), pod_before);
    let default = "/proc/sys/net/ipv6/conf/default/accept_ra";
    pod.exec(&["sh", "-c", &format!("echo 0 >{default}")]);
    add.succeed();
    let rp_filter = pod.exec(&["cat", "/proc/sys/net/ipv4/conf/net1/rp_filter"]);
    assert_eq!(rp_filter.trim(), "2", "set by netlink");
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn the_identity_and_the_mac_reach_the_netmanager_in_any_order() {
    let instance = Some(InstanceRef {
        service: "shop/bookinfo/reviews".into(),
        instance: 3,
        epoch: 7,
    });
    let by_args = |args: &'static str| move |add: Plugin| add.env("CNI_ARGS", args);
    let annotated = |add: Plugin| {
        add.set(
            "runtimeConfig",
            json!({
                "mac": "02:00:5e:00:aa:01",
                "io.kubernetes.cri.pod-annotations": {
                    "weft.dev/epoch": "7", "other/annotation": "x",
                    "weft.dev/service": "shop/bookinfo/reviews", "weft.dev/instance": "3",
                },
            }),
        )
        .set("capabilities", json!({"mac": true}))
        .set("cni.dev/future", json!({"x": [1]}))
    };
    type Change = Box<dyn Fn(Plugin) -> Plugin>;
    let cases: [(Change, Option<InstanceRef>, Option<&str>); 4] = [
        (
            Box::new(by_args(
                "IgnoreUnknown=1;WEFT_EPOCH=7;MAC=02:00:5E:00:aa:01;WEFT_SERVICE=shop/bookinfo/reviews;\
                 K8S_POD_NAME=reviews-0;WEFT_INSTANCE_NUMBER=3;K8S_POD_NAMESPACE=shop",
            )),
            instance.clone(),
            Some("02:00:5e:00:aa:01"),
        ),
        (
            Box::new(by_args(
                "K8S_POD_NAMESPACE=shop;WEFT_INSTANCE_NUMBER=3;WEFT_SERVICE=shop/bookinfo/reviews;\
                 WEFT_EPOCH=7;K8S_POD_NAME=reviews-0;UNKNOWN=;IgnoreUnknown=true",
            )),
            instance.clone(),
            None,
        ),
        (Box::new(annotated), instance, Some("02:00:5e:00:aa:01")),
        (Box::new(by_args("")), None, None),
    ];
    for (change, instance, mac) in cases {
        let (host, pod) = host_and_pod();
        let door = FakeDoor::open();
        let add = change(Plugin::new("ADD", &door).on(&host, &pod));
        let result = add.succeed();
        let reserve = reserve_of(&door);
        assert_eq!(reserve.instance, instance);
        assert_eq!(reserve.mac.as_deref(), mac);
        assert_eq!(reserve.netns, pod.path().to_str().unwrap());
        if let Some(mac) = mac {
            assert_eq!(pod.ip_json("link show net1")[0]["address"], mac);
            assert_eq!(result["interfaces"][1]["mac"], mac);
        }
        if add.env.get("CNI_ARGS").is_some_and(|args| !args.is_empty()) {
            assert_eq!(
                (&*reserve.pod.namespace, &*reserve.pod.name),
                ("shop", "reviews-0")
            );
        }
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn del_finds_the_pair_when_the_runtime_lost_the_namespace() {
    let (host, pod) = host_and_pod();
    let before = host.snapshot();
    let door = FakeDoor::open();
    let add = Plugin::new("ADD", &door).on(&host, &pod);
    add.succeed();
    // Somebody still holds the namespace; its file is gone.
    let holder = std::fs::File::open(pod.path()).unwrap();
    pod.delete();
    assert_ne!(host.snapshot(), before);
    add.command("DEL").env("CNI_NETNS", "").succeed();
    assert_eq!(host.snapshot(), before);
    drop(holder);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn an_add_takes_back_the_queued_release_of_its_attachment() {
    let (host, pod) = host_and_pod();
    let door = FakeDoor::open();
    let add = Plugin::new("ADD", &door).on(&host, &pod);
    door.mood("release", Mood::Refuse(11, "restarting"));
    add.clone().command("DEL").succeed();
    let key = AttachmentKey {
        network: "weft".into(),
        container_id: "c1".into(),
        ifname: "net1".into(),
    };
    let queued = door.pending().join(key.file_name());
    assert!(queued.exists());
    door.good_mood();
    add.succeed();
    assert!(!queued.exists());
    assert_eq!(door.ops()[2..], ["release", "reserve", "activate"]);
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn parallel_adds_and_dels_do_not_meet() {
    let host = Netns::new("host");
    let before = host.snapshot();
    let door = FakeDoor::open();
    let pods: Vec<_> = (0..6).map(|_| Netns::new("pod")).collect();
    let adds: Vec<_> = pods
        .iter()
        .zip(["c0", "c1", "c2", "c3", "c4", "c5"])
        .map(|(pod, id)| {
            Plugin::new("ADD", &door)
                .on(&host, pod)
                .env("CNI_CONTAINERID", id)
        })
        .collect();
    let all = |plugins: &[Plugin]| {
        let children: Vec<_> = plugins.iter().map(Plugin::start).collect();
        for child in children {
            let answer = finish(child);
            assert_eq!(answer.exit, 0, "{answer:?}");
        }
    };
    all(&adds);
    assert_eq!(door.active().len(), 6);
    let mixed: Vec<_> = adds
        .iter()
        .enumerate()
        .map(|(at, add)| match at % 2 {
            0 => add.clone().command("DEL"),
            _ => add
                .clone()
                .env("CNI_CONTAINERID", format!("again{at}"))
                .command("DEL"),
        })
        .collect();
    all(&mixed);
    assert_eq!(
        door.active().len(),
        3,
        "a DEL of somebody else's container touches nothing"
    );
    for (at, pod) in pods.iter().enumerate() {
        assert_eq!(
            pod.link_names().contains(&"net1".to_owned()),
            at % 2 == 1,
            "pod {at}"
        );
    }
    all(&adds
        .iter()
        .map(|add| add.clone().command("DEL"))
        .collect::<Vec<_>>());
    assert_eq!(host.snapshot(), before);
}
