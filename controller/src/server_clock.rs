//! The clock of the API server, by which all replicas measure the times that they store.
//!
//! A soak or a deadline that one leader begins may end under another. If each used its own clock, a replica whose clock is
//! ahead would cut the soak short, and its rows would not expire in time. The `Date` header of every response (RFC 9110, section 6.6.1) shows the difference.

use std::time::{SystemTime, UNIX_EPOCH};

use http::{HeaderMap, Response, header};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use prometheus::{Gauge, Registry, register_gauge_with_registry};
use tower::util::MapResponseLayer;

/// Maximum difference in milliseconds that counts as none: the header has whole seconds, and responses take time.
const TOLERANCE: i64 = 2_000;

/// Clock of the API server minus that of this process, in seconds, as its metric. Clones share it.
#[derive(Debug, Clone)]
pub struct ServerClock(Gauge);

impl ServerClock {
    /// A clock without a difference, until the first response. Exports the difference.
    ///
    /// # Errors
    /// The metric exists already.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let help = "Clock of the API server minus that of this controller, in seconds; 0 below two seconds.";
        register_gauge_with_registry!("switchtower_api_server_clock_offset_seconds", help, registry).map(Self)
    }

    /// Returns the time of the API server as of its last response; before the first one, that of this process.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        let now = Timestamp::now();
        now.checked_add(self.ahead()).unwrap_or(now)
    }

    /// Returns the clock of the API server minus that of this process.
    pub(crate) fn ahead(&self) -> SignedDuration {
        SignedDuration::from_millis(self.offset())
    }

    fn offset(&self) -> i64 {
        (self.0.get() * 1_000.0).round() as i64
    }

    /// For a client of the API server: reads the header of every response.
    pub fn layer<B>(&self) -> MapResponseLayer<impl Fn(Response<B>) -> Response<B> + Clone + use<B>> {
        let clock = self.clone();
        MapResponseLayer::new(move |response: Response<B>| {
            clock.observe(response.headers(), SystemTime::now());
            response
        })
    }

    fn observe(&self, headers: &HeaderMap, received: SystemTime) {
        let date = headers.get(header::DATE).and_then(|date| date.to_str().ok());
        let Some(sent) = date.and_then(|date| httpdate::parse_http_date(date).ok()) else { return };
        let offset = milliseconds(sent).saturating_sub(milliseconds(received));
        let offset = if offset.abs() < TOLERANCE { 0 } else { offset };
        let changes = (offset - self.offset()).abs() >= TOLERANCE;
        // A known difference that varies with each response would change every stored time.
        if changes || offset == 0 {
            self.0.set(offset as f64 / 1_000.0);
        }
        if changes {
            tracing::warn!(
                offset_ms = offset,
                "the clock of this process differs from the API server's; stored times are the API server's"
            );
        }
    }
}

fn milliseconds(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn observed(ahead: i64) -> ServerClock {
        let clock = ServerClock::new(&Registry::new()).unwrap();
        let now = SystemTime::now();
        let sent = now.checked_add(Duration::from_secs(ahead.unsigned_abs()));
        let sent = if ahead < 0 { now.checked_sub(Duration::from_secs(ahead.unsigned_abs())) } else { sent };
        let mut headers = HeaderMap::new();
        headers.insert(header::DATE, httpdate::fmt_http_date(sent.unwrap()).parse().unwrap());
        clock.observe(&headers, now);
        clock
    }

    #[test]
    fn wrong_clock_is_corrected_to_the_second() {
        for ahead in [-3_600, 3_600] {
            let difference = observed(ahead).now().as_millisecond() - Timestamp::now().as_millisecond();
            assert!((difference - ahead * 1_000).abs() <= TOLERANCE, "{difference}");
        }
    }

    #[test]
    fn known_difference_does_not_vary() {
        let clock = observed(3_600);
        let before = clock.ahead();
        let now = SystemTime::now();
        let mut headers = HeaderMap::new();
        for seconds in [3_599, 3_601] {
            let date = httpdate::fmt_http_date(now + Duration::from_secs(seconds));
            headers.insert(header::DATE, date.parse().unwrap());
            clock.observe(&headers, now);
            assert_eq!(clock.ahead(), before);
        }
        headers.insert(header::DATE, httpdate::fmt_http_date(now).parse().unwrap());
        clock.observe(&headers, now);
        assert_eq!(clock.ahead(), SignedDuration::ZERO, "it was set");
    }

    #[test]
    fn small_differences_and_bad_headers_change_nothing() {
        assert_eq!(observed(0).offset(), 0);
        let clock = observed(3_600);
        let before = clock.offset();
        let mut headers = HeaderMap::new();
        clock.observe(&headers, SystemTime::now());
        headers.insert(header::DATE, "yesterday".parse().unwrap());
        clock.observe(&headers, SystemTime::now());
        assert_eq!(clock.offset(), before);
    }
}
