//! The mesh's addresses, and services as a table has them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ebpf_common::addr::{Mesh4, Mesh6, Name4, Name6, Policy};
use ipnet::{Ipv4Net, Ipv6Net};
use netmanager_api::{
    stream::InstanceRef,
    table::{Backend, PolicyName, Port, Protocol, Service, Vip},
};

use crate::traffic::{DNS, HTTP};

/// Where the servers of the tests listen: behind [`HTTP`] and [`DNS`].
pub const TARGET_HTTP: u16 = 8080;
/// See [`TARGET_HTTP`].
pub const TARGET_DNS: u16 = 5353;
/// How many instances of a service have an IPv4 instance VIP.
const INSTANCES: u32 = 16;

/// The mesh's IPv6 prefix.
#[must_use]
pub fn prefix6() -> Ipv6Net {
    "fd12:3456:789a::/48".parse().unwrap()
}

/// The mesh's IPv4 prefix.
#[must_use]
pub fn prefix4() -> Ipv4Net {
    "10.16.0.0/12".parse().unwrap()
}

/// A service with TCP [`HTTP`] and UDP [`DNS`], VIPs of the policies that weigh, and one per instance. (A sticky
/// VIP takes 16,381 slots: who needs one adds its [`vip`].)
#[must_use]
pub fn service(number: u32, backends: Vec<Backend>) -> Service {
    let port = |protocol, port, target_port| Port {
        protocol,
        port,
        target_port,
        follow: false,
    };
    let policies = [
        Policy::Balanced,
        Policy::Closest,
        Policy::LeastLoaded,
        Policy::Greenest,
    ]
    .map(|policy| vip(policy, number, None))
    .into_iter();
    let instances = backends
        .iter()
        .map(|backend| vip(Policy::Instance, number, Some(backend.instance)));
    Service {
        name: name(number),
        number,
        ports: vec![
            port(Protocol::Tcp, HTTP, TARGET_HTTP),
            port(Protocol::Udp, DNS, TARGET_DNS),
        ],
        vips: policies.chain(instances).collect(),
        backends,
    }
}

/// An instance of [`service`] `number`.
#[must_use]
pub fn instance(number: u32, instance: u32) -> InstanceRef {
    InstanceRef {
        service: name(number),
        instance,
        epoch: 1,
    }
}

fn name(number: u32) -> String {
    format!("default/shop/s{number}")
}

/// A VIP of a service, as the leads number it.
#[must_use]
pub fn vip(policy: Policy, service: u32, instance: Option<u32>) -> Vip {
    let mesh4 = Mesh4::new(prefix4().network().to_bits(), 12).unwrap();
    let mesh6 = Mesh6::new(prefix6().network().to_bits()).unwrap();
    let number = instance.map_or(service, |instance| service * INSTANCES + instance);
    let name6 = Name6::Vip {
        policy,
        service,
        instance: instance.unwrap_or(0),
    };
    Vip {
        policy: PolicyName(policy),
        instance,
        addr6: Ipv6Addr::from_bits(mesh6.encode(name6)),
        addr4: mesh4
            .encode(Name4::Vip { policy, number })
            .map(Ipv4Addr::from_bits),
    }
}

/// Both addresses of a VIP of a service.
#[must_use]
pub fn addresses(policy: Policy, service: u32) -> [IpAddr; 2] {
    both(&vip(policy, service, None))
}

/// Both addresses of an instance's VIP.
#[must_use]
pub fn instance_addresses(service: u32, instance: u32) -> [IpAddr; 2] {
    both(&vip(Policy::Instance, service, Some(instance)))
}

/// Both addresses of a service's balanced VIP.
#[must_use]
pub fn balanced(service: u32) -> [IpAddr; 2] {
    addresses(Policy::Balanced, service)
}

fn both(vip: &Vip) -> [IpAddr; 2] {
    [vip.addr4.unwrap().into(), vip.addr6.into()]
}
