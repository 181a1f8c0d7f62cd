//! Names of spans and attributes that the controller or the agent may tell, whichever exports. `k8s.node.name` and
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
/// How it was applied: `delta`, or `full`: everything was compared with the kernel, or, where the controller tells it,
/// whole layers were replaced. The metric `switchtower_apply_seconds` has the same words.
pub const MODE: &str = "switchtower.apply.mode";
/// Operations in the kernel's transaction.
pub const OPERATIONS: &str = "switchtower.nft.ops";
/// Reason of a failure or rejection.
pub const REASON: &str = "error.type";
