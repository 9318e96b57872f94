//! Real leads under faults: what clients saw must be explained by registers that change one write at a time.
//!
//! ```text
//!  50 clients --TLS, idempotency keys--> lead a, b, c, each in a namespace of its own      history --> linearizable?
//!                                          ^
//!  seed --> nemesis: kill -9, SIGSTOP, cuts by nftables, a full file system
//! ```
//!
//! A register is an application with one service, named by the value; its generation counts the writes. So a lost write, a
//! write that happened twice and a stale read all contradict the history. What is asked is what the processes do; what a
//! power cut or a clock that jumps does is the simulation's to ask (`cargo xtask sim`).

mod client;
mod nemesis;
mod registers;

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use tokio::{runtime::Builder, task::JoinSet, time::sleep};
use weft_history::random::Random;

use self::{
    client::Client,
    nemesis::{Machines, Nemesis},
    registers::Registers,
};
use crate::leads::{Leads, NAMES, Place, apart::Apart};

/// Clients at once.
const CLIENTS: usize = 50;
/// The lead whose file system is small.
const SMALL: usize = 2;
/// How large that is, bytes.
const SIZE: u64 = 128 << 20;
/// How long the leads may take after the last fault until every one serves.
const RECOVERY: Duration = Duration::from_secs(60);

/// What is run.
#[derive(Clone, Debug)]
pub struct Faults {
    /// The folder with `weft`.
    pub binaries: PathBuf,
    /// Where the leads keep their data, and where what happened is kept where something does not hold.
    pub data: PathBuf,
    /// What decides which faults there are.
    pub seed: u64,
    /// How long there are faults.
    pub time: Duration,
    /// The round-trip time between the leads.
    pub rtt: Duration,
}

/// What came of a run in which everything held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Faults.
    pub faults: usize,
    /// Registers that were judged.
    pub registers: usize,
    /// Operations that were answered.
    pub answered: usize,
    /// Operations that were not: they may have happened.
    pub unanswered: usize,
    /// The longest time in which no write was acknowledged.
    pub longest_pause: Duration,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            faults,
            registers,
            answered,
            unanswered,
            longest_pause,
        } = self;
        write!(
            f,
            "{faults} faults: {answered} operations answered, {unanswered} not, {registers} registers linearizable, no write for at most {longest_pause:.1?}"
        )
    }
}

impl Faults {
    /// Runs it, as root and in a mount namespace of its own.
    ///
    /// # Errors
    /// When something does not hold, with the file that says what happened; or when something that it takes is missing.
    pub fn run(&self) -> Result<Summary> {
        let folder = tempfile::Builder::new()
            .prefix("weft-faults-")
            .tempdir_in(&self.data)
            .with_context(|| format!("failed to make a folder in {}", self.data.display()))?;
        let small = folder.path().join(format!("weft/data-{}", NAMES[SMALL]));
        let disk = nemesis::Disk::mount(&small, SIZE)?;
        let machines = Apart::new(self.rtt)?;
        // What is started by this thread ends with it.
        machines.hub().run(|| {
            let runtime = Builder::new_current_thread()
                .enable_all()
                .build()
                .context("failed to start the runtime")?;
            runtime.block_on(self.live(folder.path(), &machines, disk))
        })
    }

    async fn live(&self, folder: &Path, machines: &Apart, disk: nemesis::Disk) -> Result<Summary> {
        let mut random = Random::new(self.seed);
        let leads = Leads::start(&self.binaries, folder, &[], Place::apart(machines)).await?;
        let registers = Arc::new(Registers::default());
        let stop = Arc::new(AtomicBool::new(false));
        let mut client = |number| Client {
            number,
            doors: leads.doors().to_vec(),
            registers: registers.clone(),
            random: random.fork(),
            stop: stop.clone(),
        };
        let mut clients = JoinSet::new();
        for number in 0..CLIENTS {
            clients.spawn(client(number).run());
        }
        let last = client(CLIENTS);
        let mut nemesis = Nemesis::new(
            Machines {
                leads,
                apart: machines,
                disk,
                small: SMALL,
            },
            random,
        );
        let outcome = self.torment(&mut nemesis, &registers, &mut clients).await;
        stop.store(true, Ordering::Relaxed);
        let ended: Result<Vec<()>> = clients.join_all().await.into_iter().collect();
        let outcome = match outcome.and(ended.map(drop)) {
            Ok(()) => last.look().await.and_then(|()| registers.judge_all()),
            Err(error) => Err(error),
        };
        let said = match outcome {
            Ok(()) => return Ok(registers.summary(nemesis.count())),
            Err(error) => format!("{error:#}"),
        };
        let kept = self.data.join(format!("weft-faults-{}.txt", self.seed));
        let text = format!("{said}\n\n{}\n{}", nemesis.told(), registers.told());
        fs::write(&kept, text).with_context(|| format!("failed to write {}", kept.display()))?;
        for name in NAMES {
            let log = folder.join(format!("weft/{name}.log"));
            // What a lead said is there or not; the history is what counts.
            let _ = fs::copy(
                log,
                self.data
                    .join(format!("weft-faults-{}-{name}.log", self.seed)),
            );
        }
        bail!("{said}\nwhat happened is in {}", kept.display())
    }

    /// Faults until the time is over, then a calm in which every lead must serve all that was acknowledged.
    async fn torment(
        &self,
        nemesis: &mut Nemesis<'_>,
        registers: &Registers,
        clients: &mut JoinSet<Result<()>>,
    ) -> Result<()> {
        let end = Instant::now() + self.time;
        while Instant::now() < end {
            nemesis.strike().await?;
            registers.judge_retired()?;
            if let Some(ended) = clients.try_join_next() {
                ended.context("a client panicked")??;
                bail!("a client ended before it was told to");
            }
        }
        nemesis.calm().await?;
        let end = Instant::now() + RECOVERY;
        let before = registers.acknowledged();
        while let Err(error) = nemesis.all_serve().await {
            ensure!(
                Instant::now() < end,
                "not every lead serves again: {error:#}"
            );
            sleep(Duration::from_millis(200)).await;
        }
        while registers.acknowledged() < before + CLIENTS {
            ensure!(Instant::now() < end, "changes are not acknowledged again");
            sleep(Duration::from_millis(200)).await;
        }
        Ok(())
    }
}
