//! Origin of an object's last change, from its annotations.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use switchtower_core::propagation::{TraceContext, UnixNanoseconds};

/// Annotation of the endpoints controller: start of the change that led to the object, in whole seconds. Absent when
/// a pod was deleted.
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// The trace in which the object was written (KEP-5915).
const TRACEPARENT: &str = "tracing.k8s.io/traceparent";

/// Origin of a change. An invalid annotation counts as absent, because nothing is served from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Origin {
    /// Start of the change, by the clock of another machine.
    pub triggered: Option<UnixNanoseconds>,
    /// The span in which the object was written.
    pub trace: Option<TraceContext>,
}

impl Origin {
    /// Reads the annotations.
    #[must_use]
    pub fn of(metadata: &ObjectMeta) -> Self {
        let annotation = |name| metadata.annotations.as_ref().and_then(|all| all.get(name));
        let triggered = annotation(TRIGGER_TIME).and_then(|text| text.parse::<Timestamp>().ok());
        Self {
            triggered: triggered.and_then(|time| UnixNanoseconds::try_from(time.as_nanosecond()).ok()),
            trace: annotation(TRACEPARENT).and_then(|text| text.parse().ok()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(annotations: &[(&str, &str)]) -> Origin {
        let annotations = annotations.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned()));
        Origin::of(&ObjectMeta { annotations: Some(annotations.collect()), ..ObjectMeta::default() })
    }

    #[test]
    fn annotations_are_parsed_and_invalid_ones_ignored() {
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let known = origin(&[(TRIGGER_TIME, "2026-11-21T15:00:00Z"), (TRACEPARENT, parent)]);
        assert_eq!(known.triggered, Some(1_795_273_200_000_000_000));
        assert_eq!(known.trace, parent.parse().ok());
        for text in ["", "yesterday", "1890-01-01T00:00:00Z"] {
            assert_eq!(origin(&[(TRIGGER_TIME, text), (TRACEPARENT, text)]), Origin::default(), "{text}");
        }
        assert_eq!(Origin::of(&ObjectMeta::default()), Origin::default());
    }
}
