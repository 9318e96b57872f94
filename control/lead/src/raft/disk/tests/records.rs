//! A sound database with a record that is not what the lead wrote: every one is found before the lead starts, and named.

use openraft::{
    CommittedLeaderId, Entry, EntryPayload, LogId, Membership, SnapshotMeta, StoredMembership, Vote,
};
use redb::{TableDefinition, TableError};

use super::*;
use crate::raft::{Member, Types, audit::audit};

const FIRST_LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
const FIRST_META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");

fn id(term: u64, index: u64) -> LogId<u64> {
    LogId::new(CommittedLeaderId::new(term, 1), index)
}

fn row(term: u64, index: u64) -> (u64, Vec<u8>) {
    let entry = Entry::<Types> {
        log_id: id(term, index),
        payload: EntryPayload::Blank,
    };
    (index, encode(&entry).unwrap())
}

fn values() -> Vec<(&'static str, Vec<u8>)> {
    let meta = SnapshotMeta::<u64, Member> {
        last_log_id: Some(id(1, 5)),
        last_membership: StoredMembership::default(),
        snapshot_id: "5".to_owned(),
    };
    vec![
        ("identity", encode(&(1_u64, "a")).unwrap()),
        ("vote", encode(&Vote::new_committed(2, 1)).unwrap()),
        ("purged", encode(&id(1, 3)).unwrap()),
        ("committed", encode(&Some(id(2, 7))).unwrap()),
        ("snapshot_meta", encode(&meta).unwrap()),
        ("snapshot_data", b"data".to_vec()),
    ]
}

fn rows() -> Vec<(u64, Vec<u8>)> {
    [(1, 4), (1, 5), (2, 6), (2, 7), (2, 8)]
        .map(|(term, index)| row(term, index))
        .into()
}

/// Entries 4 to 8 behind a snapshot up to 5.
fn sound() -> Disk {
    let disk = Disk::open(Arc::new(Filling::default())).unwrap();
    let values = values().into_iter();
    let mut writes: Vec<_> = values
        .map(|(key, value)| Write::Put { key, value })
        .collect();
    writes.push(Write::Append(rows()));
    disk.write_once(writes).unwrap();
    audit(&disk).unwrap();
    disk
}

