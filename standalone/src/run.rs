//! Both parts in one process: the agent on the main thread, the controller on its own.
//!
//! The agent starts first and does not depend on the controller: after a reboot without an API server it programs its last
//! view. A controller that ends with an error is restarted; the kernel and the agent keep their state.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use switchtower_controller::run as controller;
use switchtower_node_agent::run as agent;
use tokio::sync::watch;

use crate::cli::StandaloneArgs;
use crate::lines;
use crate::token::Issuer;

/// Interval between two starts of the controller.
const RETRY: Duration = Duration::from_secs(5);
/// Time that the controller has to release the Lease after the agent has stopped.
const STOP: Duration = Duration::from_secs(10);

/// Runs until a signal arrives.
///
/// # Errors
/// A flag is invalid, or the agent cannot start.
pub(crate) fn run(args: &StandaloneArgs) -> anyhow::Result<()> {
    let agent = lines::agent(args)?;
    lines::controller(args, None)?;
    let (stop, stopped) = watch::channel(false);
    let mut thread = None;
    let owned = args.clone();
    let outcome = agent::run_with(agent, || {
        let started =
            std::thread::Builder::new().name("controller".into()).spawn(move || control(&owned, stopped));
        thread = Some(started.context("start the controller's thread")?);
        Ok(())
    });
    let _ = stop.send(true);
    if outcome.is_ok() {
        let deadline = Instant::now() + STOP;
        while thread.as_ref().is_some_and(|thread| !thread.is_finished()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    outcome
}

/// Runs the controller until it stops for a signal.
fn control(args: &StandaloneArgs, stopped: watch::Receiver<bool>) {
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(keep_running(args, stopped)),
        Err(error) => tracing::error!(%error, "failed to start the controller; the node keeps its state"),
    }
}

async fn keep_running(args: &StandaloneArgs, mut stopped: watch::Receiver<bool>) {
    let mut renewal: Option<tokio::task::JoinHandle<()>> = None;
    loop {
        // Dropped senders mean the same as a stop: the process ends.
        let ended = tokio::select! {
            _ = stopped.wait_for(|stopped| *stopped) => return,
            prepared = prepare(args) => match prepared {
                Ok((serve, issuer)) => {
                    if let Some(previous) = renewal.replace(tokio::spawn(issuer.renew())) {
                        previous.abort();
                    }
                    // It has a runtime of its own, and returns on a signal.
                    tokio::task::spawn_blocking(|| controller::start(serve)).await.context("the controller panicked")
                }
                Err(error) => Ok(Err(error)),
            }
        };
        match ended.and_then(|outcome| outcome) {
            Ok(()) => return,
            Err(error) => {
                tracing::error!(
                    error = format!("{error:#}"),
                    "the controller ended; the node keeps its state; restarting it"
                );
            }
        }
        tokio::select! {
            _ = stopped.wait_for(|stopped| *stopped) => return,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

/// Waits for the agent's first token.
async fn prepare(args: &StandaloneArgs) -> anyhow::Result<(switchtower_controller::cli::ServeArgs, Issuer)> {
    let serve = lines::controller(args, None)?;
    let client = kube::Client::try_from(controller::config(&serve).await?)
        .context("setting up the client of the API server")?;
    let issuer = Issuer::new(client, &serve, &args.node_name, lines::token_file(args));
    let selector = issuer.first().await;
    Ok((lines::controller(args, selector.as_deref())?, issuer))
}
