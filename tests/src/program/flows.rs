//! The tables of flows, as a test reads and changes them.

use aya::maps::{HashMap, Map, MapData, Queue};
use ebpf_common::layout::{
    Account, Connection, FLOW_REVERSE, Flow, FlowKey, Fragment, FragmentKey, PLACE_BITS,
    PLACE_LIVE, PROTO_TCP, Settled, direct_flow,
};

use weft_netmanager::datapath::Places;

use super::{Node, bytes::Bytes};

const KEY: usize = size_of::<FlowKey>();
const FLOW: usize = size_of::<Flow>();
const PLACE: usize = size_of::<Connection>();
/// The table of connections.
pub const CONNECTIONS: &str = "FLOWS";

impl Node {
    /// The entries of a flow table, `FLOWS` (with those that have places of their own) or `FLOWS_LRU`.
    pub fn flows(&mut self, table: &str) -> Vec<(FlowKey, Flow)> {
        let mut flows: Vec<_> = self.shared(table);
        if table == CONNECTIONS {
            for (_, connection) in self.placed() {
                flows.push((connection.key, connection.forward));
                flows.push((connection.reverse_key(), connection.reverse));
            }
        }
        flows
    }

    /// The entries of a flow table that have no place of their own.
    pub fn shared(&mut self, table: &str) -> Vec<(FlowKey, Flow)> {
        self.hash::<KEY, FLOW>(table)
            .iter()
            .map(|entry| entry.expect("a flow entry"))
            .map(|(key, value)| (FlowKey::from_slice(&key), Flow::from_slice(&value)))
            .collect()
    }

    /// The connections that have places of their own, with these.
    pub fn placed(&mut self) -> Vec<(u32, Connection)> {
        self.used_places()
            .into_iter()
            .filter(|(_, connection)| connection.state & PLACE_BITS == PLACE_LIVE)
            .collect()
    }

    /// The places that are not as they were when the programs were loaded. There are too many to ask for them one by one.
    fn used_places(&mut self) -> Vec<(u32, Connection)> {
        let Some(Map::Array(map)) = self.ebpf.map("FLOWS_DIRECT") else {
            panic!("the object has no FLOWS_DIRECT");
        };
        let places = Places::new(map).expect("the places are mapped");
        places.used().collect()
    }

    /// A place, whatever is in it; `None` where there are fewer.
    pub fn place(&mut self, place: u32) -> Option<Connection> {
        self.element::<PLACE, _>("FLOWS_DIRECT", place)
    }

    /// Writes a place.
    pub fn put_place(&mut self, place: u32, connection: &Connection) {
        self.array::<PLACE>("FLOWS_DIRECT")
            .set(place, connection.to_array::<PLACE>(), 0)
            .expect("a place");
    }

    /// The place that has the entry of `key`.
    fn place_of(&mut self, table: &str, key: &FlowKey) -> Option<Connection> {
        let connection = (table == CONNECTIONS).then(|| self.place(direct_flow(key)))??;
        let is_here = connection.state & PLACE_BITS == PLACE_LIVE
            && (connection.key == *key || connection.reverse_key() == *key);
        is_here.then_some(connection)
    }

    /// An entry of a flow table.
    pub fn flow(&mut self, table: &str, key: &FlowKey) -> Option<Flow> {
        let placed = self.place_of(table, key).map(|place| match key.direction {
            FLOW_REVERSE => place.reverse,
            _ => place.forward,
        });
        placed.or_else(|| self.entry::<KEY, FLOW, _>(table, key))
    }

    /// Writes an entry of a flow table.
    pub fn put_flow(&mut self, table: &str, key: &FlowKey, flow: &Flow) {
        if let Some(mut connection) = self.place_of(table, key) {
            match key.direction {
                FLOW_REVERSE => connection.reverse = *flow,
                _ => connection.forward = *flow,
            }
            return self.put_place(direct_flow(key), &connection);
        }
        self.spill(key);
        self.hash::<KEY, FLOW>(table)
            .insert(key.to_array::<KEY>(), flow.to_array::<FLOW>(), 0)
            .expect("the table has room");
    }

    /// Removes an entry of a flow table. Where it has a place with its connection's other, that stays in the table.
    pub fn drop_flow(&mut self, table: &str, key: &FlowKey) {
        if let Some(connection) = self.place_of(table, key) {
            self.unplace(&connection);
        }
        self.hash::<KEY, FLOW>(table)
            .remove(&key.to_array::<KEY>())
            .expect("an entry");
    }

    /// Moves a connection from its place to the table that all share.
    pub fn unplace(&mut self, connection: &Connection) {
        let (forward, reverse) = (connection.key, connection.reverse_key());
        self.put_place(
            direct_flow(&forward),
            &Connection {
                state: connection.state & !PLACE_BITS,
                ..*connection
            },
        );
        self.put_flow(CONNECTIONS, &forward, &connection.forward);
        self.put_flow(CONNECTIONS, &reverse, &connection.reverse);
    }

    /// Notes in the place of a connection's entry that it is in the table that all share.
    fn spill(&mut self, key: &FlowKey) {
        let place = direct_flow(key);
        if key.proto == PROTO_TCP
            && let Some(connection) = self.place(place)
        {
            let spilled = Connection {
                spilled_s: 1,
                ..connection
            };
            self.put_place(place, &spilled);
        }
    }

    /// Forgets every flow, fragment, account and answer, as if the programs had just been loaded.
    pub fn forget_flows(&mut self) {
        empty(self.hash::<KEY, FLOW>("FLOWS"));
        empty(self.hash::<KEY, FLOW>("FLOWS_LRU"));
        empty(self.hash::<{ size_of::<FragmentKey>() }, { size_of::<Fragment>() }>("FRAGMENTS"));
        empty(self.hash::<4, 8>("ANSWERS"));
        empty(self.hash::<4, { size_of::<Account>() }>("ACCOUNTS"));
        empty(self.hash::<4, { size_of::<Settled>() }>("SETTLED"));
        let mut ageing: Queue<&mut MapData, [u8; KEY]> = self.map("AGEING", Queue::try_from);
        while ageing.pop(0).is_ok() {}
        for (place, _) in self.used_places() {
            self.put_place(place, &Connection::default());
        }
    }
}

fn empty<const K: usize, const V: usize>(mut map: HashMap<&mut MapData, [u8; K], [u8; V]>) {
    let keys: Vec<_> = map.keys().map(|key| key.expect("a key")).collect();
    for key in keys {
        map.remove(&key).expect("nobody else removes it");
    }
}
