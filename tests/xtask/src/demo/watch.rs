//! A live table: where everything runs, and the last that was said.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use super::{mesh::Mesh, report::Report};

/// Clears the screen and goes to its upper left corner (ECMA-48 ED, CUP).
const CLEAR: &str = "\x1b[2J\x1b[H";
/// How many lines of the talk stay below the table.
const LINES: usize = 16;
/// How often the table is drawn.
const PERIOD: Duration = Duration::from_secs(1);

/// Draws until `over`.
pub(super) fn draw(mesh: &Mesh, report: &Report, over: &AtomicBool) {
    report.set_quiet(true);
    while !over.load(Ordering::Relaxed) {
        let table = mesh
            .bindings_text()
            .unwrap_or_else(|_| "no lead answers\n".to_owned());
        println!("{CLEAR}{table}\n{}", report.last(LINES).join("\n"));
        thread::park_timeout(PERIOD);
    }
    report.set_quiet(false);
}
