//! Ctrl-C and SIGTERM: the lab goes down before the demo ends.

use std::{
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{self, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context, Result};

/// What a shell says of a command that Ctrl-C ended.
const INTERRUPTED: i32 = 130;

/// What is to be taken down when somebody interrupts.
#[derive(Debug)]
pub(crate) struct Interrupt(Arc<Mutex<Option<String>>>);

impl Interrupt {
    /// From now on an interrupt is heard.
    ///
    /// # Errors
    /// When the signals cannot be handled.
    pub(crate) fn heard(weft: PathBuf) -> Result<Self> {
        let lab: Arc<Mutex<Option<String>>> = Arc::default();
        let of_handler = Arc::clone(&lab);
        ctrlc::set_handler(move || {
            let lab = of_handler
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            match lab {
                Some(lab) => {
                    eprintln!("interrupted: lab {lab} goes down");
                    // A second Ctrl-C is not for it.
                    let down = Command::new(&weft)
                        .args(["lab", "down", "--lab", &lab])
                        .stdout(Stdio::null())
                        .process_group(0)
                        .status();
                    if !down.is_ok_and(|status| status.success()) {
                        eprintln!("it did not; again by: {} lab down", weft.display());
                    }
                }
                None => eprintln!(
                    "interrupted; what there is of a lab goes down by: {} lab down",
                    weft.display()
                ),
            }
            process::exit(INTERRUPTED);
        })
        .context("failed to handle SIGINT and SIGTERM")?;
        Ok(Self(lab))
    }

    /// An interrupt takes this lab down.
    pub(crate) fn takes_down(&self, lab: &str) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(lab.to_owned());
    }
}
