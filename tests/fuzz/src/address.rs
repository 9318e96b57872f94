//! The address codec: each address that decodes is the address of its name.

use arbitrary::{Arbitrary, Unstructured};
use ebpf_common::addr::{Mesh4, Mesh6, Name4, Name6, Policy};

#[derive(Arbitrary)]
struct Input {
    prefix: [u8; 5],
    len: u8,
    /// Laid over an address that names something, so that most decode.
    noise: u128,
    policy: u8,
    numbers: (u32, u32),
}

pub(crate) fn run(data: &[u8]) {
    if let Ok(input) = Input::arbitrary(&mut Unstructured::new(data)) {
        v6(&input);
        v4(&input);
    }
}

fn v6(input: &Input) {
    let [a, b, c, d, e] = input.prefix;
    let base = u128::from(u64::from_be_bytes([0, 0, 0xfd, a, b, c, d, e])) << 80;
    let mesh = Mesh6::new(base).expect("a unique local /48");
    let (high, low) = input.numbers;
    let policy = Policy::from_code(input.policy & 7);
    let name = match policy {
        Some(policy) => Name6::Vip {
            policy,
            service: high,
            instance: if policy == Policy::Instance { low } else { 0 },
        },
        None => Name6::Endpoint {
            node: high,
            endpoint: low,
        },
    };
    let address = mesh.encode(name);
    assert!(mesh.contains(address));
    assert_eq!(mesh.decode(address), Some(name));
    for near in [address ^ input.noise, address ^ (1 << (input.noise % 128))] {
        match mesh.decode(near) {
            Some(name) => assert_eq!(mesh.encode(name), near),
            None => assert!(near != address),
        }
    }
}

fn v4(input: &Input) {
    let len = 12 + input.len % 5;
    let [a, b, ..] = input.prefix;
    let base = u32::from_be_bytes([a, b, 0, 0]) & !(u32::MAX >> len);
    let mesh = Mesh4::new(base, len).expect("a /12 to /16");
    let (number, noise) = input.numbers;
    let mut names = vec![Name4::Endpoint { offset: number }];
    if let Some(policy) = Policy::from_code(input.policy & 7) {
        names.push(Name4::Vip { policy, number });
        let number = number % (1 << mesh.number_bits());
        names.push(Name4::Vip { policy, number });
    }
    for name in names {
        if let Some(address) = mesh.encode(name) {
            assert!(mesh.contains(address));
            assert_eq!(mesh.decode(address), Some(name));
        }
    }
    for address in [noise, base | noise & (u32::MAX >> len)] {
        if let Some(name) = mesh.decode(address) {
            assert_eq!(mesh.encode(name), Some(address));
        }
    }
}
