//! What the kernel's verifier says of the programs.

use std::collections::BTreeMap;

use weft_tests::program::{Node, Sizes};

/// How many instructions the verifier goes through before it gives up (`BPF_COMPLEXITY_LIMIT_INSNS`, linux/bpf.h).
const LIMIT: u32 = 1_000_000;

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn the_verifier_goes_through_every_program_with_half_of_its_patience_left() {
    let node = Node::load(Sizes::default());
    let verified: BTreeMap<_, _> = node.verified().into_iter().collect();
    println!("{verified:?}");
    for name in [
        "weft_dispatch_pod",
        "weft_dispatch_tunnel",
        "weft_pod",
        "weft_tunnel",
    ] {
        let count = verified.get(name).copied();
        assert!(
            count.is_some_and(|count| count > 0 && count < LIMIT / 2),
            "{name}: {count:?} instructions"
        );
    }
}
