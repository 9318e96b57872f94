//! `ENDPOINTS_DIRECT` and `LOCAL_DIRECT`: what `ENDPOINTS` and `LOCAL` know, by a place instead of a hash.
//!
//! A place is empty or holds what the hash map has of one key. Who has it keeps it: another endpoint that would stand
//! there stays in the hash map alone. So neither packets nor the planner depend on what is here, only the cost of a packet
//! does, and every write is right by itself. An element is written while programs read it; `ifindex`, without which
//! it is nobody's, is cleared before the rest changes and set after it.

use std::path::Path;

use ebpf_common::layout::{Addr, DIRECT_PLACES, Endpoint, direct_link};

use super::{DatapathError, batch::Batch, raw::Raw};

/// See the module.
pub(super) struct Direct {
    links: Batch<u32, Raw<Endpoint>>,
    local: Batch<u32, Raw<Endpoint>>,
}

impl Direct {
    /// Opens the maps that are pinned in `maps`.
    pub(super) fn open(maps: &Path) -> Result<Self, DatapathError> {
        let path = |name| maps.join(name);
        Ok(Self {
            links: Batch::open("ENDPOINTS_DIRECT", &path("ENDPOINTS_DIRECT"))?,
            local: Batch::open("LOCAL_DIRECT", &path("LOCAL_DIRECT"))?,
        })
    }

    /// Makes all places agree with the hash maps, whatever a version left in them that did not know them.
    pub(super) fn rebuild(
        &self,
        endpoints: &Batch<u32, Raw<Endpoint>>,
        local: &Batch<Raw<Addr>, Raw<Endpoint>>,
    ) -> Result<(), DatapathError> {
        let mut links = Places::new();
        endpoints.each(|ifindex, endpoint| {
            if endpoint.0.is_at(ifindex) {
                links.take(direct_link(ifindex), &endpoint.0);
            }
        })?;
        links.write(&self.links)?;
        let mut places = Places::new();
        local.each(|address, endpoint| {
            if endpoint.0.has(&address.0) {
                places.take(address.0.direct(), &endpoint.0);
            }
        })?;
        places.write(&self.local)
    }

    /// Follows a write of `ENDPOINTS`, which comes before it; a removal comes after it.
    pub(super) fn link(
        &self,
        ifindex: u32,
        endpoint: Option<&Endpoint>,
    ) -> Result<(), DatapathError> {
        let endpoint = endpoint.filter(|endpoint| endpoint.is_at(ifindex));
        follow(&self.links, direct_link(ifindex), endpoint, |owner| {
            owner.is_at(ifindex)
        })
    }

    /// Follows a write of `LOCAL`, which comes before it; a removal comes after it.
    pub(super) fn address(
        &self,
        address: &Addr,
        endpoint: Option<&Endpoint>,
    ) -> Result<(), DatapathError> {
        let endpoint = endpoint.filter(|endpoint| endpoint.has(address));
        follow(&self.local, address.direct(), endpoint, |owner| {
            owner.has(address)
        })
    }
}

/// Writes a place, unless it is another's.
fn follow(
    map: &Batch<u32, Raw<Endpoint>>,
    place: u32,
    endpoint: Option<&Endpoint>,
    is_own: impl Fn(&Endpoint) -> bool,
) -> Result<(), DatapathError> {
    let owner = map.get(&place)?.map_or_else(Endpoint::default, |raw| raw.0);
    match next(&owner, endpoint, is_own) {
        Some(element) => write(map, &[place], &[element]),
        None => Ok(()),
    }
}

/// What a place becomes when its key gets another endpoint, or none; `None` where it stays as it is.
fn next(
    owner: &Endpoint,
    endpoint: Option<&Endpoint>,
    is_own: impl Fn(&Endpoint) -> bool,
) -> Option<Endpoint> {
    let is_empty = owner.ifindex == 0;
    match endpoint {
        Some(endpoint) => (is_empty || is_own(owner)).then_some(*endpoint),
        None => (!is_empty && is_own(owner)).then(Endpoint::default),
    }
}

