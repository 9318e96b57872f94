//! The accounts of flows: what the programs counted, and what user space corrects.

use std::{collections::BTreeMap, path::Path};

use aya::maps::{HashMap, MapData, MapError};
use ebpf_common::layout::{Account, Settled};

use super::{
    DatapathError,
    object::{map_error, open_map},
    raw::Raw,
};

/// `ACCOUNTS` and `SETTLED`.
pub struct FlowAccounts {
    accounts: HashMap<MapData, u32, Raw<Account>>,
    settled: HashMap<MapData, u32, Raw<Settled>>,
}

impl FlowAccounts {
    pub(super) fn open(maps: &Path) -> Result<Self, DatapathError> {
        Ok(Self {
            accounts: open_map(&maps.join("ACCOUNTS"), "ACCOUNTS")?,
            settled: open_map(&maps.join("SETTLED"), "SETTLED")?,
        })
    }

    /// What the programs counted, by the endpoint's number.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn counted(&self) -> Result<BTreeMap<u32, Account>, DatapathError> {
        self.accounts
            .iter()
            .map(|entry| entry.map(|(number, account)| (number, account.0)))
            .collect::<Result<_, MapError>>()
            .map_err(|source| map_error("ACCOUNTS", "be read", source))
    }

    /// The corrections, by the endpoint's number.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn settled(&self) -> Result<BTreeMap<u32, Settled>, DatapathError> {
        self.settled
            .iter()
            .map(|entry| entry.map(|(number, settled)| (number, settled.0)))
            .collect::<Result<_, MapError>>()
            .map_err(|source| map_error("SETTLED", "be read", source))
    }

    /// Writes an endpoint's correction.
    ///
    /// # Errors
    /// When the map refuses.
    pub fn settle(&mut self, number: u32, settled: Settled) -> Result<(), DatapathError> {
        self.settled
            .insert(number, Raw(settled), 0)
            .map_err(|source| map_error("SETTLED", "take an entry", source))
    }

    /// Removes the account of an endpoint that is gone.
    ///
    /// # Errors
    /// When a map refuses.
    pub fn close(&mut self, number: u32) -> Result<(), DatapathError> {
        for (name, removed) in [
            ("ACCOUNTS", self.accounts.remove(&number)),
            ("SETTLED", self.settled.remove(&number)),
        ] {
            match removed {
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(MapError::SyscallError(error))
                    if error.io_error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(source) => return Err(map_error(name, "remove an entry", source)),
            }
        }
        Ok(())
    }
}
