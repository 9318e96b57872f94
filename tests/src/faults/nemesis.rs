//! What happens to the leads: one fault after the other, drawn from a seed, with a rest behind each.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::time::sleep;
use weft_history::random::Random;

use crate::leads::{Leads, NAMES, apart::Apart};

/// How long a fault lasts, milliseconds.
const LASTS: (u64, u64) = (300, 6_000);
/// How long it rests behind one, milliseconds.
const RESTS: (u64, u64) = (200, 4_000);
/// The table of the rules that cut leads off.
const TABLE: &str = "faults";

/// A fault, with the lead that it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// kill -9, again and again: so often.
    Killed(usize, u64),
    /// SIGSTOP, and SIGCONT later.
    Stopped(usize),
    /// No other lead hears it, and it hears none.
    Alone(usize),
    /// What it says to that one is lost, and nothing else.
    Mute(usize, usize),
    /// No lead hears another.
    Apart,
    /// The small file system is full.
    Full,
}

fn draw(random: &mut Random) -> Fault {
    let lead = *random.pick(&[0, 1, 2]);
    let other = (lead + *random.pick(&[1, 2])) % NAMES.len();
    match random.within(0, 100) {
        0..35 => Fault::Killed(lead, random.within(1, 4)),
        35..55 => Fault::Stopped(lead),
        55..72 => Fault::Alone(lead),
        72..84 => Fault::Mute(lead, other),
        84..90 => Fault::Apart,
        _ => Fault::Full,
    }
}

/// A small file system.
#[derive(Debug)]
pub(super) struct Disk(PathBuf);

impl Disk {
    /// Mounts it at `place`.
    pub(super) fn mount(place: &Path, size: u64) -> Result<Self> {
        fs::create_dir_all(place)?;
        let size = format!("size={size}");
        let mounted = mount(
            Some("none"),
            place,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(&*size),
        );
        mounted.with_context(|| format!("failed to mount a file system at {}", place.display()))?;
        Ok(Self(place.to_owned()))
    }

    /// Takes all the room that there is.
    fn fill(&self) -> Result<()> {
        let mut file = File::create(self.0.join("filler"))?;
        // It ends when nothing fits any more.
        while file.write_all(&[1; 4096]).is_ok() {}
        Ok(())
    }

    fn empty(&self) -> Result<()> {
        let filler = self.0.join("filler");
        if filler.exists() {
            fs::remove_file(filler)?;
        }
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // It goes with the mount namespace at the latest.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// What faults are about.
#[derive(Debug)]
pub(super) struct Machines<'a> {
    pub(super) leads: Leads,
    pub(super) apart: &'a Apart,
    pub(super) disk: Disk,
    /// The lead on that disk.
    pub(super) small: usize,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Nemesis<'a> {
    machines: Machines<'a>,
    random: Random,
    began: Instant,
    faults: Vec<(Duration, Fault, Duration)>,
}

impl<'a> Nemesis<'a> {
    pub(super) fn new(machines: Machines<'a>, random: Random) -> Self {
        Self {
            machines,
            random,
            began: Instant::now(),
            faults: Vec::new(),
        }
    }

    /// One fault and the rest behind it.
    pub(super) async fn strike(&mut self) -> Result<()> {
        let fault = draw(&mut self.random);
        let lasts = Duration::from_millis(self.random.within(LASTS.0, LASTS.1));
        let rests = Duration::from_millis(self.random.within(RESTS.0, RESTS.1));
        self.faults.push((self.began.elapsed(), fault, lasts));
        match fault {
            Fault::Killed(lead, times) => {
                for _ in 0..times {
                    self.machines.leads.kill(lead)?;
                    sleep(lasts / u32::try_from(2 * times).unwrap_or(1)).await;
                    self.machines.leads.start_again(lead)?;
                    sleep(lasts / u32::try_from(2 * times).unwrap_or(1)).await;
                }
            }
            Fault::Stopped(lead) => {
                self.signal(lead, Signal::SIGSTOP)?;
                sleep(lasts).await;
                self.signal(lead, Signal::SIGCONT)?;
            }
            Fault::Alone(lead) => {
                for other in others(lead) {
                    self.cut(lead, other)?;
                    self.cut(other, lead)?;
                }
                sleep(lasts).await;
            }
            Fault::Mute(lead, other) => {
                self.cut(lead, other)?;
                sleep(lasts).await;
            }
            Fault::Apart => {
                for lead in 0..NAMES.len() {
                    for other in others(lead) {
                        self.cut(lead, other)?;
                    }
                }
                sleep(lasts).await;
            }
            Fault::Full => {
                self.machines.disk.fill()?;
                sleep(lasts).await;
            }
        }
        self.heal()?;
        sleep(rests).await;
        Ok(())
    }

