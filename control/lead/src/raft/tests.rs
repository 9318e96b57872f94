//! openraft's own suite over our log, vote, state machine and snapshots.

use control_core::{
    base::Mesh,
    command::{Batch, Command},
    goal,
};
use openraft::{
    CommittedLeaderId, Entry, EntryPayload, LogId, RaftSnapshotBuilder, StorageError,
    StorageIOError,
    storage::RaftStateMachine,
    testing::{StoreBuilder, Suite},
};

use super::*;
use crate::world::Folder;

fn folder(dir: &tempfile::TempDir) -> Arc<Folder> {
    Arc::new(Folder(dir.path().to_owned()))
}

struct OnDisk;

impl StoreBuilder<Types, LogStore, Machine, tempfile::TempDir> for OnDisk {
    async fn build(&self) -> Result<(tempfile::TempDir, LogStore, Machine), StorageError<u64>> {
        let failed = |error: DiskError| StorageIOError::read(&error);
        let dir = tempfile::tempdir().expect("a temporary folder can be made");
        let disk = Disk::open(folder(&dir)).map_err(failed)?;
        let machine = Machine::load(disk.clone(), Arc::default()).map_err(failed)?;
        Ok((dir, LogStore::new(disk, &machine), machine))
    }
}

#[test]
fn the_storage_passes_openrafts_suite() {
    Suite::test_all(OnDisk).unwrap();
}

#[test]
fn a_members_id_is_the_rank_of_its_name() {
    let address: SocketAddr = "127.0.0.1:1".parse().unwrap();
    let peers = ["c", "a", "b"].map(|name| (name.to_owned(), address));
    let names: Vec<_> = members(&peers.into())
        .into_iter()
        .map(|(id, member)| (id, member.name))
        .collect();
    let want = [(1, "a"), (2, "b"), (3, "c")].map(|(id, name)| (id, name.to_owned()));
    assert_eq!(names, want);
}

#[test]
fn data_of_another_lead_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::open(folder(&dir)).unwrap();
    let address: SocketAddr = "127.0.0.1:1".parse().unwrap();
    let peers = BTreeMap::from([("a".to_owned(), address)]);
    let members = members(&peers);
    let join = Join::default();
    let start = |name| Start {
        name,
        storage: folder(&dir),
        pace: Pace::new(Timers::default()),
        compaction: Compaction::default(),
        peers: &peers,
        join: &join,
    };
    let own = |name| own_id(&disk, &start(name), &members, "d");
    assert!(matches!(own("b"), Err(StartError::NoGroup { .. })));
    assert_eq!(own("a").unwrap(), 1);
    assert!(matches!(own("b"), Err(StartError::OtherLead { .. })));
    assert_eq!(own("a").unwrap(), 1);
}

fn init_mesh() -> Command {
    Command::InitMesh(Mesh {
        name: "demo".to_owned(),
        prefix6: "fd00:1:2::/48".parse().unwrap(),
        prefix4: Some("10.16.0.0/12".parse().unwrap()),
        seed: u64::MAX,
        incarnation: 0,
        lease_ms: 10_000,
    })
}

fn entry(index: u64, commands: Vec<Command>) -> Entry<Types> {
    Entry {
        log_id: LogId::new(CommittedLeaderId::new(1, 1), index),
        payload: EntryPayload::Normal(SharedBatch::from(Batch {
            log_time_ms: 5,
            commands,
        })),
    }
}

#[tokio::test]
async fn every_command_of_every_entry_has_its_effect_and_its_own_outcome() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::open(folder(&dir)).unwrap();
    let replica = Arc::new(Replica::default());
    let mut machine = Machine::load(disk, replica.clone()).unwrap();
    let application = |name: &str| {
        let yaml = format!(
            "apiVersion: weft.dev/v1alpha1\nkind: MeshApplication\nmetadata: {{ name: {name} }}\n\
             spec: {{ services: [{{ name: a, command: [a] }}] }}"
        );
        let mut parsed = goal::parse(&yaml).unwrap();
        Command::Apply(Box::new(parsed.remove(0)))
    };
    let unknown = Command::ForgetCluster {
        cluster: "nowhere".parse().unwrap(),
        abandon: false,
    };
    let outcomes = machine
        .apply([
            entry(1, vec![init_mesh(), application("first")]),
            entry(
                2,
                vec![application("second"), unknown, application("third")],
            ),
        ])
        .await
        .unwrap();
    let shape: Vec<Vec<bool>> = outcomes
        .iter()
        .map(|outcomes| outcomes.iter().map(Result::is_ok).collect())
        .collect();
    assert_eq!(shape, [vec![true, true], vec![true, false, true]]);
    let names: Vec<String> = replica.read(|base| {
        let apps = base.applications.keys();
        apps.map(|app| app.name.to_string()).collect()
    });
    assert_eq!(names, ["first", "second", "third"]);
    assert_eq!(replica.applied(), 2);
}

