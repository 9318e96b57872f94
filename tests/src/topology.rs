//! Links between the namespaces of a test.

use crate::netns::{Netns, NetnsError};

/// Makes a veth pair: `a_name` in `a`, `b_name` in `b`, both up.
///
/// # Errors
/// When a name is taken or the capability is missing.
pub fn veth(a: &Netns, a_name: &str, b: &Netns, b_name: &str) -> Result<(), NetnsError> {
    a.ip(&format!(
        "link add {a_name} type veth peer name {b_name} netns {}",
        b.name()
    ))?;
    a.ip(&format!("link set {a_name} up"))?;
    b.ip(&format!("link set {b_name} up"))?;
    Ok(())
}

/// Gives `device` an address with its prefix length; an IPv6 address is usable at once (no DAD).
///
/// # Errors
/// When the address is not one, or is there already.
pub fn address(netns: &Netns, device: &str, address: &str) -> Result<(), NetnsError> {
    let nodad = if address.contains(':') { "nodad" } else { "" };
    netns.ip(&format!("address add {address} dev {device} {nodad}"))?;
    Ok(())
}

/// Two namespaces joined by one veth pair, both ends named `eth0`: 192.0.2.1 and 2001:db8::1 here, .2 and ::2 there.
///
/// # Errors
/// When the capability to make namespaces is missing.
pub fn pair(label: &str) -> Result<(Netns, Netns), NetnsError> {
    let (here, there) = (Netns::new(label)?, Netns::new(label)?);
    veth(&here, "eth0", &there, "eth0")?;
    for (netns, host) in [(&here, 1), (&there, 2)] {
        address(netns, "eth0", &format!("192.0.2.{host}/24"))?;
        address(netns, "eth0", &format!("2001:db8::{host}/64"))?;
    }
    Ok((here, there))
}
