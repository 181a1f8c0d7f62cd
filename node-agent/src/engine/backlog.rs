//! Changes that arrived and are not in the kernel yet, counted as kube-proxy counts them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use switchtower_proto::v1::Update;

use crate::kernel::change::KernelChange;
use crate::metrics::Programming;

/// Maximum number of trigger times kept while commits fail; later ones are not measured.
const TRIGGERS: usize = 1_024;

/// Changes between their arrival and the kernel.
#[derive(Default)]
pub(super) struct Backlog {
    receiving: Vec<Duration>,
    triggers: Vec<Duration>,
    endpoints: u64,
    services: u64,
}

impl Backlog {
    /// Notes the trigger times of an update. A snapshot carries old changes, which say nothing about latency.
    pub(super) fn begin(&mut self, update: &Update) {
        let changes = update.changes.iter().filter(|_| update.from.is_some());
        let times = changes.map(|change| change.trigger_unix_nanoseconds).filter(|time| *time != 0);
        self.receiving = times.map(Duration::from_nanos).collect();
    }

    /// Counts the changes of a complete update.
    pub(super) fn take(&mut self, changes: &[KernelChange], metrics: &Programming) {
        let (mut endpoints, mut services) = (0, 0);
        for change in changes {
            match change {
                KernelChange::Pool { .. } | KernelChange::PoolRemoved(_) => endpoints += 1,
                KernelChange::Frontend(_) | KernelChange::FrontendRemoved(_) => services += 1,
                _ => {}
            }
        }
        self.endpoints += endpoints;
        self.services += services;
        self.triggers.append(&mut self.receiving);
        self.triggers.truncate(TRIGGERS);
        metrics.arrived(endpoints, services);
        metrics.pending(self.endpoints, self.services);
    }

    /// Records the latencies once the kernel holds everything that arrived.
    pub(super) fn committed(&mut self, metrics: &Programming) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        for trigger in std::mem::take(self).triggers {
            // The trigger time comes from another machine's clock, which may be ahead.
            metrics.programmed(now.saturating_sub(trigger));
        }
        metrics.pending(0, 0);
    }
}