#[tokio::test]
async fn a_restart_finds_the_knowledge_base_in_the_last_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::open(folder(&dir)).unwrap();
    let replica = Arc::new(Replica::default());
    let mut machine = Machine::load(disk.clone(), replica.clone()).unwrap();
    machine.apply([entry(7, vec![init_mesh()])]).await.unwrap();
    let mut builder = machine.get_snapshot_builder().await;
    builder.build_snapshot().await.unwrap();

    let again = Arc::new(Replica::default());
    let mut restarted = Machine::load(disk, again.clone()).unwrap();
    assert_eq!(again.applied(), 7);
    assert_eq!(again.read(Clone::clone), replica.read(Clone::clone));
    assert!(again.read(|base| base.mesh.is_some()));
    assert_eq!(
        restarted.applied_state().await.unwrap(),
        machine.applied_state().await.unwrap()
    );
}

#[tokio::test]
async fn a_snapshot_that_was_being_made_does_not_take_the_place_of_a_later_one_that_came() {
    let (there, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let disk = Disk::open(folder(&there)).unwrap();
    let mut leader = Machine::load(disk, Arc::default()).unwrap();
    leader.apply([entry(9, vec![init_mesh()])]).await.unwrap();
    let mut builder = leader.get_snapshot_builder().await;
    let later = builder.build_snapshot().await.unwrap();

    let disk = Disk::open(folder(&here)).unwrap();
    let mut machine = Machine::load(disk.clone(), Arc::default()).unwrap();
    machine.apply([entry(7, vec![init_mesh()])]).await.unwrap();
    let mut builder = machine.get_snapshot_builder().await;
    machine.begin_receiving_snapshot().await.unwrap();
    let installed = machine.install_snapshot(&later.meta, later.snapshot);
    installed.await.unwrap();
    builder.build_snapshot().await.unwrap();
    drop(machine);
    let again = Machine::load(disk, Arc::default()).unwrap();
    assert_eq!(again.applied(), later.meta.last_log_id);
}

#[tokio::test]
async fn a_snapshot_is_of_the_last_checkpoint_and_of_the_same_bytes_on_every_lead() {
    let application = |name: String| {
        let yaml = format!(
            "apiVersion: weft.dev/v1alpha1\nkind: MeshApplication\nmetadata: {{ name: {name} }}\n\
             spec: {{ services: [{{ name: a, command: [a] }}] }}"
        );
        let mut parsed = goal::parse(&yaml).unwrap();
        Command::Apply(Box::new(parsed.remove(0)))
    };
    let entries = || {
        let first = entry(0, vec![init_mesh()]);
        let rest = (1..13).map(|index| entry(index, vec![application(format!("app-{index}"))]));
        std::iter::once(first).chain(rest)
    };
    let mut said = Vec::new();
    // One is asked for its snapshot late, one in time, and one starts again in between.
    for asked_after in [13, 10, 4] {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::open(folder(&dir)).unwrap();
        let checks = Checks::new(5);
        let mut machine = Machine::checked(disk.clone(), Arc::default(), checks.clone()).unwrap();
        machine.apply(entries().take(asked_after)).await.unwrap();
        let mut builder = machine.get_snapshot_builder().await;
        let mut snapshot = builder.build_snapshot().await.unwrap();
        if asked_after == 4 {
            assert!(checks.known().last.is_empty(), "it is of no checkpoint");
            let checks = Checks::new(5);
            machine = Machine::checked(disk, Arc::default(), checks.clone()).unwrap();
            machine.apply(entries().skip(4)).await.unwrap();
            let mut builder = machine.get_snapshot_builder().await;
            snapshot = builder.build_snapshot().await.unwrap();
            said.push((snapshot.meta, checks.known()));
            continue;
        }
        let (meta, known) = (snapshot.meta, checks.known());
        // Who gets it has the same.
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::open(folder(&dir)).unwrap();
        let checks = Checks::new(5);
        let mut other = Machine::checked(disk, Arc::default(), checks.clone()).unwrap();
        let installed = other.install_snapshot(&meta, snapshot.snapshot);
        installed.await.unwrap();
        assert_eq!(checks.known(), known);
        said.push((meta, known));
    }
    assert_eq!(said[0].1.last[0].index, 9);
    assert_eq!(said[0], said[1]);
    assert_eq!(said[0], said[2]);
}

#[tokio::test]
async fn data_of_which_others_say_that_they_are_odd_do_not_serve_again() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::open(folder(&dir)).unwrap();
    disk.write_identity(1, "a").unwrap();
    audit(&disk).unwrap();
    let flaw = Flaw {
        record: "the state at entry 9".to_owned(),
        expected: "x as of b, c".to_owned(),
        found: "y".to_owned(),
    };
    Condemned::new(disk.clone()).note(flaw.clone()).await;
    let cause = disk.trouble().cause();
    assert!(matches!(cause, Some(Cause::Damaged(damaged)) if damaged.flaw == flaw));
    drop(disk);
    let again = Disk::open(folder(&dir)).unwrap();
    let error = audit(&again).unwrap_err();
    assert!(matches!(error, DiskError::Damaged(it) if it == flaw));
}

