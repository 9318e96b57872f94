//! The flows, as who walks them sees them: connections, wherever their entries are, or datagrams.

use std::path::Path;

use ebpf_common::layout::{Flow, FlowKey, PROTO_TCP, direct_flow};
use nix::time::{ClockId, clock_gettime};

use super::{
    DatapathError,
    batch::Batch,
    places::{FLOWS_DIRECT, Places},
    raw::Raw,
};
use crate::janitor::{FlowSource, Page};

/// Entries of places in a page of a walk, as many as of a map.
const STEP: usize = 1_024;

/// One of the two tables of flows.
pub struct FlowTable {
    map: Batch<Raw<FlowKey>, Raw<Flow>>,
    /// Of connections only.
    places: Option<Places>,
    at: At,
    /// Which places the entries of the map have that this walk has seen.
    needed: Vec<bool>,
    /// When the walk of the map began, seconds of kernel monotonic time.
    since_s: u32,
}

/// Where a walk goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// At this place.
    Place(u32),
    /// Behind this token of the map; `None` is its start.
    Entry(Option<u32>),
}

impl FlowTable {
    /// The connections of the maps that are pinned in `maps`.
    ///
    /// # Errors
    /// When they cannot be opened.
    pub fn connections(maps: &Path) -> Result<Self, DatapathError> {
        let places = Places::open(&maps.join(FLOWS_DIRECT))?;
        Self::new("FLOWS", maps, Some(places))
    }

    /// The datagrams' flows.
    pub(super) fn datagrams(maps: &Path) -> Result<Self, DatapathError> {
        Self::new("FLOWS_LRU", maps, None)
    }

    fn new(name: &'static str, maps: &Path, places: Option<Places>) -> Result<Self, DatapathError> {
        Ok(Self {
            map: Batch::open(name, &maps.join(name))?,
            places,
            at: At::Place(0),
            needed: Vec::new(),
            since_s: 0,
        })
    }

    /// The entry of `key` as it is now.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn get(&self, key: &FlowKey) -> Result<Option<Flow>, DatapathError> {
        if let Some(flow) = self.places.as_ref().and_then(|places| places.get(key)) {
            return Ok(Some(flow));
        }
        Ok(self.map.get(&Raw(*key))?.map(|flow| flow.0))
    }

    /// The places from `from` on; `None` where there are no more.
    fn places_page(&mut self, from: u32) -> Option<Page> {
        let places = self.places.as_ref().filter(|places| from < places.len())?;
        let mut flows = Vec::new();
        let mut to = from;
        while to < places.len() && flows.len() < STEP {
            flows.extend(places.entries(to).into_iter().flatten());
            to += 1;
        }
        self.at = At::Place(to);
        Some(Page {
            flows,
            map: FLOWS_DIRECT,
            is_last: false,
        })
    }

    fn entries_page(&mut self, at: Option<u32>) -> Result<Page, DatapathError> {
        if at.is_none() {
            self.since_s = now_s();
            self.needed.clear();
            let count = self.places.as_ref().map_or(0, Places::len);
            self.needed.resize(count as usize, false);
        }
        // Where it cannot be read, the walk starts over.
        self.at = At::Place(0);
        let (entries, next) = self.map.page(at)?;
        let flows: Vec<(FlowKey, Flow)> = entries
            .into_iter()
            .map(|(key, flow)| (key.0, flow.0))
            .collect();
        for (key, _) in flows.iter().filter(|(key, _)| key.proto == PROTO_TCP) {
            if let Some(needed) = self.needed.get_mut(direct_flow(key) as usize) {
                *needed = true;
            }
        }
        match (next, &self.places) {
            (Some(_), _) => self.at = At::Entry(next),
            (None, Some(places)) => {
                let is_needed = |place| self.needed.get(place as usize).is_none_or(|is| *is);
                places.spare_flows(self.since_s, is_needed);
            }
            (None, None) => {}
        }
        Ok(Page {
            flows,
            map: self.map.name(),
            is_last: next.is_none(),
        })
    }
}

impl FlowSource for FlowTable {
    fn next_page(&mut self) -> Result<Page, DatapathError> {
        match self.at {
            At::Place(from) => match self.places_page(from) {
                Some(page) => Ok(page),
                None => self.entries_page(None),
            },
            At::Entry(at) => self.entries_page(at),
        }
    }

    fn remove(
        &mut self,
        map: &'static str,
        key: &FlowKey,
        flow: &Flow,
    ) -> Result<bool, DatapathError> {
        match &self.places {
            Some(places) if map == FLOWS_DIRECT => Ok(places.remove(key, flow)),
            _ => self.map.remove(&Raw(*key)),
        }
    }

    fn rewind(&mut self) {
        self.at = At::Place(0);
    }
}

/// Kernel monotonic time as the programs note it.
pub(super) fn now_s() -> u32 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every Linux has a monotonic clock");
    now.tv_sec() as u32
}
