//! A file that is not what was written: it is refused, or holds exactly what it held.

use super::*;

/// What a disk writes whole.
const PAGE: usize = 4096;
/// redb's header: the commits, and which of them counts.
const HEADER: usize = 320;

/// The next of a row of numbers without a pattern (splitmix64).
pub(super) fn random(state: &mut u64) -> usize {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut it = *state;
    it = (it ^ (it >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    it = (it ^ (it >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (it >> 33) as usize
}

fn bytes(disk: &InMemoryBackend) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(disk.len().unwrap()).unwrap()];
    disk.read(0, &mut bytes).unwrap();
    bytes
}

fn of(bytes: &[u8]) -> Filling {
    let filling = Filling::default();
    filling.data.set_len(bytes.len() as u64).unwrap();
    filling.data.write(0, bytes).unwrap();
    filling
}

type State = (Option<u64>, Vec<Vec<u8>>);

fn state(disk: &Disk) -> Result<State, DiskError> {
    Ok((disk.get("vote")?, disk.entries(..)?))
}

/// What the lead had on its disk, and the disk: as it is while it runs, and after a clean end.
fn written() -> (State, [Vec<u8>; 2]) {
    let storage = Filling::default();
    let disk = Disk::open(Arc::new(storage.clone())).unwrap();
    for term in 1..4_u64 {
        let vote = put("vote", &term).unwrap();
        disk.write_once(vec![vote]).unwrap();
        for index in 0..10 {
            let index = 10 * term + index;
            let row = encode(&vec![7_u8; 300]).unwrap();
            let append = Write::Append(vec![(index, row)]);
            disk.write_once(vec![append]).unwrap();
        }
    }
    let vote = put("vote", &4_u64).unwrap();
    disk.write_once(vec![vote]).unwrap();
    let (state, killed) = (state(&disk).unwrap(), bytes(&storage.data));
    drop(disk);
    (state, [killed, bytes(&storage.data)])
}

/// Whether damaged bytes are refused; they must hold the same otherwise.
fn is_refused(damaged: &[u8], want: &State, how: &str) -> bool {
    let disk = of(damaged);
    let found = Disk::open(Arc::new(disk.clone())).and_then(|disk| state(&disk));
    match found {
        Ok(found) => {
            assert!(found == *want, "{how}: {:?}", found.0);
            false
        }
        Err(_) => {
            assert!(bytes(&disk.data) == damaged, "{how}: it was changed");
            true
        }
    }
}

#[test]
fn a_flipped_bit_is_refused_or_changes_nothing() {
    let (want, images) = written();
    for (image, ended) in images.iter().zip(["killed", "stopped"]) {
        let mut refused = 0;
        let mut seed = 1;
        let pages = image.chunks(PAGE).enumerate();
        let used = pages.filter(|(_, page)| page.iter().any(|byte| *byte != 0));
        let used: Vec<_> = used.map(|(number, _)| number * PAGE).collect();
        let samples = (0..40).flat_map(|_| used.clone());
        let samples = samples.map(|at| 8 * (at + random(&mut seed) % PAGE) + random(&mut seed) % 8);
        let samples: Vec<_> = samples.collect();
        for bit in (0..8 * HEADER).chain(samples) {
            let mut damaged = image.clone();
            let at = bit / 8;
            damaged[at] ^= 1 << (bit % 8);
            let how = format!("{ended}, byte {at}: {:02x}", damaged[at]);
            refused += usize::from(is_refused(&damaged, &want, &how));
        }
        assert!(refused > 100, "{ended}: {refused}");
        for at in used {
            let mut damaged = image.clone();
            damaged[at..][..PAGE].fill(0);
            is_refused(&damaged, &want, &format!("{ended}, page at {at}"));
        }
    }
}
