//! Threads and tasks that send notices to the engine.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use prometheus::IntGauge;
use switchtower_proto::v1::DriftCause;
use tokio::sync::mpsc;

use crate::engine::Command;
use crate::kernel::nft::{Monitor, Notice};
use crate::probe::RoundResults;

/// Delay that collects the notices of one foreign transaction into one repair.
const SETTLE: Duration = Duration::from_millis(20);
/// Interval between two attempts to monitor our tables.
const REOPEN: Duration = Duration::from_secs(5);

/// Runs a source of notices in its own thread.
pub(super) fn follow(
    name: &str,
    commands: &mpsc::Sender<Command>,
    body: impl FnOnce(&mpsc::Sender<Command>) + Send + 'static,
) -> anyhow::Result<()> {
    let commands = commands.clone();
    let thread = std::thread::Builder::new().name(name.into()).spawn(move || body(&commands));
    thread.map(drop).with_context(|| format!("start the thread {name}"))
}

/// Returns a function that sends notices to the engine as commands; it breaks once the engine has stopped.
pub(super) fn sender<T, C: Fn(T) -> Command>(
    commands: &mpsc::Sender<Command>,
    command: C,
) -> impl Fn(T) -> ControlFlow<()> + use<T, C> {
    let commands = commands.clone();
    move |notice| match commands.blocking_send(command(notice)) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    }
}

/// Forwards the results of probes to the engine.
pub(super) fn probe_results(
    runtime: &tokio::runtime::Runtime,
    commands: &mpsc::Sender<Command>,
) -> mpsc::Sender<RoundResults> {
    let (results, mut received) = mpsc::channel(1);
    let commands = commands.clone();
    runtime.spawn(async move {
        while let Some(RoundResults { number, measured }) = received.recv().await {
            // An engine that has ended needs no results.
            let _ = commands.send(Command::Probed { number, measured }).await;
        }
    });
    results
}

/// Reports foreign changes of our tables until the engine stops. Retries to open a missing monitor, and then requests a
/// comparison for the changes until then.
pub(super) fn watch_drift(
    opened: std::io::Result<Monitor>,
    own_port: u32,
    commands: &mpsc::Sender<Command>,
    watched: &IntGauge,
) {
    let mut monitor = match opened {
        Ok(monitor) => monitor,
        Err(error) => {
            tracing::warn!(%error, "cannot monitor our tables for foreign changes; retrying");
            let Some(monitor) = until_opened(|| Monitor::open(own_port), commands) else { return };
            tracing::info!("monitoring our tables for foreign changes");
            let unwatched = Command::Drift { cause: DriftCause::Unwatched, noticed: Instant::now() };
            if commands.blocking_send(unwatched).is_err() {
                return;
            }
            monitor
        }
    };
    watched.set(1);
    loop {
        match monitor.wait(Duration::from_secs(3600)) {
            Ok(None) => {}
            Ok(Some(mut notice)) => {
                std::thread::sleep(SETTLE);
                if let Ok(Some(later)) = monitor.drain() {
                    notice = if notice == Notice::TableDeleted { notice } else { later };
                }
                let cause = match notice {
                    Notice::Changed => DriftCause::Changed,
                    Notice::TableDeleted => DriftCause::TableDeleted,
                    Notice::Overflow => DriftCause::Overflow,
                };
                let drift = Command::Drift { cause, noticed: Instant::now() };
                if commands.blocking_send(drift).is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::error!(%error, "cannot read notices about our tables; retrying");
                std::thread::sleep(REOPEN);
            }
        }
    }
}

/// Retries until `open` succeeds; `None` once the engine has stopped.
fn until_opened<T>(open: impl Fn() -> std::io::Result<T>, commands: &mpsc::Sender<Command>) -> Option<T> {
    while !commands.is_closed() {
        std::thread::sleep(REOPEN);
        if let Ok(opened) = open() {
            return Some(opened);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opening_retried_until_the_engine_stops() {
        let (commands, received) = mpsc::channel(1);
        drop(received);
        assert_eq!(until_opened(|| Ok(1), &commands), None);
    }
}
