//! Names of spans and attributes, shared by the controller and the agent. `k8s.node.name` and
//! `error.type` are OpenTelemetry's semantic conventions.

/// A node's part of a change: from its first message until the kernel holds it.
pub const APPLY: &str = "switchtower.apply";
/// Planning of the kernel transaction.
pub const PLAN: &str = "switchtower.plan";
/// The kernel's transaction.
pub const COMMIT: &str = "switchtower.nft.commit";

/// The node.
pub const NODE: &str = "k8s.node.name";
/// The node's generation.
pub const GENERATION: &str = "switchtower.generation";
/// Kind of update: `delta`, or `full` if everything was compared with the kernel or, in the controller's spans, whole
/// layers were replaced. The metric `switchtower_apply_seconds` has the same values.
pub const MODE: &str = "switchtower.apply.mode";
/// Operations in the kernel's transaction.
pub const OPERATIONS: &str = "switchtower.nft.ops";
/// Reason of a failure or rejection.
pub const REASON: &str = "error.type";