#[tokio::test]
async fn entries_stay_until_the_snapshot_that_takes_their_place_is_on_disk() {
    let (there, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let disk = Disk::open(folder(&there)).unwrap();
    let mut leader = Machine::load(disk, Arc::default()).unwrap();
    leader.apply([entry(7, vec![init_mesh()])]).await.unwrap();
    let mut builder = leader.get_snapshot_builder().await;
    let snapshot = builder.build_snapshot().await.unwrap();
    let last = snapshot.meta.last_log_id.unwrap();

    let disk = Disk::open(folder(&here)).unwrap();
    let mut machine = Machine::load(disk.clone(), Arc::default()).unwrap();
    let mut log = LogStore::new(disk.clone(), &machine);
    let first = encode(&entry(1, Vec::new())).unwrap();
    let rows = vec![(1, first)];
    disk.write(vec![disk::Write::Append(rows)]).await.unwrap();
    machine.begin_receiving_snapshot().await.unwrap();
    let mut purge = Box::pin(log.purge(last));
    assert!(futures::poll!(&mut purge).is_pending());
    assert_eq!(disk.entries::<Entry<Types>>(..).unwrap().len(), 1);
    let installed = machine.install_snapshot(&snapshot.meta, snapshot.snapshot);
    installed.await.unwrap();
    purge.await.unwrap();
    assert!(disk.entries::<Entry<Types>>(..).unwrap().is_empty());

    // One that cannot come any more is not waited for.
    let beyond = LogId::new(last.leader_id, 9);
    let mut purge = Box::pin(log.purge(beyond));
    assert!(futures::poll!(&mut purge).is_pending());
    drop(machine);
    assert!(purge.await.is_err());
}

#[tokio::test]
async fn what_was_committed_by_a_snapshot_that_never_came_is_asked_for_again() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::open(folder(&dir)).unwrap();
    let machine = Machine::load(disk.clone(), Arc::default()).unwrap();
    let mut log = LogStore::new(disk.clone(), &machine);
    let own = entry(1, Vec::new());
    let rows = vec![(1, encode(&own).unwrap())];
    disk.write(vec![disk::Write::Append(rows)]).await.unwrap();
    let other = LogId::new(CommittedLeaderId::new(2, 1), 1);
    let behind = LogId::new(CommittedLeaderId::new(1, 1), 18);
    for (committed, want) in [
        (own.log_id, Some(own.log_id)),
        (other, None),
        (behind, None),
    ] {
        log.save_committed(Some(committed)).await.unwrap();
        assert_eq!(log.read_committed().await.unwrap(), want);
    }
}
