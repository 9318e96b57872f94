//! Makes the machines: namespaces, links, addresses, routes.

use std::{fs, net::Ipv4Addr};

use crate::{
    error::LabError,
    folder::Lab,
    ip,
    process::inside,
    spec::{Machine, Site, Spec},
    wan::DEVICE,
};

/// The routing table in the WAN's namespace that leads into the delays.
const DELAYED: u8 = 100;

/// Makes everything that `spec` names; what exists already is an error.
pub(crate) fn make(lab: &Lab, spec: &Spec) -> Result<(), LabError> {
    wan(lab, spec)?;
    for site in &spec.sites {
        router(lab, site)?;
    }
    for machine in spec.machines() {
        lan_machine(lab, &machine)?;
    }
    Ok(())
}

fn namespace(lab: &Lab, name: &str, forwards: Forwarding) -> Result<String, LabError> {
    let netns = lab.netns(name);
    ip::ip(&["netns", "add", &netns])?;
    if forwards == Forwarding::On {
        inside(&netns, || {
            set("/proc/sys/net/ipv4/ip_forward", "1")?;
            set("/proc/sys/net/ipv4/conf/all/rp_filter", "0")?;
            set("/proc/sys/net/ipv4/conf/default/rp_filter", "0")
        })?;
    }
    Ok(netns)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Forwarding {
    On,
    Off,
}

fn set(path: &str, value: &str) -> Result<(), LabError> {
    fs::write(path, value).map_err(LabError::file(path))
}

/// What comes from a router goes into the device `wan`, and what comes out of it to a router.
fn wan(lab: &Lab, spec: &Spec) -> Result<(), LabError> {
    let netns = namespace(lab, "wan", Forwarding::On)?;
    let mut lines = vec![
        "link set lo up".to_owned(),
        format!("tuntap add dev {DEVICE} mode tun"),
        format!("link set {DEVICE} up"),
        format!("route add default dev {DEVICE} table {DELAYED}"),
        format!("route add unreachable default metric 4278198272 table {DELAYED}"),
    ];
    for site in &spec.sites {
        lines.push(format!("rule add iif {} lookup {DELAYED}", site.name));
    }
    ip::inside(&netns, &lines)
}

/// A site's router: a bridge for its LAN and a line to the WAN.
fn router(lab: &Lab, site: &Site) -> Result<(), LabError> {
    let name = format!("router-{}", site.name);
    let netns = namespace(lab, &name, Forwarding::On)?;
    let [own, far] = site.line();
    let (gateway, wan) = (site.gateway(), lab.netns("wan"));
    ip::inside(
        &netns,
        &[
            "link set lo up".to_owned(),
            "link add lan type bridge".to_owned(),
            format!("address add {gateway}/24 dev lan"),
            "link set lan up".to_owned(),
            format!("link add wan type veth peer name {} netns {wan}", site.name),
            format!("address add {own}/31 dev wan"),
            "link set wan up".to_owned(),
            format!("route add 100.64.0.0/10 via {far}"),
        ],
    )?;
    ip::inside(
        &wan,
        &[
            format!("address add {far}/31 dev {}", site.name),
            format!("link set {} up", site.name),
            format!("route add {}/24 via {own}", network(gateway)),
        ],
    )
}

/// A machine with one interface `eth0` on its site's LAN, and no way out of the lab.
fn lan_machine(lab: &Lab, machine: &Machine<'_>) -> Result<(), LabError> {
    let netns = namespace(lab, &machine.name, Forwarding::Off)?;
    let router = lab.netns(&format!("router-{}", machine.site.name));
    let (address, gateway) = (machine.address, machine.site.gateway());
    let [.., port] = address.octets();
    ip::inside(
        &netns,
        &[
            "link set lo up".to_owned(),
            format!("link add eth0 type veth peer name p{port} netns {router}"),
            format!("address add {address}/24 dev eth0"),
            "link set eth0 up".to_owned(),
            format!("route add 100.64.0.0/10 via {gateway}"),
        ],
    )?;
    ip::inside(&router, &[format!("link set p{port} master lan up")])
}

fn network(gateway: Ipv4Addr) -> Ipv4Addr {
    let [a, b, c, _] = gateway.octets();
    Ipv4Addr::new(a, b, c, 0)
}

#[cfg(test)]
mod tests {
    use std::{
        net::{SocketAddr, TcpListener, TcpStream},
        path::PathBuf,
        thread,
        time::{Duration, Instant},
    };

    use super::*;
    use crate::{down, folder::Manifest, process, wan};

    /// How many handshakes are timed.
    const HANDSHAKES: usize = 5;

    /// How long a TCP handshake takes from one machine to another, the quickest of some: a busy machine adds to it.
    fn handshake(lab: &Lab, from: &Machine<'_>, to: &Machine<'_>) -> Duration {
        let failed = |error| LabError::file(to.name.clone())(error);
        let address = SocketAddr::from((to.address, 0));
        let listener = inside(&lab.netns(&to.name), || {
            TcpListener::bind(address).map_err(failed)
        });
        let listener = listener.unwrap();
        let address = listener.local_addr().unwrap();
        inside(&lab.netns(&from.name), || {
            let patience = Duration::from_secs(5);
            // The first one also resolves neighbours on the way.
            TcpStream::connect_timeout(&address, patience).map_err(failed)?;
            let mut quickest = Duration::MAX;
            for _ in 0..HANDSHAKES {
                let start = Instant::now();
                TcpStream::connect_timeout(&address, patience).map_err(failed)?;
                quickest = quickest.min(start.elapsed());
            }
            Ok(quickest)
        })
        .unwrap()
    }

    #[test]
    #[ignore = "needs CAP_NET_ADMIN: cargo xtask netns"]
    fn sites_are_as_far_apart_as_their_delays_and_a_lab_leaves_nothing() {
        let spec = Spec::default();
        let manifest = Manifest {
            spec: spec.clone(),
            owner: process::of(i32::try_from(std::process::id()).unwrap()),
            binaries: PathBuf::new(),
            programs: Vec::new(),
        };
        let lab = Lab::create(&manifest).unwrap();
        make(&lab, &spec).unwrap();
        let (netns, id) = (lab.netns("wan"), lab.id.clone());
        thread::spawn(move || inside(&netns, || wan::run(&id)));
        let machines = spec.machines();
        let find = |name: &str| {
            machines
                .iter()
                .find(|machine| machine.name == name)
                .unwrap()
        };
        let cloud_edge = handshake(&lab, find("cloud-1"), find("edge-1"));
        let fog_edge = handshake(&lab, find("fog-2"), find("lead-c"));
        let within = handshake(&lab, find("edge-1"), find("edge-2"));
        assert!(!lab.is_dead());
        down::one(&lab).unwrap();
        assert!(cloud_edge >= Duration::from_millis(30), "{cloud_edge:?}");
        assert!(fog_edge >= Duration::from_millis(10), "{fog_edge:?}");
        assert!(within < fog_edge, "{within:?}");
        assert_eq!(process::names(&lab.prefix()), Vec::<String>::new());
        assert!(!lab.dir.exists());
    }
}
