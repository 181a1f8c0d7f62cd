//! Bounds and timeouts of streams.

use std::time::Duration;

use crate::peers::Peers;

/// Bounds and times of streams.
#[derive(Debug, Clone)]
pub struct Limits {
    /// This replica's name, for agents.
    pub replica: String,
    /// Addresses of all replicas, for agents.
    pub peers: Peers,
    /// Most streams.
    pub streams: usize,
    /// New streams per second, on average.
    pub streams_per_second: f64,
    /// New streams at once.
    pub stream_burst: f64,
    /// From the stream's start to its Hello.
    pub hello: Duration,
    /// From an update to its acknowledgement.
    pub acknowledgement: Duration,
    /// Between two pings.
    pub ping: Duration,
    /// A peer that says nothing for this long, or takes nothing, is gone.
    pub silence: Duration,
    /// Messages of one agent per second, on average; ten times as many at once.
    pub messages_per_second: f64,
    /// First pause after a refused update; doubles up to 64 times.
    pub pause: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            replica: "controller".to_owned(),
            peers: Peers::new(Vec::new()).0,
            streams: 20_000,
            streams_per_second: 1_000.0,
            stream_burst: 2_000.0,
            hello: Duration::from_secs(10),
            acknowledgement: Duration::from_secs(60),
            ping: Duration::from_secs(15),
            silence: Duration::from_secs(45),
            messages_per_second: 100.0,
            pause: Duration::from_secs(1),
        }
    }
}
