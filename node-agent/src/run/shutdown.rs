//! Shutdown: stop signals, the end of the session, and the last snapshot of the engine.

use std::time::Duration;

use anyhow::Context as _;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::controller::session::{self, Context};
use crate::engine::Command;

/// Timeout of the shutdown.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// The signals that end the process. One value exists from the start on: a signal between two waits is not lost.
pub(super) struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    /// Listens for SIGTERM and SIGINT. Call it in the context of a runtime.
    pub(super) fn listen() -> anyhow::Result<Self> {
        let terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
        let interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
        Ok(Self { terminate, interrupt })
    }

    /// Waits for a signal. Cancel safe.
    pub(super) async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Runs the session until a stop signal; an engine that exits earlier is an error.
pub(super) async fn until_stopped(context: Context, signals: &mut StopSignals) -> anyhow::Result<()> {
    let (commands, drains) = (context.commands.clone(), context.drains.clone());
    let (stop, stopped) = watch::channel(false);
    let session = tokio::spawn(session::run(context, stopped));
    tokio::select! {
        () = signals.next() => {}
        () = commands.closed() => {
            anyhow::bail!("the engine's thread exited unexpectedly; see the log for the reason. The kernel keeps its state");
        }
    }
    tracing::info!("stopping; the kernel keeps its state");
    drains.stop();
    // A dropped receiver has stopped already.
    let _ = stop.send(true);
    let _ = session.await;
    let _ = commands.send(Command::Stop).await;
    Ok(())
}

/// Waits for the engine's thread, which needs the runtime's timers until it exits.
pub(super) fn wait_for(runtime: &tokio::runtime::Runtime, engine: &std::thread::JoinHandle<()>) {
    let ended = runtime.block_on(async {
        tokio::time::timeout(STOP_DEADLINE, async {
            while !engine.is_finished() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
    });
    if ended.is_err() {
        tracing::warn!(
            "timeout while stopping the engine; the snapshot file may be older than the kernel's state"
        );
    }
}

#[cfg(test)]
mod tests {
    use prometheus::Registry;

    use tokio::sync::mpsc;

    use super::*;
    use crate::controller::bootstrap::Controllers;
    use crate::controller::link::Contact;
    use crate::controller::session::Identity;
    use crate::drain::requests::Requests;
    use crate::metrics::Metrics;
    use crate::storage::files::StateFiles;

    #[test]
    fn agent_fails_when_the_engine_exits() {
        let metrics = Metrics::register(&Registry::new()).unwrap();
        let identity = Identity {
            node_name: "n".into(),
            kernel_version: String::new(),
            files: StateFiles::start().unwrap(),
        };
        let controllers = Controllers::new(Vec::new(), None, None, "/nonexistent".into(), None);
        let (commands, received) = mpsc::channel(1);
        let engine = std::thread::spawn(move || {
            let _received = received;
            panic!("this is a test");
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let ended = runtime.block_on(async {
            let (contact, drains) = (Contact::default(), Requests::default());
            let mut signals = StopSignals::listen().unwrap();
            let context = Context { controllers, identity, commands, metrics, contact, drains };
            let agent = until_stopped(context, &mut signals);
            tokio::time::timeout(Duration::from_secs(20), agent).await.unwrap()
        });
        assert!(engine.join().is_err());
        assert!(ended.unwrap_err().to_string().contains("engine"));
    }
}
