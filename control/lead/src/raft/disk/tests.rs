//! A disk that fills.

use std::{
    fmt,
    sync::atomic::{AtomicBool, Ordering},
};

use redb::{StorageBackend, backends::InMemoryBackend};

use super::{super::trouble::Full, *};
use crate::{room::Space, world::Boxed};

mod damage;
mod records;

/// A disk that a test fills.
#[derive(Clone, Debug, Default)]
struct Filling {
    data: Arc<InMemoryBackend>,
    is_full: Arc<AtomicBool>,
}

impl fmt::Display for Filling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("/data")
    }
}

impl StorageBackend for Filling {
    fn len(&self) -> io::Result<u64> {
        self.data.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.data.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.data.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.data.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        match self.is_full.load(Ordering::Relaxed) {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => self.data.write(offset, data),
        }
    }
}

impl Storage for Filling {
    fn open(&self, builder: &Builder) -> Result<Database, DiskError> {
        header::examine(Arc::new(self.clone()), builder)?;
        Ok(builder.create_with_backend(self.clone())?)
    }

    fn run(&self, work: Box<dyn FnOnce() + Send>) -> Boxed<'static, ()> {
        work();
        Box::pin(async {})
    }

    fn space(&self) -> io::Result<Space> {
        Ok(Space {
            free: 5 << 10,
            total: 1 << 30,
        })
    }
}

#[tokio::test]
async fn a_write_that_finds_no_room_is_remembered_and_what_was_written_before_is_there_again() {
    let storage = Filling::default();
    let disk = Disk::open(Arc::new(storage.clone())).unwrap();
    let append = |index, size| {
        vec![Write::Append(vec![(
            index,
            encode(&vec![7_u8; size]).unwrap(),
        )])]
    };
    disk.write(append(1, 10)).await.unwrap();
    assert_eq!(disk.trouble().cause(), None);
    storage.is_full.store(true, Ordering::Relaxed);
    disk.write(append(2, 3 << 20)).await.unwrap_err();
    // What comes after it fails because of it, and says nothing new.
    disk.write(append(2, 10)).await.unwrap_err();
    let Some(Cause::Full(full)) = disk.trouble().cause() else {
        panic!("it is full");
    };
    assert_eq!((full.dir.as_str(), full.free), ("/data", 5 << 10));
    assert!(full.bytes >= 3 << 20, "{full}");
    let text = full.to_string();
    for part in ["/data had 5Ki left", "3Mi", "--data"] {
        assert!(text.contains(part), "{text}");
    }
    drop(disk);
    let again = || Disk::open(Arc::new(storage.clone()));
    let error = again().unwrap_err();
    assert!(Full::of(&error, &storage, 0).is_some(), "{error:?}");
    storage.is_full.store(false, Ordering::Relaxed);
    let entries: Vec<Vec<u8>> = again().unwrap().entries(..).unwrap();
    assert_eq!(entries, [vec![7; 10]]);
}
