//! Heartbeats: the agent sends something at least once per interval.

use std::time::Duration;

use tokio::time::Instant;

/// Minimum interval, whatever the controller requests.
pub(super) const MINIMUM: Duration = Duration::from_secs(1);

/// The heartbeats of one stream.
#[derive(Debug)]
pub(super) struct Heartbeats {
    /// `None` if the controller requests none.
    interval: Option<Duration>,
    next: Instant,
}

impl Heartbeats {
    /// Heartbeats at the interval that a Welcome requests, in milliseconds; 0: none.
    pub(super) fn requested(milliseconds: u32) -> Self {
        let interval = (milliseconds > 0).then(|| Duration::from_millis(milliseconds.into()).max(MINIMUM));
        let mut heartbeats = Self { interval, next: Instant::now() };
        heartbeats.sent();
        heartbeats
    }

    /// Records that something was sent, which is as good as a heartbeat.
    pub(super) fn sent(&mut self) {
        if let Some(interval) = self.interval {
            self.next = Instant::now() + interval;
        }
    }

    /// Waits until a heartbeat is due. Cancel safe.
    pub(super) async fn due(&self) {
        match self.interval {
            Some(_) => tokio::time::sleep_until(self.next).await,
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn heartbeat_is_due_after_an_interval_without_messages() {
        let mut heartbeats = Heartbeats::requested(6_000);
        let start = Instant::now();
        tokio::time::sleep(Duration::from_secs(5)).await;
        heartbeats.sent();
        heartbeats.due().await;
        assert_eq!(start.elapsed(), Duration::from_secs(11));
        heartbeats.due().await;
        assert_eq!(start.elapsed(), Duration::from_secs(11), "due until something is sent");
        assert_eq!(Heartbeats::requested(1).interval, Some(MINIMUM));
        let never = tokio::time::timeout(Duration::from_secs(3_600), Heartbeats::requested(0).due()).await;
        assert!(never.is_err());
    }
}
