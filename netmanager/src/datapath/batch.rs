//! Many entries of a map by one system call (`BPF_MAP_LOOKUP_BATCH`, `BPF_MAP_UPDATE_BATCH`, since Linux 5.6).
//!
//! A walk that goes key by key costs two system calls per entry and starts over when its key is deleted; the
//! batch goes by hash bucket, or by index, and does not mind. Entries that come or go meanwhile may be missed or
//! seen twice.

use std::{
    io,
    marker::PhantomData,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd},
    path::Path,
};

use aya::maps::{MapData, MapError};

use super::{DatapathError, object::map_error};

/// `enum bpf_cmd` in `linux/bpf.h`.
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
const BPF_MAP_UPDATE_BATCH: libc::c_long = 26;
/// `BPF_NOEXIST` and `BPF_EXIST` in `linux/bpf.h`.
const BPF_NOEXIST: u64 = 1;
const BPF_EXIST: u64 = 2;
/// Entries per step; a bucket's chain must fit.
const STEP: usize = 1_024;

/// `union bpf_attr`, the part for batches.
#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// `union bpf_attr`, the part for single elements.
#[repr(C)]
struct ElementAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Calls bpf(2).
///
/// # Safety
///
/// `attr` is laid out as the kernel reads it for `command`; its pointers are to memory of the sizes that the map has and
/// that lives through the call; its fd is open.
unsafe fn bpf<A>(command: libc::c_long, attr: &mut A) -> io::Result<()> {
    // SAFETY: the caller's promise.
    match unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, size_of::<A>()) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether a hash map refused because it is full.
fn is_full(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::E2BIG)
}

/// Some entries of a walk, and the token of those after them; `None` at the end.
pub(super) type Entries<K, V> = (Vec<(K, V)>, Option<u32>);

/// A hash map or array, by many entries at once.
#[derive(Debug)]
pub(super) struct Batch<K, V> {
    name: &'static str,
    data: MapData,
    entry: PhantomData<(K, V)>,
}

impl<K: aya::Pod, V: aya::Pod> Batch<K, V> {
    /// Opens a pinned map.
    pub(super) fn open(name: &'static str, path: &Path) -> Result<Self, DatapathError> {
        MapData::from_pin(path)
            .map_err(|source| map_error(name, "open", source))
            .and_then(|data| Self::new(name, data))
    }

    /// Refuses a map whose keys and values are of other sizes.
    pub(super) fn new(name: &'static str, data: MapData) -> Result<Self, DatapathError> {
        let info = data
            .info()
            .map_err(|source| map_error(name, "open", source))?;
        let (key, value) = (size_of::<K>(), size_of::<V>());
        if info.key_size() as usize != key {
            let size = info.key_size() as usize;
            let source = MapError::InvalidKeySize {
                size,
                expected: key,
            };
            return Err(map_error(name, "open", source));
        }
        if info.value_size() as usize != value {
            let size = info.value_size() as usize;
            let source = MapError::InvalidValueSize {
                size,
                expected: value,
            };
            return Err(map_error(name, "open", source));
        }
        Ok(Self {
            name,
            data,
            entry: PhantomData,
        })
    }

    /// The map's name.
    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    /// How many entries it holds at most.
    pub(super) fn capacity(&self) -> Result<u32, DatapathError> {
        self.data
            .info()
            .map(|info| info.max_entries())
            .map_err(|source| map_error(self.name, "be asked", source))
    }

    fn fd(&self) -> u32 {
        self.data.fd().as_fd().as_raw_fd() as u32
    }

    /// The next entries after the token `at`.
    pub(super) fn page(&self, at: Option<u32>) -> Result<Entries<K, V>, DatapathError> {
        self.read_page(at).map_err(|source| DatapathError::Batch {
            map: self.name,
            what: "be read",
            source,
        })
    }

    fn read_page(&self, at: Option<u32>) -> io::Result<Entries<K, V>> {
        let mut keys: Vec<K> = Vec::with_capacity(STEP);
        let mut values: Vec<V> = Vec::with_capacity(STEP);
        let from = at.unwrap_or(0);
        let mut next = 0u32;
        let mut attr = BatchAttr {
            in_batch: if at.is_some() {
                (&raw const from) as u64
            } else {
                0
            },
            out_batch: (&raw mut next) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: STEP as u32,
            map_fd: self.fd(),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: `attr` is laid out as the kernel reads it and lives through the call; the four pointers are to
        // buffers of this frame with room for `count` keys and values of the map's own sizes (checked when it
        // was opened), and to one u32 token each, which is what hash maps and arrays use; the fd is open.
        let is_last = match unsafe { bpf(BPF_MAP_LOOKUP_BATCH, &mut attr) } {
            Ok(()) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) => return Err(error),
        };
        let count = (attr.count as usize).min(STEP);
        // SAFETY: the kernel wrote `count` keys and values, which are plain bytes (`Pod`), and says so.
        unsafe {
            keys.set_len(count);
            values.set_len(count);
        }
        let entries = keys.into_iter().zip(values).collect();
        Ok((entries, (!is_last).then_some(next)))
    }

