//! Bounds and timeouts of streams.

use std::time::Duration;

use tokio::time::Instant;

use crate::authority::nodes::NodeCertificates;
use crate::peers::Peers;

/// Bounds and times of streams.
#[derive(Clone)]
pub struct Limits {
    /// Name of this replica, sent to agents.
    pub replica: String,
    /// Addresses of all replicas, sent to agents.
    pub peers: Peers,
    /// Issues the certificates of nodes. `None`: requests are ignored.
    pub certificates: Option<NodeCertificates>,
    /// Maximum number of open streams.
    pub streams: usize,
    /// Maximum average of new streams per second.
    pub streams_per_second: f64,
    /// Maximum number of new streams at once.
    pub stream_burst: f64,
    /// Timeout from the start of a stream to its Hello.
    pub hello: Duration,
    /// Timeout from an update to its acknowledgement.
    pub acknowledgement: Duration,
    /// Interval between pings.
    pub ping: Duration,
    /// Pings of all streams are due at multiples of half a second after this time.
    pub origin: Instant,
    /// A peer that sends nothing or accepts nothing for this long is considered lost.
    pub silence: Duration,
    /// Maximum average of messages per second of one agent; the burst is ten times as much.
    pub messages_per_second: f64,
    /// Initial delay after a refused update; doubles up to a factor of 64.
    pub pause: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            replica: "controller".to_owned(),
            peers: Peers::new(Vec::new()).0,
            certificates: None,
            streams: 20_000,
            streams_per_second: 1_000.0,
            stream_burst: 2_000.0,
            hello: Duration::from_secs(10),
            acknowledgement: Duration::from_secs(60),
            ping: Duration::from_secs(15),
            origin: Instant::now(),
            silence: Duration::from_secs(45),
            messages_per_second: 100.0,
            pause: Duration::from_secs(1),
        }
    }
}
