//! What an interrupt does: SIGINT, SIGTERM, SIGHUP, or the end of the program that started this one.
//!
//! A cluster that is being started is removed: the process becomes `cluster down`, which ends its threads at
//! once, so nothing is made any more. A running cluster stays.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context, Result};

use super::layout::Layout;
use super::shell::say;

/// The exit code of a program that an interrupt ended.
pub const EXIT_CODE: i32 = 130;

/// What is left to do when an interrupt comes.
#[derive(Debug, Clone)]
pub enum Then {
    /// Removes this cluster.
    Remove(Layout),
    /// Leaves the cluster as it is, and says how to remove it.
    Leave,
}

/// From now on an interrupt ends this process so. Its parent's end is one: whoever kills `make` with SIGKILL
/// has not asked for a cluster either.
///
/// # Errors
/// The handlers cannot be installed.
pub fn watch(then: Then) -> Result<()> {
    // SAFETY: prctl with these arguments touches no memory.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) } != 0 {
        return Err(std::io::Error::last_os_error()).context("asking for a signal at the parent's end");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("making the runtime that waits for signals")?;
    let signals = {
        let _entered = runtime.enter();
        Signals::install()?
    };
    std::thread::spawn(move || {
        runtime.block_on(signals.one());
        end(&then)
    });
    Ok(())
}

struct Signals([tokio::signal::unix::Signal; 3]);

impl Signals {
    fn install() -> Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let handler = |kind| signal(kind).context("installing a signal handler");
        Ok(Self([
            handler(SignalKind::interrupt())?,
            handler(SignalKind::terminate())?,
            handler(SignalKind::hangup())?,
        ]))
    }

    async fn one(self) {
        let [mut interrupt, mut terminate, mut hangup] = self.0;
        tokio::select! {
            _ = interrupt.recv() => (),
            _ = terminate.recv() => (),
            _ = hangup.recv() => (),
        }
    }
}

fn end(then: &Then) -> ! {
    match then {
        Then::Remove(layout) => {
            ignore_more();
            say("interrupted: what was started of the cluster is removed");
            let error = become_down(layout);
            say(&format!("{error:#}: `make cluster-down` removes it"));
        }
        Then::Leave => say("interrupted; a running cluster stays, `make cluster-down` removes it"),
    }
    std::process::exit(EXIT_CODE)
}

/// The removal is not to be interrupted: a second signal often follows the first (`timeout` sends one to the process and
/// one to its group), and the program that this process becomes has no handlers. What is ignored stays so.
fn ignore_more() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: a plain system call; no handler of ours runs afterwards.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Returns only if it fails.
fn become_down(layout: &Layout) -> anyhow::Error {
    let parent = layout.dir.parent().unwrap_or(&layout.dir);
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => return anyhow::Error::new(error).context("finding this program's own path"),
    };
    let error = Command::new(program)
        .args(["down", "--interrupted", "--name", &layout.name, "--dir"])
        .arg(parent)
        .exec();
    anyhow::Error::new(error).context("starting the removal")
}