    /// Ends what is wrong.
    fn heal(&mut self) -> Result<()> {
        for lead in 0..NAMES.len() {
            let netns = self.machines.apart.lead(lead);
            netns.succeed("nft", &["add", "table", "ip", TABLE])?;
            netns.succeed("nft", &["delete", "table", "ip", TABLE])?;
        }
        self.machines.disk.empty()?;
        let small = self.machines.small;
        if let Some(status) = self.machines.leads.ended(small)? {
            // That is what it is to do when its disk is full.
            ensure!(status.code() == Some(1), "lead {}: {status}", NAMES[small]);
            self.machines.leads.start_again(small)?;
        }
        for (lead, name) in NAMES.iter().enumerate() {
            let ended = self.machines.leads.ended(lead)?;
            ensure!(ended.is_none(), "lead {name} ended by itself: {ended:?}");
        }
        Ok(())
    }

    /// No more faults.
    pub(super) async fn calm(&mut self) -> Result<()> {
        self.heal()
    }

    /// Whether every lead answers with all that was acknowledged.
    pub(super) async fn all_serve(&self) -> Result<()> {
        for lead in 0..NAMES.len() {
            self.machines.leads.applications(lead).await?;
        }
        Ok(())
    }

    fn signal(&self, lead: usize, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.machines.leads.pids()[lead])?;
        kill(Pid::from_raw(pid), signal).context("failed to send a signal")
    }

    /// What `from` says does not get to `to` any more.
    fn cut(&self, from: usize, to: usize) -> Result<()> {
        let netns = self.machines.apart.lead(to);
        let source = self.machines.apart.addresses()[from].ip().to_string();
        let chain = "{ type filter hook input priority 0; }";
        netns.succeed("nft", &["add", "table", "ip", TABLE])?;
        netns.succeed("nft", &["add", "chain", "ip", TABLE, "input", chain])?;
        let drop = [
            "add", "rule", "ip", TABLE, "input", "ip", "saddr", &source, "drop",
        ];
        netns.succeed("nft", &drop)?;
        Ok(())
    }

    pub(super) fn count(&self) -> usize {
        self.faults.len()
    }

    /// What happened when.
    pub(super) fn told(&self) -> String {
        let mut text = String::new();
        for (at, fault, lasts) in &self.faults {
            // A string takes everything.
            let _ = writeln!(text, "{at:?}: {fault:?} for {lasts:?}");
        }
        text
    }
}

fn others(lead: usize) -> impl Iterator<Item = usize> {
    (0..NAMES.len()).filter(move |it| *it != lead)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_seed_draws_the_same_faults_again_and_each_kind_comes() {
        let drawn = |seed| {
            let mut random = Random::new(seed);
            (0..200).map(|_| draw(&mut random)).collect::<Vec<_>>()
        };
        assert_eq!(drawn(1), drawn(1));
        assert_ne!(drawn(1), drawn(2));
        let kinds: BTreeSet<_> = drawn(1)
            .into_iter()
            .map(|fault| match fault {
                Fault::Killed(..) => "killed",
                Fault::Stopped(_) => "stopped",
                Fault::Alone(_) => "alone",
                Fault::Mute(from, to) => {
                    assert_ne!(from, to);
                    "mute"
                }
                Fault::Apart => "apart",
                Fault::Full => "full",
            })
            .collect();
        assert_eq!(kinds.len(), 6);
    }
}
