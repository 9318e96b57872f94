//! The maps and programs of a node without its daemon.

use std::{fs, path::PathBuf};

use aya::maps::MapData;
use ebpf_common::layout::LAYOUT_VERSION;
use nix::mount::{MntFlags, umount2};
use tempfile::TempDir;
use weft_netmanager::datapath::{BpfDatapath, HookMode, Options, Sizes};

/// A datapath in a BPF file system of its own.
pub struct Pinned {
    /// The datapath; `None` only while it is opened again.
    datapath: Option<BpfDatapath>,
    folder: TempDir,
    flows: u32,
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // Fails only where it was never mounted.
        let _ = umount2(self.folder.path(), MntFlags::MNT_DETACH);
    }
}

impl Pinned {
    /// A datapath of small sizes; panics where the kernel refuses it.
    #[must_use]
    pub fn open() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut pinned = Self {
            datapath: None,
            folder,
            flows: 64,
        };
        pinned.open_again();
        pinned
    }

    /// Opens it again, as the next daemon does.
    pub fn open_again(&mut self) {
        // The lock is the daemon's that holds it.
        drop(self.datapath.take());
        let options = Options {
            bpffs: self.folder.path().to_owned(),
            mode: HookMode::Clsact,
            sizes: Sizes {
                endpoints: 16,
                backends: 16,
                slots: 16,
                vips: 16,
                flows: self.flows,
            },
            splice: None,
        };
        let datapath = BpfDatapath::open(&options).expect("the kernel takes the datapath");
        self.datapath = Some(datapath);
    }

    /// Opens it again for another number of flows.
    pub fn resize(&mut self, flows: u32) {
        self.flows = flows;
        self.open_again();
    }

    /// The datapath.
    pub fn datapath(&mut self) -> &mut BpfDatapath {
        self.datapath.as_mut().expect("it is open")
    }

    /// A pinned map.
    #[must_use]
    pub fn map(&self, name: &str) -> MapData {
        MapData::from_pin(self.maps().join(name)).expect("the map is pinned")
    }

    /// Where the maps are pinned.
    #[must_use]
    pub fn maps(&self) -> PathBuf {
        let pins = format!("v{LAYOUT_VERSION}/maps");
        self.folder.path().join(pins)
    }

    /// Closes the datapath and takes one map away, as if a version without it had been here; panics where it is not pinned.
    pub fn forget(&mut self, name: &str) {
        drop(self.datapath.take());
        fs::remove_file(self.maps().join(name)).expect("the map is pinned");
    }
}
