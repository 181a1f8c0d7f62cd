//! Requests to the API server about one row.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, ResourceExt as _};
use serde_json::json;
use switchtower_crds::{ProfileAssignment, ProxyStatus, ProxyStatusSpec, ProxyStatusStatus};
use switchtower_telemetry::{span, spans};
use tracing::Instrument as _;

use crate::errors::is_missing_kind;
use crate::ingest::NodeIdentity;
use crate::watch::Lean;

/// Timeout of a request.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A row in the API server.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub(super) uid: String,
    pub(super) version: String,
    pub(super) generation: Option<i64>,
    pub(super) owner: Option<String>,
    pub(super) assignment: Option<ProfileAssignment>,
    /// Held removals of generations below this are released; 0: none.
    pub(super) release_held_before: u64,
    pub(super) status: Option<ProxyStatusStatus>,
}

impl Stored {
    /// Returns the version as a number; numbers of one resource are comparable (KEP-5504).
    pub(super) fn number(&self) -> Option<u64> {
        self.version.parse().ok()
    }
}

impl From<Lean<ProxyStatus>> for Stored {
    fn from(Lean(object): Lean<ProxyStatus>) -> Self {
        let metadata = object.metadata;
        let owners = metadata.owner_references.unwrap_or_default();
        Self {
            uid: metadata.uid.unwrap_or_default(),
            version: metadata.resource_version.unwrap_or_default(),
            generation: metadata.generation,
            owner: owners.into_iter().find(|owner| owner.kind == "Node").map(|owner| owner.uid),
            assignment: object.spec.profile,
            release_held_before: object
                .spec
                .release_held_before
                .map_or(0, |before| u64::try_from(before).unwrap_or(0)),
            status: object.status,
        }
    }
}

/// A request about one row.
#[derive(Debug, Clone)]
pub(super) enum Request {
    /// Create the row, owned by the Node, with its assignment if there is one.
    Create(NodeIdentity, Option<ProfileAssignment>),
    /// Make the Node that now has the row's name its owner.
    Adopt(NodeIdentity, Stored),
    /// Assign another revision of settings. The request fails if the stored version changed.
    Assign(Arc<str>, Box<Stored>, ProfileAssignment),
    /// Read the row: another client changed its spec.
    Read(Arc<str>),
    /// Write the status. The request fails if the stored version changed.
    Write(Arc<str>, Box<Stored>, Box<ProxyStatusStatus>),
    /// Delete the row: its Node is gone.
    Delete(Arc<str>, Stored),
}

/// Result of a request.
#[derive(Debug)]
pub(super) enum WriteOutcome {
    /// The row, as it is stored now.
    Stored(Box<Stored>),
    /// Another client wrote the row first; the row as it is stored now.
    Conflict(Box<Stored>),
    /// The row does not exist.
    Missing,
    /// The API server refused the request or could not be reached.
    Failed(kube::Error),
}

/// Labels of all outcomes.
pub(super) const OUTCOMES: [&str; 4] = ["ok", "conflict", "missing", "failed"];

impl WriteOutcome {
    /// Returns the label of the metric.
    pub(super) fn label(&self) -> &'static str {
        match self {
            Self::Stored(_) => "ok",
            Self::Conflict(_) => "conflict",
            Self::Missing => "missing",
            Self::Failed(_) => "failed",
        }
    }
}

impl Request {
    pub(super) fn node(&self) -> &Arc<str> {
        match self {
            Self::Create(node, _) | Self::Adopt(node, _) => &node.name,
            Self::Assign(name, ..) | Self::Read(name) | Self::Write(name, ..) | Self::Delete(name, _) => name,
        }
    }

    /// Returns true for reads and for writes of the status; only the leader makes other requests.
    pub(super) fn is_status(&self) -> bool {
        matches!(self, Self::Read(_) | Self::Write(..))
    }

