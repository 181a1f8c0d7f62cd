//! Problems that agents report: health checks of their own node, and held removals, at a limited rate.

use std::sync::Arc;
use std::time::Duration;

use switchtower_core::compiled::{Problem, ProblemObject, ProblemReason};
use switchtower_core::model::ObjectKey;
use switchtower_proto::v1::HealthCheckFailure;
use tokio::time::Instant;

use super::Fleet;
use crate::sync::lock;
use crate::text::sanitized;

/// Maximum number of problems per node and minute.
pub(super) const MAX_PER_MINUTE: u32 = 16;
const MINUTE: Duration = Duration::from_secs(60);

/// Number of problems that a node reported in the current minute, and the start of that minute.
#[derive(Debug, Default)]
pub(super) struct ReportLimit(Option<(Instant, u32)>);

impl ReportLimit {
    /// Counts a problem. Returns false if the node has reported too many.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let (_, count) = match &mut self.0 {
            Some(window) if now.duration_since(window.0) < MINUTE => window,
            window => window.insert((now, 0)),
        };
        *count += 1;
        *count <= MAX_PER_MINUTE
    }
}

impl Fleet {
    /// Reports removals that a node's delete budget holds as a problem of the Node.
    pub(crate) fn report_held(&self, node: &Arc<str>, held: u32) {
        let mut nodes = lock(&self.nodes);
        if !nodes.nodes.get_mut(node).is_some_and(|entry| entry.report_limit.take(Instant::now())) {
            return;
        }
        drop(nodes);
        (self.problems)(Problem {
            object: ProblemObject::Node(node.to_string()),
            reason: ProblemReason::DeletionsHeld,
            message: format!(
                "the delete budget keeps {held} pools and frontends that an update removed; if that is intended, run \
                 kubectl switchtower release-held {node}"
            ),
        });
    }

    /// Reports health checks that a node cannot listen on as problems of their Services.
    pub(crate) fn report_health_check_failures(&self, node: &Arc<str>, failures: &[HealthCheckFailure]) {
        for HealthCheckFailure { key, address, error } in failures.iter().take(MAX_PER_MINUTE as usize) {
            let Some(key) = key else { continue };
            if !self.read(|layers| layers.has_health_check(key)) {
                continue;
            }
            let mut nodes = lock(&self.nodes);
            if !nodes.nodes.get_mut(node).is_some_and(|entry| entry.report_limit.take(Instant::now())) {
                return;
            }
            drop(nodes);
            let object =
                ObjectKey { namespace: key.namespace.as_str().into(), name: key.name.as_str().into() };
            (self.problems)(Problem {
                object: ProblemObject::Service(object),
                reason: ProblemReason::FailedToStartServiceHealthcheck,
                message: format!(
                    "node {node} cannot listen on {} for the health check node port: {}; it retries every five \
                     seconds",
                    sanitized(address),
                    sanitized(error)
                ),
            });
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Mutex;

    use switchtower_core::compiled::Compiled;
    use switchtower_core::model::LayerId;
    use switchtower_core::propagation::Publication;
    use switchtower_proto::v1::change::Change as Op;
    use switchtower_proto::v1::{Change, HealthCheck, HealthCheckKey, NodeRecord, Source};

    use super::*;
    use crate::fleet::Parts;

    fn failure(name: &str) -> HealthCheckFailure {
        let key = HealthCheckKey { namespace: "default".into(), name: name.into() };
        HealthCheckFailure { key: Some(key), address: "[::]:30000".into(), error: "in\u{1b}[2Juse".into() }
    }

    pub(crate) fn fleet() -> (Arc<Fleet>, Arc<Mutex<Vec<Problem>>>) {
        let problems = Arc::new(Mutex::new(Vec::new()));
        let sink = problems.clone();
        let fleet = Fleet::new(Parts {
            problems: Arc::new(move |problem| sink.lock().unwrap().push(problem)),
            ..Parts::for_tests()
        });
        let check = HealthCheck { key: failure("web").key, port: 30_000, ready_ipv4: 0, ready_ipv6: 0 };
        let ops =
            [Op::Node(NodeRecord { name: "n1".into(), ..NodeRecord::default() }), Op::HealthCheck(check)];
        let layers = [LayerId::Node("n1".into()), LayerId::HealthChecks];
        let changes = layers.into_iter().zip(ops.map(|op| vec![Change { change: Some(op) }])).collect();
        fleet.publish(Compiled { changes, ..Compiled::default() }, Publication::default(), Source::default());
        (fleet, problems)
    }

    #[tokio::test(start_paused = true)]
    async fn health_check_reports_are_limited_to_own_node_and_rate() {
        let (fleet, problems) = fleet();
        let reported = || std::mem::take(&mut *problems.lock().unwrap());
        fleet.report_health_check_failures(&"n1".into(), &[failure("other"), failure("web")]);
        let first = reported();
        assert_eq!(first.len(), 1, "reported a health check that no Service has");
        assert!(!first[0].message.contains('\u{1b}'), "{:?}", first[0].message);
        fleet.report_health_check_failures(&"n2".into(), &[failure("web")]);
        assert_eq!(reported().len(), 0, "no such node");
        for _ in 0..100 {
            fleet.report_health_check_failures(&"n1".into(), &[failure("web")]);
        }
        assert_eq!(reported().len(), MAX_PER_MINUTE as usize - 1);
        tokio::time::advance(MINUTE).await;
        fleet.report_health_check_failures(&"n1".into(), &[failure("web")]);
        assert_eq!(reported().len(), 1);
    }
}
