//! Handles interrupts: SIGINT, SIGTERM, SIGHUP, or the end of the parent process.
//!
//! A cluster that is being started is removed: the process executes `cluster down`, which ends its threads
//! immediately, so that nothing more is created. A running cluster stays.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context, Result};

use super::layout::Layout;
use super::shell::say;

/// Exit code of an interrupted program.
pub const EXIT_CODE: i32 = 130;

/// Action on an interrupt.
#[derive(Debug, Clone)]
pub enum Then {
    /// Removes this cluster.
    Remove(Layout),
    /// Keeps the cluster and prints how to remove it.
    Leave,
}

/// Installs the handlers, which run the action and end this process. The end of the parent counts as an interrupt: if
/// `make` is killed with SIGKILL, the cluster is no longer wanted.
///
/// # Errors
/// The handlers cannot be installed.
pub fn watch(then: Then) -> Result<()> {
    // SAFETY: prctl with these arguments touches no memory.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) } != 0 {
        return Err(std::io::Error::last_os_error()).context("requesting a signal at the parent's end");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("creating the runtime for signals")?;
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
            say("interrupted: removing the incomplete cluster");
            let error = become_down(layout);
            say(&format!("{error:#}: remove the cluster with `make cluster-down`"));
        }
        Then::Leave => say("interrupted; the cluster keeps running, `make cluster-down` removes it"),
    }
    std::process::exit(EXIT_CODE)
}

/// Ignores signals during the removal: a second signal often follows the first (`timeout` signals the process and its
/// group), and the executed program has no handlers. Ignored signals stay ignored across exec.
fn ignore_more() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: a plain system call; none of our handlers runs afterwards.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Returns only on failure.
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
