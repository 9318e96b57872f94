//! Flows on their way from one set of maps to another, in passes, while packets flow.
//!
//! ```text
//!  All      what is there, so that the passes after it have little to do
//!  Exact    the copy is what is there: no flow begins meanwhile, but those that are go on
//!  Late     the copy is in use: what the old programs noted, added or forgot since Exact
//! ```
//!
//! A connection's place depends on the layout: 1 has TCP that opens or is over in `FLOWS_LRU`, beside shadows of what
//! is established; 2 has all of TCP in `FLOWS` and in places of `FLOWS_DIRECT`, which only layout 2 knows. So a [`Pair`] takes only some entries of its source, and an entry may
//! go from one pair to another between two passes.

use std::{cmp::Reverse, collections::HashMap, mem::offset_of, path::Path};

use aya::maps::MapInfo;
use ebpf_common::layout::{self, FLOW_FORWARD, Flow, FlowKey, PROTO_TCP};

use super::{FLOW, FLOW_1, FLOWS, KEY, resized};
use crate::datapath::{
    DatapathError,
    batch::Batch,
    object::map_error,
    places::{FLOWS_DIRECT, Places},
    raw::bytes_of,
};

/// Where a key has its protocol and direction, and a value of either layout its flags and when it was used last.
const PROTO: usize = offset_of!(FlowKey, proto);
const DIRECTION: usize = offset_of!(FlowKey, direction);
const LAST_SEEN: usize = offset_of!(Flow, last_seen_ns);
const FLAGS: usize = offset_of!(Flow, flags);
/// What opens or is over leaves so much of a map to what is established: one part of eight.
const SPARE: usize = 8;

/// One pass over the flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::datapath) enum Pass {
    /// Copies what is there and finds room.
    All,
    /// Makes the copy as what is there; exact while no flow begins.
    Exact,
    /// Brings what changed since; the copies are in use already.
    Late,
}

/// Flows on their way between two forms.
pub(in crate::datapath) trait Flows {
    /// Makes a pass; gives how many flows it met.
    fn pass(&mut self, pass: Pass) -> Result<usize, DatapathError>;

    /// The connections that were copied and give way in the target, but are not in its queue: the forward keys, the
    /// oldest first.
    fn giving_way(&self) -> Vec<Key>;
}