/// Changes the tables as they are.
fn change(
    disk: &Disk,
    change: impl FnOnce(&mut Table<'_, u64, &'static [u8]>, &mut Table<'_, &'static str, &'static [u8]>),
) {
    let transaction = disk.database.begin_write().unwrap();
    {
        let mut log = transaction.open_table(LOG).unwrap();
        let mut values = transaction.open_table(VALUES).unwrap();
        change(&mut log, &mut values);
    }
    transaction.commit().unwrap();
}

/// What is found, once it is looked for; the lead's end is known from then on.
fn found(disk: &Disk) -> String {
    let error = audit(disk).unwrap_err();
    let Some(Cause::Damaged(damaged)) = disk.trouble().cause() else {
        panic!("{error:?}");
    };
    let text = damaged.to_string();
    assert!(text.starts_with("/data/lead.redb is damaged: "), "{text}");
    text
}

/// What can become of the bytes of a record.
fn damages(sealed: &[u8], seed: &mut u64) -> Vec<Vec<u8>> {
    let mut all = vec![Vec::new(), vec![0; sealed.len()], sealed[1..].to_vec()];
    for _ in 0..20 {
        let mut damaged = sealed.to_vec();
        let bit = damage::random(seed) % (8 * sealed.len());
        damaged[bit / 8] ^= 1 << (bit % 8);
        all.push(damaged);
    }
    all
}

#[test]
fn every_record_that_changed_is_found_and_named() {
    let mut seed = 7;
    let disk = sound();
    let (mut entries, mut others) = (Vec::new(), Vec::new());
    change(&disk, |log, values| {
        let rows = log.iter().unwrap().map(Result::unwrap);
        entries.extend(rows.map(|(key, value)| (key.value(), value.value().to_vec())));
        let rows = values.iter().unwrap().map(Result::unwrap);
        others.extend(rows.map(|(key, value)| (key.value().to_owned(), value.value().to_vec())));
    });
    assert_eq!((entries.len(), others.len()), (5, 7));
    for (at, (index, sealed)) in entries.iter().enumerate() {
        // A right entry at a wrong index, too.
        let other = entries[(at + 1) % entries.len()].1.clone();
        for bytes in damages(sealed, &mut seed).into_iter().chain([other]) {
            let disk = sound();
            change(&disk, |log, _| drop(log.insert(index, bytes.as_slice())));
            let text = found(&disk);
            assert!(
                text.contains(&format!("log entry {index}: expected ")),
                "{text}"
            );
        }
    }
    for (at, (key, sealed)) in others.iter().enumerate() {
        let other = others[(at + 1) % others.len()].1.clone();
        for bytes in damages(sealed, &mut seed).into_iter().chain([other]) {
            let disk = sound();
            change(&disk, |_, values| {
                drop(values.insert(key.as_str(), bytes.as_slice()))
            });
            let text = found(&disk);
            assert!(
                text.contains(&format!("damaged: {key}: expected ")),
                "{text}"
            );
        }
    }
}

#[test]
fn what_is_missing_is_found() {
    type Change =
        fn(&mut Table<'_, u64, &'static [u8]>, &mut Table<'_, &'static str, &'static [u8]>);
    fn gone(values: &mut Table<'_, &'static str, &'static [u8]>, key: &str) {
        values.remove(key).unwrap().unwrap();
    }
    fn put(values: &mut Table<'_, &'static str, &'static [u8]>, key: &str, value: &impl Serialize) {
        insert(values, key, encode(value).unwrap()).unwrap();
    }
    fn entry(log: &mut Table<'_, u64, &'static [u8]>, index: u64, (_, value): (u64, Vec<u8>)) {
        let sealed = Place::Entry(index).seal(value);
        log.insert(index, sealed.as_slice()).unwrap();
    }
    let cases: &[(&str, Change, &str)] = &[
        (
            "the first",
            |log, _| drop(log.remove(4)),
            "the log: expected log entry 4, found log entry 5",
        ),
        (
            "one between",
            |log, _| drop(log.remove(6)),
            "the log: expected log entry 6, found log entry 7",
        ),
        (
            "the last",
            |log, _| drop(log.remove(8)),
            "expected its end before entry 9, found its end before entry 8",
        ),
        (
            "all",
            |log, _| log.retain(|_, _| false).unwrap(),
            "expected its end before entry 9, found its end before entry 4",
        ),
        (
            "the end",
            |_, values| gone(values, END),
            "expected its end before entry 0, found its end before entry 9",
        ),
        (
            "what was purged",
            |_, values| gone(values, "purged"),
            "the log: expected log entry 0, found log entry 4",
        ),
        (
            "the vote",
            |_, values| gone(values, "vote"),
            "vote: expected term 2 or later, found term 0",
        ),
        (
            "a later vote",
            |_, values| put(values, "vote", &Vote::new(1, 1)),
            "vote: expected term 2 or later, found term 1",
        ),
        (
            "the name",
            |_, values| gone(values, "identity"),
            "identity: expected a name, found none",
        ),
        (
            "the snapshot",
            |_, values| {
                gone(values, "snapshot_meta");
                gone(values, "snapshot_data");
            },
            "snapshot_meta: expected entry 3 or later, found none",
        ),
        (
            "half of it",
            |_, values| gone(values, "snapshot_data"),
            "snapshot_data: expected there, found missing",
        ),
        (
            "its index",
            |log, _| entry(log, 6, row(2, 7)),
            "log entry 6: expected index 6, found index 7",
        ),
        (
            "its term",
            |log, _| entry(log, 8, row(1, 8)),
            "log entry 8: expected term 2 or later, found term 1",
        ),
    ];
    for (what, damage, want) in cases {
        let disk = sound();
        change(&disk, damage);
        let text = found(&disk);
        assert!(text.contains(want), "{what}: {text}");
    }
}

#[test]
fn a_record_that_changes_while_the_lead_runs_ends_it_when_it_is_read() {
    let disk = sound();
    change(&disk, |log, _| drop(log.insert(7, &b"something else"[..])));
    let read = disk.entries::<Entry<Types>>(4..7).unwrap();
    assert_eq!((read.len(), disk.trouble().cause()), (3, None));
    disk.entries::<Entry<Types>>(4..8).unwrap_err();
    let Some(Cause::Damaged(damaged)) = disk.trouble().cause() else {
        panic!("it goes on");
    };
    assert_eq!(damaged.flaw.record, "log entry 7");
}

#[test]
fn damaged_data_still_say_who_the_members_are() {
    let storage = Filling::default();
    let disk = Disk::open(Arc::new(storage.clone())).unwrap();
    let members = [("a", 1), ("b", 2)].map(|(name, port)| {
        let address = std::net::SocketAddr::from(([127, 0, 0, 1], port));
        (u64::from(port), Member::new(name, address))
    });
    let nodes = std::collections::BTreeMap::from(members);
    let membership = Membership::new(vec![nodes.keys().copied().collect()], nodes);
    let entry = Entry::<Types> {
        log_id: id(1, 0),
        payload: EntryPayload::Membership(membership),
    };
    let rows = vec![(0, encode(&entry).unwrap()), row(1, 1), row(1, 2)];
    disk.write_once(vec![Write::Append(rows)]).unwrap();
    change(&disk, |log, _| drop(log.insert(2, &b"something else"[..])));
    drop(disk);
    let found = crate::raft::members_in(Arc::new(storage));
    assert_eq!(found.into_keys().collect::<Vec<_>>(), ["a", "b"]);
}

#[test]
fn a_file_that_lost_its_bytes_is_no_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let folder = Arc::new(crate::world::Folder(dir.path().to_owned()));
    let disk = Disk::open(folder.clone()).unwrap();
    disk.write_identity(1, "a").unwrap();
    drop(disk);
    let file = dir.path().join("lead.redb");
    let whole = std::fs::read(&file).unwrap();
    let half = &whole[..whole.len() / 2];
    for (bytes, what) in [(&[][..], "an empty file"), (&half[..4096], ""), (half, "")] {
        std::fs::write(&file, bytes).unwrap();
        let error = Disk::open(folder.clone()).unwrap_err();
        assert!(matches!(error, DiskError::Damaged(_)), "{error:?}");
        assert!(error.to_string().contains(what), "{error}");
        assert_eq!(std::fs::read(&file).unwrap(), bytes);
    }
    std::fs::write(&file, &whole).unwrap();
    let again = Disk::open(folder).unwrap();
    assert_eq!(again.read_identity().unwrap(), Some((1, "a".to_owned())));
}

#[test]
fn a_log_that_is_cut_at_both_ends_is_sound() {
    let disk = sound();
    let writes = vec![
        Write::TruncateFrom(7),
        put("committed", &Some(id(2, 6))).unwrap(),
    ];
    disk.write_once(writes).unwrap();
    audit(&disk).unwrap();
    disk.write_once(vec![Write::Append(vec![row(2, 7)])])
        .unwrap();
    audit(&disk).unwrap();
    // A snapshot takes the place of all, and of more than was there.
    let meta = SnapshotMeta::<u64, Member> {
        last_log_id: Some(id(2, 20)),
        last_membership: StoredMembership::default(),
        snapshot_id: "20".to_owned(),
    };
    let snapshot = put("snapshot_meta", &meta).unwrap();
    let purged = put("purged", &id(2, 20)).unwrap();
    disk.write_once(vec![snapshot]).unwrap();
    audit(&disk).unwrap();
    disk.write_once(vec![purged, Write::PurgeTo(20)]).unwrap();
    audit(&disk).unwrap();
    disk.write_once(vec![Write::Append(vec![row(2, 21)])])
        .unwrap();
    audit(&disk).unwrap();
}

/// Data as they were before they were sealed.
fn first_layout() -> Filling {
    let storage = Filling::default();
    let database = storage.open(&Builder::new()).unwrap();
    let transaction = database.begin_write().unwrap();
    {
        let mut log = transaction.open_table(FIRST_LOG).unwrap();
        for (index, value) in rows() {
            log.insert(index, value.as_slice()).unwrap();
        }
        let mut meta = transaction.open_table(FIRST_META).unwrap();
        for (key, value) in values() {
            meta.insert(key, value.as_slice()).unwrap();
        }
    }
    transaction.commit().unwrap();
    storage
}

#[test]
fn data_of_the_first_layout_are_brought_up_to_date_and_refused_by_what_knows_only_that() {
    let storage = first_layout();
    for _ in 0..2 {
        let disk = Disk::open(Arc::new(storage.clone())).unwrap();
        audit(&disk).unwrap();
        for (key, value) in values() {
            assert_eq!(disk.get_bytes(key).unwrap(), Some(value), "{key}");
        }
        let mut found = Vec::new();
        let see = |index, entry: &[u8]| {
            found.push((index, entry.to_vec()));
            Ok(true)
        };
        disk.each_entry(.., see).unwrap();
        assert_eq!(found, rows());
    }
    let database = storage.open(&Builder::new()).unwrap();
    let error = database
        .begin_write()
        .unwrap()
        .open_table(FIRST_META)
        .map(drop);
    assert!(
        matches!(error, Err(TableError::TableTypeMismatch { .. })),
        "{error:?}"
    );
}

#[test]
fn a_layout_that_is_not_known_is_refused() {
    let storage = Filling::default();
    drop(Disk::open(Arc::new(storage.clone())).unwrap());
    let set = |layout: u32| {
        let database = storage.open(&Builder::new()).unwrap();
        let transaction = database.begin_write().unwrap();
        let table = TableDefinition::<&str, u32>::new("meta");
        transaction
            .open_table(table)
            .unwrap()
            .insert("layout", layout)
            .unwrap();
        transaction.commit().unwrap();
    };
    set(3);
    let error = Disk::open(Arc::new(storage.clone())).unwrap_err();
    assert!(matches!(error, DiskError::Newer { found: 3 }), "{error:?}");
    set(0);
    let error = Disk::open(Arc::new(storage.clone())).unwrap_err();
    assert!(matches!(error, DiskError::Damaged(_)), "{error:?}");
}
