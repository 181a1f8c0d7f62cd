//! Memory and CPU time of processes, from /proc.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};

pub(super) fn resident(process: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kibibytes: f64 = line.trim().trim_end_matches(" kB").trim().parse()?;
    Ok(kibibytes / 1024.0)
}

/// CPU time of all threads in milliseconds, from the scheduler's nanosecond counters.
pub(super) fn cpu_time(process: u32) -> Result<f64> {
    let mut total = 0.0;
    for task in fs::read_dir(format!("/proc/{process}/task"))?.flatten() {
        // A thread may have ended since it was listed.
        let text = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        total += text.split_whitespace().next().and_then(|ns| ns.parse::<f64>().ok()).unwrap_or(0.0);
    }
    Ok(total / 1_000_000.0)
}

/// Samples the memory of a process's children until stopped.
pub(super) struct Peak {
    end: Arc<AtomicBool>,
    thread: JoinHandle<f64>,
}

impl Peak {
    /// Stops and returns the peak resident memory of a child, in MiB.
    pub(super) fn stop(self) -> f64 {
        self.end.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or(0.0)
    }
}

/// Starts sampling.
pub(super) fn peak_of_children(process: u32) -> Peak {
    let end = Arc::new(AtomicBool::new(false));
    let ended = end.clone();
    let thread = std::thread::spawn(move || {
        let mut peak: f64 = 0.0;
        while !ended.load(Ordering::Relaxed) {
            for child in children(process) {
                peak = peak.max(resident(child).unwrap_or(0.0));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        peak
    });
    Peak { end, thread }
}

fn children(process: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let lists = tasks.map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default());
    lists
        .flat_map(|list| list.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<_>>())
        .collect()
}
