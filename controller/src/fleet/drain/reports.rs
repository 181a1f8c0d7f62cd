//! Reports about queries of the drain gate: an Event on the pod if the gate gave up, and a span in the trace of the change
//! that removed the pod.

use std::sync::Arc;
use std::time::SystemTime;

use switchtower_core::compiled::{PodIdentity, Problem, ProblemObject, ProblemReason};
use switchtower_core::drain::Names;
use switchtower_core::propagation::DrainRecord;
use switchtower_proto::v1::DrainVerdict;
use tokio::time::Instant;

use super::super::Fleet;
use super::Drained;
use crate::propagation::unix_nanoseconds;
use crate::sync::lock;

impl Fleet {
    /// Reports the outcome of a query from the agent of `node`. The number of Events of a node is limited.
    pub(crate) fn report_drain(&self, node: &Arc<str>, pod: PodIdentity, drained: &Drained) {
        if let Some(removal) = &drained.answer.removal {
            let ended = SystemTime::now();
            let record = DrainRecord {
                node: node.clone(),
                pod: pod.clone(),
                verdict: drained.verdict_name(),
                started: unix_nanoseconds(ended.checked_sub(drained.took).unwrap_or(ended)),
                ended: unix_nanoseconds(ended),
                waited_for: drained.answer.waited_for.clone(),
                missing: drained.answer.missing.clone(),
            };
            self.propagation.drained(removal, record);
        }
        let (reason, message) = match drained.verdict() {
            DrainVerdict::Drained | DrainVerdict::NotAnEndpoint => return,
            DrainVerdict::LastEndpoint => (ProblemReason::DrainGateLastEndpoint, last_endpoint(drained)),
            DrainVerdict::TimedOut | DrainVerdict::Overloaded | DrainVerdict::Unspecified => {
                (ProblemReason::DrainGateTimedOut, timed_out(drained))
            }
        };
        let mut nodes = lock(&self.nodes);
        if !nodes.nodes.get_mut(node).is_some_and(|entry| entry.report_limit.take(Instant::now())) {
            return;
        }
        drop(nodes);
        let object = ProblemObject::Pod { node: node.clone(), pod };
        (self.problems)(Problem { object, reason, message });
    }
}

fn last_endpoint(drained: &Drained) -> String {
    format!(
        "The drain gate waited {:.1} s and gave up: a Service has only terminating endpoints and still sends new connections \
         to the pod. Keep a ready replacement before pods terminate, or increase the timeout of the hook.",
        drained.took.as_secs_f64()
    )
}

fn timed_out(drained: &Drained) -> String {
    let waited_for = &drained.answer.waited_for;
    let cause = match drained.verdict() {
        DrainVerdict::Overloaded => "too many pods of the cluster wait at once".to_owned(),
        _ if waited_for.total == 0 => "the pod is still a ready endpoint of a Service".to_owned(),
        _ if waited_for.total == 1 => {
            format!("node {} has not acknowledged the removal of the pod", list(waited_for))
        }
        _ => {
            let (nodes, names) = (waited_for.total, list(waited_for));
            format!("{nodes} nodes have not acknowledged the removal of the pod: {names}")
        }
    };
    let seconds = drained.took.as_secs_f64();
    format!(
        "The drain gate waited {seconds:.1} s and gave up: {cause}. The pod may receive new connections while it terminates."
    )
}

fn list(names: &Names) -> String {
    let more = names.total - names.names.len();
    let mut text = names.to_strings().join(", ");
    if more > 0 {
        text.push_str(&format!(" and {more} more"));
    }
    text
}
