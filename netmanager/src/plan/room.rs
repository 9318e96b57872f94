//! How much the maps hold, and what is said where that is too little.

/// How much the maps hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Elements of `BACKENDS`.
    pub backends: u32,
    /// Elements of `SLOTS`.
    pub slots: u32,
    /// Entries of `VIPS`.
    pub vips: u32,
    /// Elements of `VIP_COUNTS`.
    pub counters: u32,
}

/// A map that is too small for the table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Shortage {
    /// No free backend index.
    #[error(
        "service {service} has backends that find no room among {capacity}: raise --backends and start again (dead backends keep their place for 120 s)"
    )]
    Backends {
        /// The service.
        service: String,
        /// Elements of `BACKENDS`.
        capacity: u32,
    },
    /// No free run that is long enough.
    #[error(
        "service {service} finds no {length} free slots in a row among {capacity}: raise --slots and start again"
    )]
    Slots {
        /// The service.
        service: String,
        /// Length of the run.
        length: u32,
        /// Elements of `SLOTS`.
        capacity: u32,
    },
    /// No room for another declared port.
    #[error(
        "service {service} has ports that find no room among {capacity}: raise --vips and start again"
    )]
    Vips {
        /// The service.
        service: String,
        /// Entries of `VIPS`.
        capacity: u32,
    },
}