    /// Calls `take` with every entry.
    pub(super) fn each(&self, mut take: impl FnMut(K, V)) -> Result<(), DatapathError> {
        let mut at = None;
        loop {
            let (entries, next) = self.page(at)?;
            for (key, value) in entries {
                take(key, value);
            }
            if next.is_none() {
                return Ok(());
            }
            at = next;
        }
    }

    /// Writes entries, over those that are there.
    pub(super) fn put(&self, keys: &[K], values: &[V]) -> Result<(), DatapathError> {
        let mut attr = BatchAttr {
            in_batch: 0,
            out_batch: 0,
            keys: keys.as_ptr() as u64,
            values: values.as_ptr() as u64,
            count: keys.len().min(values.len()) as u32,
            map_fd: self.fd(),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: as in `page`; the kernel only reads `count` keys and values, which the slices hold.
        unsafe { bpf(BPF_MAP_UPDATE_BATCH, &mut attr) }.map_err(|source| DatapathError::Batch {
            map: self.name,
            what: "take entries",
            source,
        })
    }

    /// Writes as many of the entries as find room, over those that are there.
    pub(super) fn put_some(&self, keys: &[K], values: &[V]) -> Result<(), DatapathError> {
        match self.put(keys, values) {
            Err(DatapathError::Batch { source, .. }) if is_full(&source) => Ok(()),
            result => result,
        }
    }

    /// Writes an entry where there is none. A batch cannot: its update takes no such flag.
    pub(super) fn add(&self, key: &K, value: &V) -> Result<(), DatapathError> {
        self.update(key, value, BPF_NOEXIST, libc::EEXIST)
    }

    /// Writes an entry where there is one.
    pub(super) fn replace(&self, key: &K, value: &V) -> Result<(), DatapathError> {
        self.update(key, value, BPF_EXIST, libc::ENOENT)
    }

    /// Writes an entry; that `flags` left it as it was is no error.
    fn update(&self, key: &K, value: &V, flags: u64, left: i32) -> Result<(), DatapathError> {
        let mut attr = ElementAttr {
            map_fd: self.fd(),
            pad: 0,
            key: std::ptr::from_ref(key) as u64,
            value: std::ptr::from_ref(value) as u64,
            flags,
        };
        // SAFETY: as in `get`; key and value are only read.
        match unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attr) } {
            Err(source) if source.raw_os_error() != Some(left) => Err(DatapathError::Batch {
                map: self.name,
                what: "take an entry",
                source,
            }),
            _ => Ok(()),
        }
    }

    /// The value of `key`.
    pub(super) fn get(&self, key: &K) -> Result<Option<V>, DatapathError> {
        let mut value = MaybeUninit::<V>::uninit();
        let mut attr = ElementAttr {
            map_fd: self.fd(),
            pad: 0,
            key: std::ptr::from_ref(key) as u64,
            value: value.as_mut_ptr() as u64,
            flags: 0,
        };
        // SAFETY: `attr` is laid out as the kernel reads it and lives through the call; key and value are of the
        // map's own sizes (checked when it was opened); the fd is open.
        match unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &mut attr) } {
            // SAFETY: the kernel wrote all of it, and it is plain bytes (`Pod`).
            Ok(()) => Ok(Some(unsafe { value.assume_init() })),
            Err(source) if source.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(source) => Err(DatapathError::Batch {
                map: self.name,
                what: "be read",
                source,
            }),
        }
    }

    /// Removes an entry; false where there was none.
    pub(super) fn remove(&self, key: &K) -> Result<bool, DatapathError> {
        let mut attr = ElementAttr {
            map_fd: self.fd(),
            pad: 0,
            key: std::ptr::from_ref(key) as u64,
            value: 0,
            flags: 0,
        };
        // SAFETY: `attr` is laid out as the kernel reads it and lives through the call; the key is of the map's
        // own size (checked when it was opened) and is only read; the fd is open.
        match unsafe { bpf(BPF_MAP_DELETE_ELEM, &mut attr) } {
            Err(source) if source.raw_os_error() != Some(libc::ENOENT) => {
                Err(DatapathError::Batch {
                    map: self.name,
                    what: "remove an entry",
                    source,
                })
            }
            removed => Ok(removed.is_ok()),
        }
    }
}
