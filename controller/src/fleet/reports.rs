//! What nodes find wrong with Services. An agent speaks of its own node alone: only of health checks that it was given,
//! and not often.

use std::sync::Arc;
use std::time::Duration;

use switchtower_core::compiled::{Problem, ProblemObject, ProblemReason};
use switchtower_core::model::ObjectKey;
use switchtower_proto::v1::HealthCheckFailure;
use tokio::time::Instant;

use super::{Fleet, lock};
use crate::text::sanitized;

/// Most problems of one node in a minute.
const TOLD: u32 = 16;
const MINUTE: Duration = Duration::from_secs(60);

/// How many problems a node told of since when.
#[derive(Debug, Default)]
pub(super) struct Told(Option<(Instant, u32)>);

impl Told {
    fn take(&mut self, now: Instant) -> bool {
        let (_, count) = match &mut self.0 {
            Some(told) if now.duration_since(told.0) < MINUTE => told,
            told => told.insert((now, 0)),
        };
        *count += 1;
        *count <= TOLD
    }
}

impl Fleet {
    /// Health checks that a node cannot listen on, as what is wrong with their Services.
    pub(crate) fn cannot_listen(&self, node: &Arc<str>, failures: &[HealthCheckFailure]) {
        for HealthCheckFailure { key, address, error } in failures.iter().take(TOLD as usize) {
            let Some(key) = key else { continue };
            if !self.read(|layers| layers.has_health_check(node, key)) {
                continue;
            }
            let mut nodes = lock(&self.nodes);
            if !nodes.nodes.get_mut(node).is_some_and(|entry| entry.told.take(Instant::now())) {
                return;
            }
            drop(nodes);
            let object =
                ObjectKey { namespace: key.namespace.as_str().into(), name: key.name.as_str().into() };
            (self.problems)(Problem {
                object: ProblemObject::Service(object),
                reason: ProblemReason::FailedToStartServiceHealthcheck,
                message: format!(
                    "node {node} cannot listen on {} for the health check node port: {}; it tries again every five \
                     seconds",
                    sanitized(address),
                    sanitized(error)
                ),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    use switchtower_core::compiled::Compiled;
    use switchtower_core::model::LayerId;
    use switchtower_core::propagation::{Limits, Publication};
    use switchtower_proto::v1::change::Change as Op;
    use switchtower_proto::v1::{Change, HealthCheck, HealthCheckKey, NodeRecord, Source};

    use super::*;
    use crate::fleet::builtin_settings;
    use crate::fleet::metrics::StreamMetrics;
    use crate::propagation::{Propagation, PropagationMetrics};
    use crate::status::Floors;

    fn failure(name: &str) -> HealthCheckFailure {
        let key = HealthCheckKey { namespace: "default".into(), name: name.into() };
        HealthCheckFailure { key: Some(key), address: "[::]:30000".into(), error: "in\u{1b}[2Juse".into() }
    }

    fn fleet() -> (Arc<Fleet>, Arc<Mutex<Vec<Problem>>>) {
        let registry = prometheus::Registry::new();
        let propagation = Propagation::new(Limits::default(), PropagationMetrics::new(&registry).unwrap());
        let problems = Arc::new(Mutex::new(Vec::new()));
        let sink = problems.clone();
        let fleet = Fleet::new(
            builtin_settings(),
            Floors::default(),
            StreamMetrics::new(&registry).unwrap(),
            Arc::new(|| None),
            Arc::new(propagation),
            Arc::new(move |problem| sink.lock().unwrap().push(problem)),
        );
        let check = HealthCheck { key: failure("web").key, port: 30_000, ready_ipv4: 0, ready_ipv6: 0 };
        let ops =
            [Op::Node(NodeRecord { name: "n1".into(), ..NodeRecord::default() }), Op::HealthCheck(check)];
        let changes = ops.into_iter().map(|op| Change { change: Some(op) }).collect();
        let changes = BTreeMap::from([(LayerId::Node("n1".into()), changes)]);
        fleet.publish(Compiled { changes, ..Compiled::default() }, Publication::default(), Source::default());
        (fleet, problems)
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_speaks_of_its_own_health_checks_and_not_too_often() {
        let (fleet, problems) = fleet();
        let told = || std::mem::take(&mut *problems.lock().unwrap());
        fleet.cannot_listen(&"n1".into(), &[failure("other"), failure("web")]);
        let first = told();
        assert_eq!(first.len(), 1, "another Service is none of its business");
        assert!(!first[0].message.contains('\u{1b}'), "{:?}", first[0].message);
        fleet.cannot_listen(&"n2".into(), &[failure("web")]);
        assert_eq!(told().len(), 0, "no such node");
        for _ in 0..100 {
            fleet.cannot_listen(&"n1".into(), &[failure("web")]);
        }
        assert_eq!(told().len(), TOLD as usize - 1);
        tokio::time::advance(MINUTE).await;
        fleet.cannot_listen(&"n1".into(), &[failure("web")]);
        assert_eq!(told().len(), 1);
    }
}
