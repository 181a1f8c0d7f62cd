//! Start-up: memory and descriptor limits, log and spans, the lock of the state directory.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::shutdown::StopSignals;
use crate::cli::LogFormat;
use crate::log::LogLevel;
use crate::storage::state_lock::{LockError, StateLock};
use crate::traces::Traces;

/// Timeout of one attempt to lock, for a disk that does not answer.
const LOCK_DEADLINE: Duration = Duration::from_secs(10);
/// Interval between two attempts while another agent holds the lock.
const LOCK_RETRY: Duration = Duration::from_millis(200);
/// Interval between two log lines about the other agent.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Bounds memory: the allocator returns large buffers to the system and uses one arena.
pub(super) fn bound_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt takes plain numbers and is called before other threads exist.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 512 << 10);
    }
}

/// Raises the soft limit of descriptors to the hard one. The soft limit is often 1,024, and hundreds of health check
/// ports need one descriptor per address.
pub(super) fn raise_descriptor_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls read or write one rlimit that lives through them.
    let raised = unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit)
        } else {
            -1
        }
    };
    if raised != 0 {
        let error = std::io::Error::last_os_error();
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// Starts spans and log; the subscriber of the log exports ordinary spans.
pub(super) fn telemetry(
    runtime: &tokio::runtime::Runtime,
    node_name: &str,
    log_level: &str,
    log_format: LogFormat,
) -> anyhow::Result<(Traces, LogLevel)> {
    let exported = {
        let _inside = runtime.enter();
        Traces::from_environment(node_name)
    };
    let layer = exported.as_ref().ok().and_then(Traces::layer);
    let log = crate::log::to_stderr(log_level, log_format, layer)?;
    // A failed export of spans must not take the node out of service.
    let traces = exported.unwrap_or_else(|error| {
        tracing::warn!(error = format!("{:#}", anyhow::Error::new(error)), "cannot export spans");
        Traces::none()
    });
    if traces.are_exported() {
        tracing::info!("exporting spans over OTLP");
    }
    Ok((traces, log))
}

/// Result of waiting for the state directory.
pub(super) enum Waited {
    /// The agent may start; `None` if the directory cannot be locked. Signals that arrive from now on are not lost.
    Start(Option<StateLock>, StopSignals),
    /// A stop signal arrived first.
    Stop,
}

/// Takes the lock of the state directory and waits while another agent holds it: during a rolling update the previous
/// agent may still be stopping. The agent starts without the lock if the directory cannot be locked in time.
pub(super) async fn wait_for_lock(state: &Path) -> anyhow::Result<Waited> {
    let mut signals = StopSignals::listen()?;
    let mut logged = None;
    let taken = async {
        loop {
            let (sender, receiver) = tokio::sync::oneshot::channel();
            let directory = state.to_owned();
            let attempt = move || drop(sender.send(StateLock::take(&directory)));
            std::thread::Builder::new().name("state-lock".into()).spawn(attempt).context("start a thread")?;
            match tokio::time::timeout(LOCK_DEADLINE, receiver).await {
                Ok(Ok(Ok(lock))) => return Ok::<_, anyhow::Error>(Some(lock)),
                Ok(Ok(Err(error @ LockError::Held { .. }))) => {
                    if logged.is_none_or(|logged: Instant| logged.elapsed() >= LOG_INTERVAL) {
                        tracing::warn!(%error, "waiting for the other agent to stop; two agents would revert each other's changes");
                        logged = Some(Instant::now());
                    }
                    tokio::time::sleep(LOCK_RETRY).await;
                }
                Ok(Ok(Err(error @ LockError::Io { .. }))) => {
                    tracing::warn!(%error, "cannot use the state directory; continuing without it");
                    return Ok(None);
                }
                Ok(Err(_)) | Err(_) => {
                    tracing::warn!(directory = %state.display(), "timeout while locking the state directory; continuing without the lock");
                    return Ok(None);
                }
            }
        }
    };
    tokio::select! {
        lock = taken => Ok(Waited::Start(lock?, signals)),
        () = signals.next() => Ok(Waited::Stop),
    }
}
