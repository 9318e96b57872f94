//! What the plugin reads of its runtime, and what its door's two ends read of each other.

use std::{collections::BTreeMap, ffi::OsString, os::unix::ffi::OsStringExt, path::Path};

use netmanager_api::cni::{AttachmentKey, Reply, Request};
use weft_cni::Env;

/// The environment, a line per variable, and after an empty line the configuration.
pub(crate) fn config(data: &[u8]) {
    let (head, stdin) = match data.windows(2).position(|two| two == b"\n\n") {
        Some(at) => (&data[..at], &data[at + 2..]),
        None => (
            &b"CNI_COMMAND=ADD\nCNI_CONTAINERID=c1\nCNI_NETNS=/run/n\nCNI_IFNAME=eth0"[..],
            data,
        ),
    };
    let env: Env = head
        .split(|&byte| byte == b'\n')
        .filter_map(|line| {
            let at = line.iter().position(|&byte| byte == b'=')?;
            let word = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
            Some((word(&line[..at]), word(&line[at + 1..])))
        })
        .collect::<BTreeMap<_, _>>();
    match weft_cni::read(&env, stdin) {
        Ok(Some(key)) => check_key(&key),
        Ok(None) => {}
        // A runtime shows it to people.
        Err(error) => assert!(!error.to_string().is_empty() && error.code() > 0),
    }
}

/// One line of the CNI door, from either end.
pub(crate) fn door(data: &[u8]) {
    if let Some(request) = crate::survives::<Request>(data) {
        match &request {
            Request::Activate { key, .. } | Request::Release { key } | Request::Check { key } => {
                check_key(key);
            }
            Request::Reserve(wish) => check_key(&wish.key),
            Request::Gc { keep, .. } => keep.iter().for_each(check_key),
            Request::Status => {}
        }
    }
    crate::survives::<Reply>(data);
}

/// Whatever the names are, the file of a release stays in its folder, and nobody's own link group is ours.
fn check_key(key: &AttachmentKey) {
    let name = key.file_name();
    assert_eq!(Path::new(&name).file_name(), Some(name.as_ref()));
    assert!(!name.starts_with('.') && name.len() <= 255);
    assert!(key.mark() >> 31 == 1);
}
