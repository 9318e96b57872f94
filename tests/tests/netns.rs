//! The harness keeps its own promises.

use std::{
    io::{Read, Write},
    net::{IpAddr, TcpListener, TcpStream},
    panic::{AssertUnwindSafe, catch_unwind},
    process::Command,
};

use weft_tests::{Netns, topology};

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn two_joined_namespaces_reach_each_other_in_both_families() {
    let (here, there) = topology::pair("pair").unwrap();
    for address in ["192.0.2.2", "2001:db8::2"] {
        let address: IpAddr = address.parse().unwrap();
        let listener = there.run(|| TcpListener::bind((address, 0))).unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut client = here.run(|| TcpStream::connect((address, port))).unwrap();
        client.write_all(b"x").unwrap();
        let mut byte = [0];
        listener.accept().unwrap().0.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_namespace_is_gone_after_its_test_panicked() {
    let mut path = None;
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let netns = Netns::new("panic").unwrap();
        path = Some(netns.path());
        assert!(netns.path().exists());
        netns.run(|| panic!("the test fails"));
    }));
    assert!(panicked.is_err());
    assert!(!path.unwrap().exists());
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn a_process_is_born_inside_and_dies_with_its_guard() {
    let netns = Netns::new("process").unwrap();
    let process = netns.spawn(Command::new("sleep").arg("60")).unwrap();
    let pid = process.0.id();
    let inside = std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    let own = std::fs::read_link("/proc/self/ns/net").unwrap();
    assert_ne!(inside, own);
    drop(process);
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
}
