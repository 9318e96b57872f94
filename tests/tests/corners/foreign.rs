//! Somebody else's program on a pod's link.

use aya::{
    Ebpf, EbpfLoader,
    programs::{LinkOrder, SchedClassifier, TcAttachType, tc::TcAttachOptions},
};
use netmanager_api::table::BackendState::Ready;
use weft_tests::{
    Netns,
    mesh::{
        Mesh, Node, Pod, SOON,
        service::{balanced, service},
    },
    raw::{self, ethernet},
    traffic::{call, datagram, ping},
    wait_for,
};

/// For local experiments (IEEE 802).
const ETH_P_EXPERIMENT: u16 = 0x88b5;
const FRAMES: u64 = 20;

/// A program that swallows [`ETH_P_EXPERIMENT`] and lets everything else through (`TCX_NEXT`), as an object file.
fn object() -> Vec<u8> {
    const TC_ACT_SHOT: u32 = 2;
    const TCX_NEXT: u32 = u32::MAX;
    let instruction = |opcode: u8, registers: u8, offset: i16, immediate: u32| {
        let mut bytes = vec![opcode, registers];
        bytes.extend(offset.to_le_bytes());
        bytes.extend(immediate.to_le_bytes());
        bytes
    };
    let code = [
        instruction(0x61, 0x10, 16, 0), // r0 = skb->protocol
        instruction(0x55, 0x00, 2, u32::from(ETH_P_EXPERIMENT.to_be())), // if r0 != it, on
        instruction(0xb7, 0x00, 0, TC_ACT_SHOT),
        instruction(0x95, 0x00, 0, 0),
        instruction(0xb7, 0x00, 0, TCX_NEXT),
        instruction(0x95, 0x00, 0, 0),
    ]
    .concat();
    let names = b"\0classifier\0license\0.symtab\0.strtab\0foreign\0";
    let name = |wanted: &str| {
        let found = names
            .windows(wanted.len())
            .position(|name| name == wanted.as_bytes());
        found.unwrap() as u32
    };
    // Symbols: none, and the program (global function in section 1).
    let mut symbols = vec![0; 24];
    symbols.extend(name("foreign").to_le_bytes());
    symbols.extend([0x12, 0, 1, 0]);
    symbols.extend(0_u64.to_le_bytes());
    symbols.extend((code.len() as u64).to_le_bytes());
    // Name, type, flags, link, info, alignment, entry size, bytes (ELF-64 object file format 1.5).
    type Section<'a> = (u32, u32, u64, [u32; 2], [u64; 2], &'a [u8]);
    let sections: [Section<'_>; 5] = [
        (0, 0, 0, [0, 0], [0, 0], &[]),
        (name("classifier"), 1, 6, [0, 0], [8, 0], &code),
        (name("license"), 1, 2, [0, 0], [1, 0], b"GPL\0"),
        (name(".symtab"), 2, 0, [4, 1], [8, 24], &symbols),
        (name(".strtab"), 3, 0, [0, 0], [1, 0], names),
    ];
    const HEADER: usize = 64;
    let (mut bodies, mut table) = (Vec::new(), Vec::new());
    for (name, kind, flags, links, [alignment, entry], bytes) in sections {
        while bodies.len() % 8 != 0 {
            bodies.push(0);
        }
        let at = (HEADER + bodies.len()) as u64;
        bodies.extend(bytes);
        table.extend([name.to_le_bytes(), kind.to_le_bytes()].concat());
        table.extend(
            [flags, 0, at, bytes.len() as u64]
                .map(u64::to_le_bytes)
                .concat(),
        );
        table.extend(links.map(u32::to_le_bytes).concat());
        table.extend([alignment, entry].map(u64::to_le_bytes).concat());
    }
    while bodies.len() % 8 != 0 {
        bodies.push(0);
    }
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    elf.extend([1, 0, 247, 0, 1, 0, 0, 0]); // relocatable, BPF, version 1
    elf.extend(
        [0, 0, (HEADER + bodies.len()) as u64]
            .map(u64::to_le_bytes)
            .concat(),
    );
    elf.extend([0; 4]);
    elf.extend(
        [HEADER as u16, 0, 0, 64, 5, 4]
            .map(u16::to_le_bytes)
            .concat(),
    );
    [elf, bodies, table].concat()
}

/// The program on the ingress of a pod's link, until it is dropped.
fn attach(netns: &Netns, device: &str, order: LinkOrder) -> Ebpf {
    netns.run(|| {
        let mut ebpf = EbpfLoader::new().load(&object()).unwrap();
        let program: &mut SchedClassifier =
            ebpf.program_mut("foreign").unwrap().try_into().unwrap();
        program.load().unwrap();
        let options = TcAttachOptions::TcxOrder(order);
        program
            .attach_with_options(device, TcAttachType::Ingress, options)
            .unwrap();
        ebpf
    })
}

/// How many of some frames that are nothing of the mesh's Weft's program refused.
fn refused(node: &Node, pod: &Pod, is_done: impl Fn(u64) -> bool) {
    let before = node.reasons()["not_mesh"];
    let frame = ethernet(pod.host_mac, pod.mac, ETH_P_EXPERIMENT, &[0; 46]);
    for _ in 0..FRAMES {
        raw::send(&pod.netns, "net1", &frame);
    }
    // What follows on the same link comes after them.
    ping(&pod.netns, balanced(5)[0]).unwrap();
    wait_for("the frames are counted", SOON, || {
        is_done(node.reasons()["not_mesh"] - before).then_some(())
    });
}

#[test]
#[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
fn another_program_on_a_pods_link_is_left_alone_and_leaves_us_alone() {
    let mut mesh = Mesh::start("foreign", 1);
    let (client, server) = (mesh.pod(1, "client"), mesh.pod(1, "server"));
    server.serve("server");
    mesh.follow(&[service(5, vec![server.backend(0, Ready)])]);
    let exchange = || {
        for to in balanced(5) {
            assert_eq!(call(&client.netns, to).unwrap().1, "server");
            assert_eq!(datagram(&client.netns, to).unwrap(), "server");
            ping(&client.netns, to).unwrap();
        }
    };
    refused(mesh.node(1), &client, |count| count >= FRAMES);

    let before = attach(&mesh.node(1).netns, &client.host_link, LinkOrder::first());
    exchange();
    // It comes first and swallows what is its own; a few others are the pod's chatter.
    refused(mesh.node(1), &client, |count| count < FRAMES);
    mesh.node_mut(1).kill();
    mesh.node_mut(1).run();
    mesh.node(1).wait_ready();
    exchange();
    refused(mesh.node(1), &client, |count| count < FRAMES);
    drop(before);
    refused(mesh.node(1), &client, |count| count >= FRAMES);

    // Behind us nothing comes: what a pod may not send ends with us.
    let _behind = attach(&mesh.node(1).netns, &client.host_link, LinkOrder::last());
    exchange();
    refused(mesh.node(1), &client, |count| count >= FRAMES);
}
