//! Reports of changes for the admin API: plain values, durations from the change's receipt.

use switchtower_admin_api::{ChangeReport, NodeReport, RefusalReport};

use super::{Change, Milestone, NodeAck, Record, Tracker, UnixNanoseconds};

/// Maximum number of waiting nodes that a report names.
const WAITING: usize = 16;

impl Tracker {
    /// The remembered changes that `wanted` accepts, the latest first, at most `limit`.
    pub fn reports(&self, limit: usize, wanted: impl Fn(&Change) -> bool) -> Vec<ChangeReport> {
        let changes = self
            .records()
            .flat_map(|record| record.publication.changes.iter().rev().map(move |change| (record, change)));
        changes
            .filter(|(_, change)| wanted(change))
            .take(limit)
            .map(|(record, change)| self.report(record, change))
            .collect()
    }

    fn report(&self, record: &Record, change: &Change) -> ChangeReport {
        let since = |at: UnixNanoseconds| at.saturating_sub(change.received) / 1_000;
        let reached = |milestone| record.reached(milestone).map(since);
        let mut waiting: Vec<String> = self.waiting(record).map(ToString::to_string).collect();
        waiting.sort_unstable();
        waiting.truncate(WAITING);
        let service = change.service.as_ref();
        ChangeReport {
            // Set where it is reported.
            replica: String::new(),
            change: change.id,
            trace_id: format!("{:032x}", change.trace.trace),
            object: change.object.to_string(),
            service: service.map_or_else(String::new, |key| format!("{}/{}", key.namespace, key.name)),
            revision: record.revision,
            received_unix_nanoseconds: change.received,
            triggered_unix_nanoseconds: change.triggered,
            compiled_together: record.publication.total,
            compiling: since(record.publication.compiling),
            published: since(record.publication.published),
            half: reached(Milestone::Half),
            most: reached(Milestone::Most),
            all: reached(Milestone::All),
            eligible: record.eligible,
            acknowledged: record.acknowledged,
            excluded: record.excluded,
            given_up: record.given_up,
            outstanding: record.outstanding(),
            waiting,
            slowest: record.slowest.iter().rev().map(|ack| node_report(ack, change.received)).collect(),
            refusals: record
                .refusals
                .iter()
                .map(|refusal| RefusalReport {
                    node: refusal.node.to_string(),
                    after: since(refusal.at),
                    reason: refusal.reason.to_owned(),
                })
                .collect(),
        }
    }
}

fn node_report(ack: &NodeAck, received: UnixNanoseconds) -> NodeReport {
    let since = |at: UnixNanoseconds| at.saturating_sub(received) / 1_000;
    let delivery = ack.delivery.as_ref();
    NodeReport {
        node: ack.node.to_string(),
        after: since(ack.at),
        sending: delivery.map(|delivery| since(delivery.started)),
        round_trip: delivery.map(|delivery| delivery.acknowledged.saturating_sub(delivery.sent) / 1_000),
        plan: delivery.map(|delivery| delivery.plan),
        commit: delivery.map(|delivery| delivery.commit),
        generation: delivery.map(|delivery| delivery.generation),
    }
}