    /// Returns the verb for spans.
    fn verb(&self) -> &'static str {
        match self {
            Self::Create(..) => "create",
            Self::Adopt(..) => "adopt",
            Self::Assign(..) => "assign",
            Self::Read(_) => "read",
            Self::Write(..) => "write",
            Self::Delete(..) => "delete",
        }
    }

    /// Sends the request.
    pub(super) async fn run(self, api: Api<Lean<ProxyStatus>>) -> WriteOutcome {
        let span = span!(
            "switchtower.status.write",
            otel.kind = "client",
            k8s.node.name = &**self.node(),
            switchtower.verb = self.verb(),
            switchtower.outcome = tracing::field::Empty,
        );
        let sent = tokio::time::timeout(TIMEOUT, self.send(&api)).instrument(span.clone()).await;
        let outcome = match sent {
            Ok(outcome) => outcome,
            Err(_) => WriteOutcome::Failed(timed_out()),
        };
        span.record("switchtower.outcome", outcome.label());
        if let WriteOutcome::Failed(error) = &outcome {
            spans::failed(&span, error);
        }
        outcome
    }

    async fn send(self, api: &Api<Lean<ProxyStatus>>) -> WriteOutcome {
        let name = self.node().clone();
        let sent = match self {
            Self::Create(node, profile) => {
                api.create(&PostParams::default(), &Lean(new_row(&node, profile))).await
            }
            Self::Assign(_, stored, assignment) => {
                let patch = json!({
                    "metadata": {"resourceVersion": stored.version},
                    "spec": {"profile": whole(&assignment)}
                });
                api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await
            }
            Self::Read(_) => api.get(&name).await,
            Self::Adopt(node, stored) => {
                let patch = json!({"metadata": {"resourceVersion": stored.version, "ownerReferences": [owner(&node)]}});
                api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await
            }
            Self::Write(_, stored, status) => {
                let object = ProxyStatus {
                    metadata: ObjectMeta {
                        name: Some(name.to_string()),
                        resource_version: Some(stored.version),
                        ..ObjectMeta::default()
                    },
                    spec: ProxyStatusSpec::default(),
                    status: Some(*status),
                };
                api.replace_status(&name, &PostParams::default(), &Lean(object)).await
            }
            Self::Delete(_, stored) => {
                let preconditions = Preconditions { uid: Some(stored.uid), resource_version: None };
                let parameters =
                    DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
                return match api.delete(&name, &parameters).await {
                    Ok(_) => WriteOutcome::Missing,
                    Err(error) => recover(api, &name, error).await,
                };
            }
        };
        match sent {
            Ok(object) => WriteOutcome::Stored(Box::new(object.into())),
            Err(error) => recover(api, &name, error).await,
        }
    }
}

/// Returns the assignment as a merge patch that replaces the stored one. A field that is absent from a merge patch
/// keeps its stored value, so unset fields are `null`.
fn whole(assignment: &ProfileAssignment) -> serde_json::Value {
    let ProfileAssignment { name, revision, assigned_at, trace_id, previous } = assignment;
    json!({
        "name": name, "revision": revision, "assignedAt": assigned_at, "traceID": trace_id, "previous": previous,
    })
}

/// Reads the row again after a conflict. A missing row is no failure.
async fn recover(api: &Api<Lean<ProxyStatus>>, name: &str, error: kube::Error) -> WriteOutcome {
    match &error {
        kube::Error::Api(status) if status.code == 409 => match api.get_opt(name).await {
            Ok(Some(object)) => WriteOutcome::Conflict(Box::new(object.into())),
            Ok(None) => WriteOutcome::Missing,
            Err(error) => WriteOutcome::Failed(error),
        },
        // The message of a missing row names it; that of a missing kind does not.
        kube::Error::Api(status) if status.code == 404 && !is_missing_kind(&error) => WriteOutcome::Missing,
        _ => WriteOutcome::Failed(error),
    }
}

fn timed_out() -> kube::Error {
    let message = format!("no answer within {} seconds", TIMEOUT.as_secs());
    kube::Error::ReadEvents(std::io::Error::new(std::io::ErrorKind::TimedOut, message))
}

/// Lists all rows, in pages.
pub(super) async fn list(api: &Api<Lean<ProxyStatus>>) -> Result<Vec<(Arc<str>, Stored)>, kube::Error> {
    let mut params = ListParams::default().limit(500);
    let mut rows = Vec::new();
    loop {
        let page = match tokio::time::timeout(TIMEOUT, api.list(&params)).await {
            Ok(page) => page?,
            Err(_) => return Err(timed_out()),
        };
        for object in page.items {
            let name: Arc<str> = object.name_any().into();
            rows.push((name, object.into()));
        }
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params.continue_token = Some(token),
            None => return Ok(rows),
        }
    }
}

fn new_row(node: &NodeIdentity, profile: Option<ProfileAssignment>) -> ProxyStatus {
    ProxyStatus {
        metadata: ObjectMeta {
            name: Some(node.name.to_string()),
            owner_references: Some(vec![owner(node)]),
            ..ObjectMeta::default()
        },
        spec: ProxyStatusSpec { profile, release_held_before: None },
        status: None,
    }
}

fn owner(node: &NodeIdentity) -> OwnerReference {
    OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: node.name.to_string(),
        uid: node.uid.to_string(),
        ..OwnerReference::default()
    }
}