/// Writes elements that programs read meanwhile.
fn write(
    map: &Batch<u32, Raw<Endpoint>>,
    places: &[u32],
    elements: &[Endpoint],
) -> Result<(), DatapathError> {
    let raw = |owned: fn(&Endpoint) -> Endpoint| {
        let elements = elements.iter().map(owned).map(Raw);
        elements.collect::<Vec<_>>()
    };
    let nobodys = |element: &Endpoint| Endpoint {
        ifindex: 0,
        ..*element
    };
    map.put(places, &raw(nobodys))?;
    map.put(places, &raw(|element| *element))
}

/// What the places should hold: of two that would stand at one, the first.
struct Places(Vec<Endpoint>);

impl Places {
    fn new() -> Self {
        Self(vec![Endpoint::default(); DIRECT_PLACES as usize])
    }

    fn take(&mut self, place: u32, endpoint: &Endpoint) {
        if let Some(element) = self.0.get_mut(place as usize)
            && element.ifindex == 0
        {
            *element = *endpoint;
        }
    }

    /// Writes those that differ.
    fn write(self, map: &Batch<u32, Raw<Endpoint>>) -> Result<(), DatapathError> {
        let (mut places, mut elements) = (Vec::new(), Vec::new());
        map.each(|place, element| {
            let wanted = self.0.get(place as usize).copied().unwrap_or_default();
            if element.0 != wanted {
                places.push(place);
                elements.push(wanted);
            }
        })?;
        if places.is_empty() {
            return Ok(());
        }
        write(map, &places, &elements)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// One of a few addresses of three places.
    fn address() -> impl Strategy<Value = Addr> {
        (0u32..3, 0u32..3, any::<bool>()).prop_map(|(place, other, is_v4)| {
            let tail = place + other * DIRECT_PLACES / 2;
            if is_v4 {
                Addr::from_v4(tail)
            } else {
                Addr::from_v6((0xfd << 120) | u128::from(tail))
            }
        })
    }

    fn endpoint(address: Addr, ifindex: u32) -> Endpoint {
        let mut endpoint = Endpoint {
            ifindex,
            ..Endpoint::default()
        };
        if address.is_v4() {
            endpoint.addr4 = address;
        } else {
            endpoint.addr6 = address;
        }
        endpoint
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10_000))]

        #[test]
        fn a_place_never_says_what_the_hash_map_does_not(
            writes in prop::collection::vec((address(), prop::option::of(1u32..4)), 0..40),
        ) {
            let mut hash: BTreeMap<Addr, Endpoint> = BTreeMap::new();
            let mut places: BTreeMap<u32, Endpoint> = BTreeMap::new();
            for (address, wanted) in writes {
                let wanted = wanted.map(|ifindex| endpoint(address, ifindex));
                match wanted {
                    Some(endpoint) => hash.insert(address, endpoint),
                    None => hash.remove(&address),
                };
                let place = places.entry(address.direct()).or_default();
                let was_empty = place.ifindex == 0;
                if let Some(element) = next(place, wanted.as_ref(), |owner| owner.has(&address)) {
                    *place = element;
                }
                if was_empty {
                    prop_assert_eq!(*place, wanted.unwrap_or_default());
                }
                for (index, element) in places.iter().filter(|(_, element)| element.ifindex != 0) {
                    let known = hash
                        .iter()
                        .find(|(key, _)| element.has(key) && key.direct() == *index);
                    prop_assert_eq!(known.map(|(_, value)| value), Some(element));
                }
            }
        }
    }

    #[test]
    fn of_two_that_would_stand_at_one_place_the_first_does() {
        let first = endpoint(Addr::from_v4(5), 1);
        let second = endpoint(Addr::from_v4(5 + DIRECT_PLACES / 2), 2);
        let mut places = Places::new();
        for endpoint in [&first, &second] {
            places.take(endpoint.addr4.direct(), endpoint);
        }
        assert_eq!(places.0[first.addr4.direct() as usize], first);
    }
}
