//! The tunnel's link, whoever carries it: up, with its MTU; and whether the kernel can carry it.

use std::io;

use futures::TryStreamExt;
use netlink_packet_route::link::{LinkAttribute, LinkFlags};
use rtnetlink::{Handle, LinkUnspec};
use wireguard_control::{Backend, DeviceUpdate, InterfaceName, backends};

use super::TunnelsError;
use crate::tunnel::without_link_local;

/// Sets the link `name` up with `mtu` where it is not, and returns its index and MTU.
pub(super) async fn up(name: &str, mtu: u16) -> Result<(u32, u32), TunnelsError> {
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(|source| TunnelsError::Device {
            action: "open netlink for",
            name: name.to_owned(),
            source,
        })?;
    let connection = tokio::spawn(connection);
    let result = set_up(&handle, name, u32::from(mtu)).await;
    connection.abort();
    result
}

async fn set_up(handle: &Handle, name: &str, want: u32) -> Result<(u32, u32), TunnelsError> {
    let failed = |action| {
        move |source| TunnelsError::Link {
            action,
            name: name.to_owned(),
            source: Box::new(source),
        }
    };
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    let link = links.try_next().await.map_err(failed("find"))?;
    let link = link.ok_or_else(|| TunnelsError::Device {
        action: "find",
        name: name.to_owned(),
        source: io::ErrorKind::NotFound.into(),
    })?;
    let index = link.header.index;
    let up = link.header.flags.contains(LinkFlags::Up);
    let mtu = link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Mtu(mtu) => Some(*mtu),
            _ => None,
        });
    if !up || mtu != Some(want) {
        without_link_local(name);
        handle
            .link()
            .change(LinkUnspec::new_with_index(index).mtu(want).up().build())
            .execute()
            .await
            .map_err(failed("set up"))?;
    }
    Ok((index, want))
}

/// Whether the kernel makes WireGuard links: one is made under a name of our own and removed again.
pub(super) fn kernel_has_wireguard() -> Result<bool, TunnelsError> {
    let text = format!("weft-try{:x}", std::process::id());
    let name: InterfaceName = text.parse().expect("8 characters and at most 6 hex digits");
    let failed = |action| {
        let name = text.clone();
        move |source| TunnelsError::Device {
            action,
            name,
            source,
        }
    };
    match DeviceUpdate::new().apply(&name, Backend::Kernel) {
        Ok(()) => {
            backends::kernel::delete_interface(&name).map_err(failed("remove the trial"))?;
            Ok(true)
        }
        Err(error) if is_unknown_kind(&error) => Ok(false),
        Err(error) => Err(failed("try")(error)),
    }
}

/// Whether the kernel knows no link of that kind (`EOPNOTSUPP`), rather than refuses to make one.
fn is_unknown_kind(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EOPNOTSUPP)
}
