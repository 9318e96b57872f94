use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use netmanager_api::table::{Mesh, Node, Revision};

use super::*;
use crate::wireguard::{
    Kind, Report,
    key::PublicKey,
    peers::{PeerOp, WantedPeer},
};

/// Keeps the sets of peers that were applied, oldest first.
#[derive(Clone, Default)]
struct FakeTunnels(Arc<Mutex<Vec<usize>>>);

impl Tunnels for FakeTunnels {
    async fn ensure(&mut self) -> Result<Device, TunnelsError> {
        Ok(Device {
            name: "fake".into(),
            kind: Kind::Kernel,
            ifindex: 7,
            mtu: 1_420,
            public_key: key(0).parse().unwrap(),
            port: 1,
        })
    }

    fn set_mtu(&mut self, _: u16) {}

    async fn apply(
        &mut self,
        want: &BTreeMap<PublicKey, WantedPeer>,
    ) -> Result<Vec<PeerOp>, TunnelsError> {
        self.0.lock().unwrap().push(want.len());
        Ok(Vec::new())
    }

    async fn report(&mut self) -> Result<Report, TunnelsError> {
        Ok(Report {
            device: self.ensure().await?,
            peers: BTreeMap::new(),
        })
    }

    async fn remove(&mut self) -> Result<(), TunnelsError> {
        unreachable!("the keeper keeps")
    }
}

/// 32 bytes in base64.
fn key(number: u32) -> String {
    let last = ["A", "E", "I", "M"][number as usize];
    format!("B{}{last}=", "A".repeat(41))
}

fn table(peers: &[u32]) -> Arc<Table> {
    Arc::new(Table {
        revision: Revision::default(),
        mesh: Mesh {
            prefix6: "fd12:3456:789a::/48".parse().unwrap(),
            prefix4: None,
            seed: 1,
        },
        node: Node {
            number: 9,
            blocks4: Vec::new(),
            carbon_g_kwh: None,
        },
        peers: peers
            .iter()
            .map(|&number| Peer {
                number,
                name: format!("c/n{number}"),
                public_key: key(number),
                endpoint: None,
                blocks4: Vec::new(),
                carbon_g_kwh: None,
            })
            .collect(),
        services: Vec::new(),
        spliced: Vec::new(),
    })
}

#[tokio::test(start_paused = true)]
async fn a_peer_is_carried_before_the_maps_change_and_one_that_leaves_until_they_have() {
    let fake = FakeTunnels::default();
    let applied = fake.0.clone();
    let (wanted, wanting) = watch::channel(None);
    let (mtu, mtus) = watch::channel(1_420);
    let (sender, carried) = watch::channel(Carried::default());
    let folder = tempfile::tempdir().unwrap();
    let keeper = Keeper {
        tunnels: fake,
        next: None,
        generations: Generations::default(),
        is_outdated: false,
        open: Box::new(|_, _, _| unreachable!("nobody moves")),
        forget_key: Box::new(|_| ()),
        store: Arc::new(Store::open(folder.path()).unwrap()),
        heard: None,
        is_needed: false,
        carried: sender,
        trouble: None,
    };
    let shutdown = CancellationToken::new();
    let kept = tokio::spawn(keeper.run(wanting, mtus, shutdown.clone()));
    let mut carrier = Carrier {
        wanted,
        mtu,
        carried,
        late: Vec::new(),
    };
    let mut changes = carrier.watch();

    carrier.carry(&table(&[1, 2])).await;
    assert_eq!(
        *applied.lock().unwrap(),
        [2],
        "they are known when this returns"
    );
    assert_eq!(carrier.device().unwrap().ifindex, 7);

    carrier.carry(&table(&[2, 3])).await;
    assert_eq!(
        applied.lock().unwrap().last(),
        Some(&3),
        "1 still has flows"
    );
    changes.mark_unchanged();
    carrier.settle(&table(&[2, 3]));
    changes.changed().await.unwrap();
    assert_eq!(applied.lock().unwrap().last(), Some(&2), "1 is forgotten");
    shutdown.cancel();
    kept.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_that_does_not_answer_is_waited_for_once() {
    let (wanted, wanting) = watch::channel(None);
    let (mtu, mtus) = watch::channel(1_420);
    let (sender, carried) = watch::channel(Carried::default());
    let mut carrier = Carrier {
        wanted,
        mtu,
        carried,
        late: Vec::new(),
    };
    let start = Instant::now();
    carrier.carry(&table(&[1])).await;
    assert_eq!(start.elapsed(), PATIENCE);
    carrier.carry(&table(&[1])).await;
    assert_eq!(start.elapsed(), PATIENCE, "the node is not held up again");
    drop((wanting, mtus, sender));
}
