//! A change and what became of it, for people and programs: plain values, durations from the change's receipt.

use serde::{Deserialize, Serialize};

use super::{Change, Milestone, NodeAck, Record, Tracker, UnixNanoseconds};

/// Names of waiting nodes that a report lists.
const WAITING: usize = 16;

/// One change. Durations are in microseconds since it was received, on the controller's clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ChangeReport {
    /// Its number in this controller process.
    pub change: u64,
    /// Its trace, 32 hexadecimal digits.
    pub trace_id: String,
    /// "EndpointSlice default/web-x7".
    pub object: String,
    /// "namespace/name" of the Service that it concerns; empty where the object does not tell.
    pub service: String,
    /// The layers' revision that contains it.
    pub revision: u64,
    /// When the watch delivered it, in nanoseconds since 1970.
    pub received_unix_nanoseconds: u64,
    /// When the cluster says that it began, in nanoseconds since 1970 on another clock.
    pub triggered_unix_nanoseconds: Option<u64>,
    /// How many changes were compiled together with it, itself included.
    pub compiled_together: u32,
    /// Its compile began.
    pub compiling: u64,
    /// The streams were woken.
    pub published: u64,
    /// Half of the nodes held it; like the next two absent until then, or if there were no nodes.
    pub half: Option<u64>,
    /// 99 percent of the nodes held it.
    pub most: Option<u64>,
    /// All nodes held it.
    pub all: Option<u64>,
    /// Nodes that it concerned and whose agents were connected.
    pub eligible: u32,
    /// Nodes that hold it.
    pub acknowledged: u32,
    /// Nodes whose stream ended before.
    pub excluded: u32,
    /// Nodes that were not waited for any longer.
    pub given_up: u32,
    /// Nodes that have yet to acknowledge it.
    pub outstanding: u32,
    /// The first of them by name.
    pub waiting: Vec<String>,
    /// The nodes that held it last, the last one first.
    pub slowest: Vec<NodeReport>,
    /// Updates with it that nodes refused.
    pub refusals: Vec<RefusalReport>,
}

/// One node's part. Stages are absent if the node needed no update.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeReport {
    /// The node.
    pub node: String,
    /// When it held the change, in microseconds since its receipt.
    pub after: u64,
    /// When the update began to be sent, in microseconds since the receipt. It is 0 if the update was under way
    /// before.
    pub sending: Option<u64>,
    /// From the end of sending to the acknowledgement, in microseconds.
    pub round_trip: Option<u64>,
    /// The agent's planning, in microseconds.
    pub plan: Option<u64>,
    /// The kernel's transaction, in microseconds.
    pub commit: Option<u64>,
    /// The node's generation.
    pub generation: Option<u64>,
}

/// A refused update.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RefusalReport {
    /// The node.
    pub node: String,
    /// When, in microseconds since the change was received.
    pub after: u64,
    /// One CamelCase word.
    pub reason: String,
}

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
