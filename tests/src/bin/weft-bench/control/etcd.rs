//! Three members of etcd, with TLS between them and to their clients; else as they come.

use std::{fs, net::Ipv4Addr, path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use bytes::{BufMut, Bytes, BytesMut};
use http::Request;
use http_body_util::Full;
use netmanager_api::identity::SERVER_NAME;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use rustls::{ClientConfig, RootCertStore, crypto::ring};
use rustls_pki_types::PrivateKeyDer;
use tokio::time::Instant;
use weft_tests::{
    Process,
    leads::{
        self as weft,
        client::{Answer, Door, request},
        member,
    },
};

const NAMES: [&str; 3] = ["etcd-1", "etcd-2", "etcd-3"];
/// How long the members may take until the first put.
const START: Duration = Duration::from_secs(30);
/// Between two attempts.
const AGAIN: Duration = Duration::from_millis(50);

/// The members; they end with this.
#[derive(Debug)]
pub(super) struct Etcd {
    running: Vec<Process>,
    doors: Vec<Door>,
}

impl Etcd {
    /// Starts three and waits until they take a put.
    pub(super) async fn start(program: &Path, data: &Path) -> Result<Self> {
        let dir = data.join("etcd");
        fs::create_dir_all(&dir)?;
        let tls = certify(&dir)?;
        let addresses = member::addresses(2 * NAMES.len())?;
        let (clients, peers) = addresses.split_at(NAMES.len());
        let group: Vec<_> = NAMES
            .iter()
            .zip(peers)
            .map(|(name, peer)| format!("{name}=https://{peer}"))
            .collect();
        let file = |name: &str| dir.join(name).display().to_string();
        let mut running = Vec::new();
        for ((name, client), peer) in NAMES.iter().zip(clients).zip(peers) {
            let (client, peer) = (format!("https://{client}"), format!("https://{peer}"));
            let arguments = [
                ("--name", (*name).to_owned()),
                ("--data-dir", file(name)),
                ("--listen-client-urls", client.clone()),
                ("--advertise-client-urls", client),
                ("--listen-peer-urls", peer.clone()),
                ("--initial-advertise-peer-urls", peer),
                ("--initial-cluster", group.join(",")),
                ("--cert-file", file("tls.crt")),
                ("--key-file", file("tls.key")),
                ("--trusted-ca-file", file("ca.crt")),
                ("--client-cert-auth", "true".to_owned()),
                ("--peer-cert-file", file("tls.crt")),
                ("--peer-key-file", file("tls.key")),
                ("--peer-trusted-ca-file", file("ca.crt")),
                ("--peer-client-cert-auth", "true".to_owned()),
                ("--logger", "zap".to_owned()),
                ("--log-level", "warn".to_owned()),
            ];
            let arguments = arguments.map(|(option, value)| format!("{option}={value}"));
            let log = dir.join(format!("{name}.log"));
            running.push(member::start(program, &arguments, &log)?);
        }
        let door = |address| Door {
            address,
            tls: tls.clone(),
        };
        let etcd = Self {
            running,
            doors: clients.iter().copied().map(door).collect(),
        };
        let end = Instant::now() + START;
        for (door, name) in etcd.doors.iter().zip(NAMES) {
            while let Err(error) = attempt(door).await {
                if Instant::now() >= end {
                    let log = member::tail(&dir.join(format!("{name}.log")));
                    bail!("{name} takes no put: {error:#}\n{log}");
                }
                tokio::time::sleep(AGAIN).await;
            }
        }
        Ok(etcd)
    }

    pub(super) fn doors(&self) -> &[Door] {
        &self.doors
    }

    pub(super) fn pids(&self) -> Vec<u32> {
        self.running.iter().map(|it| it.0.id()).collect()
    }
}

async fn attempt(door: &Door) -> Result<()> {
    check(&door.open().await?.ask(put("first", 0)).await?)
}

/// Makes an authority, one certificate for all members, and one for the clients.
fn certify(dir: &Path) -> Result<Arc<ClientConfig>> {
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
    let write = |name: &str, text: String| {
        let path = dir.join(name);
        fs::write(&path, text).with_context(|| format!("failed to write {}", path.display()))
    };
    let mut params = CertificateParams::new(vec![SERVER_NAME.to_owned()])?;
    let localhost = SanType::IpAddress(Ipv4Addr::LOCALHOST.into());
    params.subject_alt_names.push(localhost);
    let key = KeyPair::generate()?;
    write("ca.crt", authority.pem())?;
    write("tls.crt", params.signed_by(&key, &authority)?.pem())?;
    write("tls.key", key.serialize_pem())?;

    let key = KeyPair::generate()?;
    let client = CertificateParams::new(vec!["client".to_owned()])?.signed_by(&key, &authority)?;
    let mut roots = RootCertStore::empty();
    roots.add(authority.der().clone())?;
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![client.der().clone()], key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// `etcdserverpb.KV/Put` of what the leads are given, under its name.
pub(super) fn put(key: &str, turn: u64) -> Request<Full<Bytes>> {
    let body = message(key.as_bytes(), weft::goal(key, turn).as_bytes());
    request("POST", "/etcdserverpb.KV/Put", "application/grpc", body)
}

/// gRPC's frame around a `PutRequest`: bytes key = 1, bytes value = 2.
fn message(key: &[u8], value: &[u8]) -> Bytes {
    let mut put = BytesMut::new();
    for (field, bytes) in [(1, key), (2, value)] {
        put.put_u8(field << 3 | 2);
        let mut length = bytes.len();
        while length >= 0x80 {
            put.put_u8((length & 0x7f) as u8 | 0x80);
            length >>= 7;
        }
        put.put_u8(length as u8);
        put.put_slice(bytes);
    }
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(u32::try_from(put.len()).expect("a goal file is small"));
    frame.put_slice(&put);
    frame.freeze()
}

/// Whether a put was done: without a body gRPC's status stands in the headers, else in the trailers.
pub(super) fn check(answer: &Answer) -> Result<()> {
    let said = |name: &str| {
        let value = answer.trailers.get(name).or(answer.headers.get(name));
        value.map_or("missing", |value| value.to_str().unwrap_or("unreadable"))
    };
    ensure!(
        answer.status.is_success() && said("grpc-status") == "0" && !answer.body.is_empty(),
        "etcd answered {}, grpc-status {}: {}",
        answer.status,
        said("grpc-status"),
        said("grpc-message")
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_put_is_framed_as_grpc_and_protobuf_say() {
        assert_eq!(
            message(b"k", b"val").as_ref(),
            b"\0\0\0\0\x08\x0a\x01k\x12\x03val"
        );
        let long = message(b"k", &[7; 300]);
        assert_eq!(&long[5..11], b"\x0a\x01k\x12\xac\x02");
        assert_eq!(long.len(), 5 + 6 + 300);
        assert_eq!(&long[..5], [0, 0, 0, 1, 50]);
    }
}
