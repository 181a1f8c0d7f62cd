//! Names of spans, events and attributes. `k8s.service.name` is OpenTelemetry's semantic convention; there
//! `k8s.namespace.name` is a pod's, so a Service's namespace has a key of ours.

/// Spans that agents emit, too.
pub(super) use switchtower_telemetry::names::{
    APPLY, COMMIT, GENERATION, MODE, NODE, OPERATIONS, PLAN, REASON,
};

/// From receipt to the last acknowledgement; the root.
pub(super) const CHANGE: &str = "switchtower.change";
/// From the watch to the compiler.
pub(super) const INGEST: &str = "switchtower.ingest";
/// Changes that arrived together become a revision of the layers.
pub(super) const COMPILE: &str = "switchtower.compile";
/// All nodes.
pub(super) const DISTRIBUTE: &str = "switchtower.distribute";
/// One node: from the first byte to the acknowledgement.
pub(super) const SEND: &str = "switchtower.send";

/// A query of the drain gate.
pub(super) const DRAIN: &str = "switchtower.drain";

/// Event: start of the change according to the cluster.
pub(super) const TRIGGERED: &str = "switchtower.triggered";
/// Event: the connection has the whole update.
pub(super) const SENT: &str = "switchtower.sent";
/// Event: a node refused an update.
pub(super) const REFUSED: &str = "switchtower.refused";

/// "EndpointSlice default/web-x7".
pub(super) const OBJECT: &str = "switchtower.object";
/// The Service's name.
pub(super) const SERVICE: &str = "k8s.service.name";
/// The Service's namespace.
pub(super) const SERVICE_NAMESPACE: &str = "switchtower.service.namespace";
/// Number of the change in its controller process.
pub(super) const CHANGE_ID: &str = "switchtower.change.id";
/// Revision of the layers.
pub(super) const REVISION: &str = "switchtower.revision";
/// Changes that were compiled together.
pub(super) const TOGETHER: &str = "switchtower.changes.together";
/// Start of the change according to the cluster, RFC 3339.
pub(super) const TRIGGER_TIME: &str = "switchtower.trigger_time";
/// Nodes that a change concerns.
pub(super) const ELIGIBLE: &str = "switchtower.nodes.eligible";
/// Those that hold it.
pub(super) const ACKNOWLEDGED: &str = "switchtower.nodes.acknowledged";
/// Those that left before.
pub(super) const EXCLUDED: &str = "switchtower.nodes.excluded";
/// Those that have yet to acknowledge it.
pub(super) const OUTSTANDING: &str = "switchtower.nodes.outstanding";
/// On a link: the trace with the update that carried this change.
pub(super) const CARRIED_BY: &str = "switchtower.carried_by";
/// Payload bytes.
pub(super) const BYTES: &str = "switchtower.message.bytes";
/// From publication to the first byte, in milliseconds.
pub(super) const QUEUE: &str = "switchtower.queue.ms";
/// Address of a pod at the drain gate.
pub(super) const ENDPOINT: &str = "switchtower.drain.address";
/// Name of a host-network pod at the drain gate.
pub(super) const POD: &str = "k8s.pod.name";
/// Namespace of a host-network pod at the drain gate.
pub(super) const NAMESPACE: &str = "k8s.namespace.name";
/// Verdict of the drain gate.
pub(super) const VERDICT: &str = "switchtower.drain.verdict";
/// The first node that a query waited for.
pub(super) const WAITED_FOR: &str = "switchtower.drain.waited_for";
/// Number of nodes that a query did not wait for.
pub(super) const MISSING: &str = "switchtower.nodes.missing";
