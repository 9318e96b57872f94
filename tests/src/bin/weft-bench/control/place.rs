//! The disk that both stores write to: which it is, and how long it takes to hold something.

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

/// What keeps nothing.
const MEMORY: [&str; 2] = ["tmpfs", "ramfs"];
/// Writes of one measurement.
const WRITES: usize = 50;

/// The file system of `folder`, for people; memory is refused.
pub(crate) fn of(folder: &Path) -> Result<String> {
    let folder = fs::canonicalize(folder)?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("failed to read mountinfo")?;
    let (kind, device) = mount(&mounts, &folder).context("no file system holds the data")?;
    ensure!(
        !MEMORY.contains(&kind),
        "{} is on {kind}, which keeps nothing: name a folder on a disk with --data",
        folder.display()
    );
    Ok(format!("data on {kind} ({device})"))
}

/// Type and source of the mount that holds `folder` (proc_pid_mountinfo(5)): the longest mount point, the last of equals.
fn mount<'a>(mounts: &'a str, folder: &Path) -> Option<(&'a str, &'a str)> {
    let line = |line: &'a str| {
        let (before, after) = line.split_once(" - ")?;
        let point = Path::new(before.split(' ').nth(4)?);
        let mut after = after.split(' ');
        let found = (after.next()?, after.next()?);
        folder
            .starts_with(point)
            .then(|| (point.components().count(), found))
    };
    let found = mounts.lines().filter_map(line);
    found
        .max_by_key(|(depth, _)| *depth)
        .map(|(_, found)| found)
}

/// The median time of a write of 4 KiB, fdatasync(2) included.
pub(crate) fn fsync(folder: &Path) -> Result<Duration> {
    let mut file = File::create(folder.join("fsync"))?;
    let mut times = Vec::new();
    for _ in 0..WRITES {
        let started = Instant::now();
        file.write_all(&[0x5a; 4_096])?;
        file.sync_data()?;
        times.push(started.elapsed());
    }
    times.sort();
    Ok(times[WRITES / 2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_on_the_innermost_file_system_mounted_over_it() {
        let mounts = "\
1 0 254:0 / / rw - ext4 /dev/vda rw
2 1 0:5 / /tmp rw shared:3 - tmpfs tmpfs rw
3 1 254:1 / /tmp/disk rw - xfs /dev/vdb rw
";
        let of = |path: &str| mount(mounts, Path::new(path)).unwrap();
        assert_eq!(of("/home/x"), ("ext4", "/dev/vda"));
        assert_eq!(of("/tmp/x"), ("tmpfs", "tmpfs"));
        assert_eq!(of("/tmp/disk/x"), ("xfs", "/dev/vdb"));
        assert_eq!(of("/tmp/diskette"), ("tmpfs", "tmpfs"));
    }
}
