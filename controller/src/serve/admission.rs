//! Admission of new streams: a maximum number of open streams, and a maximum rate of new ones.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crate::fleet::metrics::StreamMetrics;
use crate::session::Limits;
use crate::sync::lock;
use crate::token_bucket::{Rate, TokenBucket};

/// Counts and limits the open streams.
pub(super) struct Admission {
    max_streams: usize,
    open: AtomicUsize,
    bucket: Mutex<TokenBucket>,
    metrics: StreamMetrics,
}

/// Permission for one stream, returned when dropped.
pub(super) struct Permit(Arc<Admission>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
        self.0.metrics.streams.dec();
    }
}

impl Admission {
    pub(super) fn new(limits: &Limits, metrics: StreamMetrics) -> Arc<Self> {
        let rate = Rate { per_second: limits.streams_per_second, burst: limits.stream_burst };
        Arc::new(Self {
            max_streams: limits.streams,
            open: AtomicUsize::new(0),
            bucket: Mutex::new(TokenBucket::new(rate, Instant::now())),
            metrics,
        })
    }

    /// Admits a new stream. Returns `None`, and counts a refusal, if too many are open or too many came at once.
    pub(super) fn admit(self: &Arc<Self>) -> Option<Permit> {
        let mut bucket = lock(&self.bucket);
        if self.open.load(Ordering::Relaxed) >= self.max_streams || !bucket.take(Instant::now()) {
            self.metrics.refused("too_many_streams");
            return None;
        }
        self.open.fetch_add(1, Ordering::Relaxed);
        self.metrics.streams.inc();
        Some(Permit(self.clone()))
    }
}