/// The flows in the maps `names` of `from` for `to`, each a layout and the folder of its maps.
pub(in crate::datapath) fn flows(
    names: &[&'static str],
    from: (u32, &Path),
    to: (u32, &Path),
) -> Result<Box<dyn Flows>, DatapathError> {
    let ((from_layout, from), (to_layout, to)) = (from, to);
    Ok(match (from_layout, to_layout) {
        (1, 1) => Box::new(Carrier::<FLOW_1, FLOW_1>::alike(names, from, to)?),
        (1, _) => Box::new(Carrier::<FLOW_1, FLOW>::up(from, to)?),
        (_, 1) => Box::new(Carrier::<FLOW, FLOW_1>::down(from, to)?),
        _ => Box::new(Carrier::<FLOW, FLOW>::alike(names, from, to)?),
    })
}

/// A `FlowKey`, as bytes.
pub(in crate::datapath) type Key = [u8; KEY];

/// Pairs in the order in which they are passed; a key belongs to the first that takes it.
struct Carrier<const S: usize, const T: usize> {
    pairs: Vec<Pair<S, T>>,
}

/// Which entries of one map go into which of the other.
struct Pair<const S: usize, const T: usize> {
    takes: fn(&Key, &[u8; S]) -> bool,
    /// Takes no room that others need.
    is_guest: bool,
    from: Batch<Key, [u8; S]>,
    /// Where more of its source is.
    places: Option<Places>,
    /// What was met there that gives way, with the time of its last use.
    unqueued: Vec<(u64, Key)>,
    to: Batch<Key, [u8; T]>,
    /// What was met in this pass.
    keys: Vec<Key>,
    values: Vec<[u8; T]>,
    /// What was copied, with its flags.
    copied: HashMap<Key, u32>,
}

/// What was met in a pass, and the map that it goes to.
type Met = HashMap<Key, &'static str>;

impl<const S: usize, const T: usize> Carrier<S, T> {
    fn alike(names: &[&'static str], from: &Path, to: &Path) -> Result<Self, DatapathError> {
        let pair = |&name: &&'static str| Pair::open((name, from), (name, to), |_, _| true);
        let mut pairs: Vec<Pair<S, T>> = names.iter().map(pair).collect::<Result<_, _>>()?;
        let [connections, _] = FLOWS;
        if let Some(pair) = pairs.iter_mut().find(|pair| pair.to.name() == connections) {
            pair.places = left_behind(from, to)?;
        }
        Ok(Self { pairs })
    }
}

/// The places in `from` that those in `to` are not.
fn left_behind(from: &Path, to: &Path) -> Result<Option<Places>, DatapathError> {
    let (from, to) = (from.join(FLOWS_DIRECT), to.join(FLOWS_DIRECT));
    if !from.exists() {
        return Ok(None);
    }
    let id = |path: &Path| {
        MapInfo::from_pin(path)
            .map(|info| info.id())
            .map_err(|source| map_error(FLOWS_DIRECT, "be asked", source))
    };
    if to.exists() && id(&from)? == id(&to)? {
        return Ok(None);
    }
    Places::open(&from).map(Some)
}

impl Carrier<FLOW_1, FLOW> {
    /// From layout 1 to 2.
    fn up(from: &Path, to: &Path) -> Result<Self, DatapathError> {
        let [established, recent] = FLOWS;
        let mut opening = Pair::open((recent, from), (established, to), |key, flow| {
            is_tcp(key) && !is_shadow(flags_of(flow))
        })?;
        opening.is_guest = true;
        Ok(Self {
            pairs: vec![
                Pair::open((established, from), (established, to), |_, _| true)?,
                opening,
                Pair::open((recent, from), (recent, to), |key, _| !is_tcp(key))?,
            ],
        })
    }
}

impl Carrier<FLOW, FLOW_1> {
    /// From layout 2 to 1.
    fn down(from: &Path, to: &Path) -> Result<Self, DatapathError> {
        let [established, recent] = FLOWS;
        let mut settled = Pair::open((established, from), (established, to), |_, flow| {
            is_settled(flags_of(flow))
        })?;
        let mut opening = Pair::open((established, from), (recent, to), |_, _| true)?;
        opening.is_guest = true;
        for pair in [&mut settled, &mut opening] {
            pair.places = left_behind(from, to)?;
        }
        Ok(Self {
            pairs: vec![
                settled,
                opening,
                Pair::open((recent, from), (recent, to), |key, _| !is_tcp(key))?,
            ],
        })
    }
}

fn is_tcp(key: &Key) -> bool {
    key[PROTO] == PROTO_TCP
}

fn flags_of(value: &[u8]) -> u32 {
    let flags = value[FLAGS..].first_chunk();
    u32::from_ne_bytes(*flags.expect("a flow of either layout has its flags"))
}

fn last_seen(value: &[u8]) -> u64 {
    let time = value[LAST_SEEN..].first_chunk();
    u64::from_ne_bytes(*time.expect("a flow of either layout has its time"))
}

/// An entry in the form of the layout that it goes to. Another layout has a queue of its own, or none.
fn moved<const S: usize, const T: usize>(value: [u8; S]) -> [u8; T] {
    let mut moved = resized(value);
    if S != T {
        let flags = flags_of(&moved) & !layout::FLOW_QUEUED;
        moved[FLAGS..FLAGS + 4].copy_from_slice(&flags.to_ne_bytes());
    }
    moved
}

/// Whether an entry of layout 1's `FLOWS_LRU` is what an established connection left behind.
fn is_shadow(flags: u32) -> bool {
    const CLOSING: u32 = layout::FLOW_FIN_CLIENT | layout::FLOW_FIN_BACKEND | layout::FLOW_RST;
    flags & layout::FLOW_ESTABLISHED != 0 && flags & CLOSING == 0
}

/// Whether a connection is one for layout 1's `FLOWS`: established, and not over.
fn is_settled(flags: u32) -> bool {
    const BOTH: u32 = layout::FLOW_FIN_CLIENT | layout::FLOW_FIN_BACKEND;
    flags & layout::FLOW_ESTABLISHED != 0 && flags & layout::FLOW_RST == 0 && flags & BOTH != BOTH
}

impl<const S: usize, const T: usize> Flows for Carrier<S, T> {
    fn pass(&mut self, pass: Pass) -> Result<usize, DatapathError> {
        let mut met = Met::new();
        for pair in &mut self.pairs {
            pair.meet(&mut met)?;
            if pass != Pass::Late {
                pair.copy(pass, &met)?;
            }
        }
        if pass == Pass::Late {
            // What went from one pair to another is there twice, not nowhere.
            for pair in &self.pairs {
                pair.bring()?;
            }
            for pair in &self.pairs {
                pair.drop_gone(&met)?;
            }
        }
        Ok(met.len())
    }

    fn giving_way(&self) -> Vec<Key> {
        let guests = self.pairs.iter().filter(|pair| pair.is_guest);
        let mut found: Vec<(u64, Key)> = guests
            .flat_map(|pair| pair.keys.iter().zip(&pair.values))
            .filter(|(key, _)| key[DIRECTION] == FLOW_FORWARD)
            .map(|(key, value)| (last_seen(value), *key))
            .chain(self.pairs.iter().flat_map(|pair| pair.unqueued.clone()))
            .collect();
        found.sort_unstable();
        found.dedup();
        found.into_iter().map(|(_, key)| key).collect()
    }
}

impl<const S: usize, const T: usize> Pair<S, T> {
    fn open(
        (from, from_maps): (&'static str, &Path),
        (to, to_maps): (&'static str, &Path),
        takes: fn(&Key, &[u8; S]) -> bool,
    ) -> Result<Self, DatapathError> {
        Ok(Self {
            takes,
            is_guest: false,
            from: Batch::open(from, &from_maps.join(from))?,
            places: None,
            unqueued: Vec::new(),
            to: Batch::open(to, &to_maps.join(to))?,
            keys: Vec::new(),
            values: Vec::new(),
            copied: HashMap::new(),
        })
    }

    /// Looks at the entries that no pair before has met.
    fn meet(&mut self, met: &mut Met) -> Result<(), DatapathError> {
        let others = met.values().filter(|to| **to == self.to.name()).count();
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        let mut unqueued = Vec::new();
        let mut look = |key: Key, value: [u8; S]| {
            if (self.takes)(&key, &value) && !met.contains_key(&key) {
                met.insert(key, self.to.name());
                keys.push(key);
                values.push(moved(value));
            }
        };
        self.from.each(&mut look)?;
        for (key, mut flow) in self.places.iter().flat_map(Places::all) {
            // In a place nobody needs to be in the queue.
            flow.flags &= !layout::FLOW_QUEUED;
            if key.direction == FLOW_FORWARD && !is_settled(flow.flags) {
                unqueued.push((flow.last_seen_ns, bytes_of(&key)));
            }
            look(bytes_of(&key), resized::<FLOW, S>(bytes_of(&flow)));
        }
        self.unqueued = unqueued;
        if self.is_guest {
            self.leave_room(others, &mut keys, &mut values)?;
        }
        self.keys = keys;
        self.values = values;
        Ok(())
    }

    /// Makes the copy, which is not in use yet, as what was met.
    fn copy(&mut self, pass: Pass, met: &Met) -> Result<(), DatapathError> {
        // First, so that there is room.
        self.drop_gone(met)?;
        match pass {
            // What finds no room beside what went while this looked finds it in the next pass.
            Pass::All => self.to.put_some(&self.keys, &self.values)?,
            Pass::Exact | Pass::Late => self.to.put(&self.keys, &self.values)?,
        }
        let flags = self.values.iter().map(|value| flags_of(value));
        self.copied = self.keys.iter().copied().zip(flags).collect();
        Ok(())
    }

    /// Removes what was copied and is met no more, or goes elsewhere by now.
    fn drop_gone(&self, met: &Met) -> Result<(), DatapathError> {
        let is_here = |key: &&Key| met.get(*key) == Some(&self.to.name());
        for gone in self.copied.keys().filter(|key| !is_here(key)) {
            self.to.remove(gone)?;
        }
        Ok(())
    }

    /// Brings what was met to where programs may have changed it.
    fn bring(&self) -> Result<(), DatapathError> {
        for (key, value) in self.keys.iter().zip(&self.values) {
            let (now, then) = (flags_of(value), self.copied.get(key));
            if then.is_some_and(|then| then | now == *then) {
                continue;
            }
            match self.to.get(key)? {
                Some(mut copy) => {
                    let flags = (flags_of(&copy) | now).to_ne_bytes();
                    copy[FLAGS..FLAGS + flags.len()].copy_from_slice(&flags);
                    self.to.replace(key, &copy)?;
                }
                None if then.is_none() => self.to.add(key, value)?,
                // The programs have forgotten it.
                None => {}
            }
        }
        Ok(())
    }

    /// Takes only what leaves room to `others` in the map, the newest first: what opens is half lost where an older
    /// one that is over takes the place of one of its entries.
    fn leave_room(
        &self,
        others: usize,
        keys: &mut Vec<Key>,
        values: &mut Vec<[u8; T]>,
    ) -> Result<(), DatapathError> {
        let capacity = self.to.capacity()? as usize;
        let room = (capacity - capacity / SPARE).saturating_sub(others);
        if keys.len() <= room {
            return Ok(());
        }
        let mut all: Vec<(Key, [u8; T])> = keys.drain(..).zip(values.drain(..)).collect();
        all.sort_unstable_by_key(|(_, value)| Reverse(last_seen(value)));
        let lost = all.len() - room;
        tracing::info!(lost, "left the oldest connections behind that are over");
        (*keys, *values) = all.into_iter().take(room).unzip();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_established_is_told_from_what_opens_or_closes_in_both_layouts() {
        use layout::{
            FLOW_ESTABLISHED, FLOW_FIN_BACKEND, FLOW_FIN_CLIENT, FLOW_RST, FLOW_SYN, FLOW_SYN_ACK,
        };
        for (flags, shadow, settled) in [
            (FLOW_SYN, false, false),
            (FLOW_SYN | FLOW_SYN_ACK, false, false),
            (FLOW_SYN | FLOW_ESTABLISHED, true, true),
            (FLOW_ESTABLISHED | FLOW_FIN_CLIENT, false, true),
            (
                FLOW_ESTABLISHED | FLOW_FIN_CLIENT | FLOW_FIN_BACKEND,
                false,
                false,
            ),
            (FLOW_ESTABLISHED | FLOW_RST, false, false),
        ] {
            assert_eq!(
                (is_shadow(flags), is_settled(flags)),
                (shadow, settled),
                "{flags:#x}"
            );
        }
    }

    #[test]
    fn a_flow_of_another_layout_is_in_no_queue_yet() {
        let mut flow = [0; FLOW];
        let flags = layout::FLOW_ESTABLISHED | layout::FLOW_QUEUED;
        flow[FLAGS..FLAGS + 4].copy_from_slice(&flags.to_ne_bytes());
        assert_eq!(
            flags_of(&moved::<FLOW, FLOW_1>(flow)),
            layout::FLOW_ESTABLISHED
        );
        assert_eq!(flags_of(&moved::<FLOW, FLOW>(flow)), flags);
    }

    #[test]
    fn flags_are_where_both_layouts_have_them() {
        let mut flow = [0; FLOW_1];
        flow[28..32].copy_from_slice(&7_u32.to_ne_bytes());
        assert_eq!(flags_of(&flow), 7);
        assert_eq!(flags_of(&resized::<FLOW_1, FLOW>(flow)), 7);
    }
}
