//! A kernel on which nothing is spliced, because it would hold no sender back: the operator is told, and the node
//! serves as ever.
//!
//! Which kernel is as old is not for the test to guess: `cargo xtask vm` builds and runs this under those that are.

use netmanager_api::table::BackendState::Ready;
use weft_tests::{
    Cgroup,
    mesh::{
        Mesh, Options,
        service::{balanced, service},
    },
    traffic::call,
};

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn an_old_kernel_says_that_it_does_not_splice_and_serves() {
    let cgroup = Cgroup::new("old").unwrap();
    let mut mesh = Mesh::with(
        "unspliced",
        Options {
            args: vec![
                "--splice-cgroup".to_owned(),
                cgroup.path().display().to_string(),
            ],
            ..Options::default()
        },
    );
    let (client, server) = (mesh.pod(1, "client"), mesh.pod(1, "server"));
    server.serve("server");
    mesh.follow(&[service(5, vec![server.backend(0, Ready)])]);
    for to in balanced(5) {
        assert_eq!(call(&client.netns, to).unwrap().1, "server");
    }
    let log = mesh.node(1).log();
    assert!(log.contains("it needs Linux 6.13 or later"), "{log}");
}
