//! State that the page shows, with a version per change, so that an update contains only what changed. Pure.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::jiff::Timestamp;
use serde::Serialize;
use switchtower_admin_api::ConditionType;
use switchtower_crds::{ProxyRollout, ProxyStatus};

use crate::diagnosis::Diagnosis;

/// A node on the page.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Node {
    name: String,
    state: String,
    ready: bool,
    /// Time of the last transition of the condition Ready.
    since: Option<String>,
    reason: String,
    message: String,
    desired: i64,
    applied: i64,
    agent: String,
    kernel: String,
    profile: String,
    /// Message code of a problem.
    code: Option<&'static str>,
    /// No controller has renewed the row in time.
    outdated: bool,
}

struct Entry<T> {
    value: T,
    version: u64,
}

struct NodeEntry {
    node: Entry<Node>,
    stale_after: Option<Timestamp>,
}

/// Nodes and rollouts. Every visible change increments the version.
#[derive(Default)]
pub(super) struct Model {
    version: u64,
    /// An update from an earlier version must be complete, because objects were removed since.
    removed_at: u64,
    nodes: BTreeMap<String, NodeEntry>,
    rollouts: BTreeMap<String, Entry<ProxyRollout>>,
    problem: Entry<Option<String>>,
}

impl Default for Entry<Option<String>> {
    fn default() -> Self {
        Self { value: None, version: 0 }
    }
}

/// Content of an update.
#[derive(Serialize)]
pub(super) struct Update<'a> {
    version: u64,
    /// The update contains all objects; the page drops all others.
    complete: bool,
    nodes: Vec<&'a Node>,
    rollouts: Vec<&'a ProxyRollout>,
    /// Reason why the page may be out of date.
    problem: Option<&'a str>,
}

impl Model {
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    pub(super) fn apply_row(&mut self, row: &ProxyStatus, now: Timestamp) {
        let node = node(row, now);
        let stale_after =
            row.status.as_ref().and_then(|status| status.stale_after.as_ref()).map(|time| time.0);
        match self.nodes.get_mut(&node.name) {
            Some(known) => {
                // Renewals of an unchanged row are frequent and invisible.
                known.stale_after = stale_after;
                if known.node.value != node {
                    self.version += 1;
                    known.node = Entry { value: node, version: self.version };
                }
            }
            None => {
                self.version += 1;
                let name = node.name.clone();
                let node = Entry { value: node, version: self.version };
                self.nodes.insert(name, NodeEntry { node, stale_after });
            }
        }
    }

    /// Marks rows that were not renewed in time.
    pub(super) fn expire(&mut self, now: Timestamp) {
        for known in self.nodes.values_mut() {
            let outdated = known.stale_after.is_some_and(|limit| limit < now);
            if outdated && !known.node.value.outdated {
                self.version += 1;
                known.node.value.outdated = true;
                known.node.version = self.version;
            }
        }
    }

    pub(super) fn apply_rollout(&mut self, mut rollout: ProxyRollout) {
        rollout.metadata.managed_fields = None;
        let name = rollout.metadata.name.clone().unwrap_or_default();
        if self.rollouts.get(&name).is_none_or(|known| known.value != rollout) {
            self.version += 1;
            self.rollouts.insert(name, Entry { value: rollout, version: self.version });
        }
    }

    pub(super) fn remove_row(&mut self, name: &str) {
        if self.nodes.remove(name).is_some() {
            self.removed();
        }
    }

    pub(super) fn remove_rollout(&mut self, name: &str) {
        if self.rollouts.remove(name).is_some() {
            self.removed();
        }
    }

    /// Keeps only these rows, after a new list.
    pub(super) fn retain_rows(&mut self, names: &BTreeSet<String>) {
        let before = self.nodes.len();
        self.nodes.retain(|name, _| names.contains(name));
        if self.nodes.len() < before {
            self.removed();
        }
    }

    /// Keeps only these rollouts, after a new list.
    pub(super) fn retain_rollouts(&mut self, names: &BTreeSet<String>) {
        let before = self.rollouts.len();
        self.rollouts.retain(|name, _| names.contains(name));
        if self.rollouts.len() < before {
            self.removed();
        }
    }

    fn removed(&mut self) {
        self.version += 1;
        self.removed_at = self.version;
    }

    /// Sets or clears the reason why objects may be out of date.
    pub(super) fn set_problem(&mut self, problem: Option<String>) {
        if self.problem.value != problem {
            self.version += 1;
            self.problem = Entry { value: problem, version: self.version };
        }
    }

    /// Returns the changes since a version; 0 returns everything.
    pub(super) fn since(&self, version: u64) -> Update<'_> {
        // A version of another process may be higher.
        let complete = version == 0 || version < self.removed_at || version > self.version;
        let from = if complete { 0 } else { version };
        let nodes = self.nodes.values().filter(|known| known.node.version > from);
        let rollouts = self.rollouts.values().filter(|known| known.version > from);
        Update {
            version: self.version,
            complete,
            nodes: nodes.map(|known| &known.node.value).collect(),
            rollouts: rollouts.map(|known| &known.value).collect(),
            problem: self.problem.value.as_deref(),
        }
    }
}

fn node(row: &ProxyStatus, now: Timestamp) -> Node {
    let known = Diagnosis::new(row, now);
    let status = row.status.as_ref();
    let ready = status.and_then(|status| {
        status.conditions.iter().find(|known| known.type_ == ConditionType::Ready.as_str())
    });
    let profile = status.and_then(|status| status.profile.as_ref());
    Node {
        since: ready.map(|ready| ready.last_transition_time.0.to_string()),
        profile: profile.map(|profile| profile.revision_name.clone()).unwrap_or_default(),
        code: known.code.map(|code| code.code),
        name: known.node,
        state: known.state,
        ready: known.ready,
        reason: known.reason,
        message: known.message,
        desired: known.desired,
        applied: known.applied,
        agent: known.agent,
        kernel: known.kernel,
        outdated: known.outdated,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn row(name: &str, state: &str, reported: &str) -> ProxyStatus {
        let ready = json!([{"type": "Ready", "status": "True", "reason": state, "message": "",
            "lastTransitionTime": "2026-01-01T00:00:00Z"}]);
        let status = json!({"state": state, "staleAfter": reported, "conditions": ready,
            "generation": {"desired": 2, "sent": 2, "applied": 1}});
        let row = json!({"apiVersion": "switchtower.dev/v1alpha1", "kind": "ProxyStatus",
            "metadata": {"name": name}, "spec": {}, "status": status});
        serde_json::from_value(row).unwrap()
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn names(model: &Model, version: u64) -> Vec<String> {
        model.since(version).nodes.iter().map(|node| format!("{} {}", node.name, node.state)).collect()
    }

    #[test]
    fn updates_contain_only_changes() {
        let now = at("2026-01-01T00:00:00Z");
        let mut model = Model::default();
        model.apply_row(&row("a", "Synced", "2026-01-01T00:01:00Z"), now);
        model.apply_row(&row("b", "Synced", "2026-01-01T00:01:00Z"), now);
        assert_eq!(names(&model, 0), ["a Synced", "b Synced"]);
        let seen = model.version();
        model.apply_row(&row("a", "Synced", "2026-01-01T00:02:00Z"), now);
        assert_eq!(model.version(), seen, "a renewal is no change");
        model.apply_row(&row("b", "Stale", "2026-01-01T00:02:00Z"), now);
        assert_eq!(names(&model, seen), ["b Stale"]);
        assert!(!model.since(seen).complete);
        let value: Value = serde_json::to_value(model.since(seen)).unwrap();
        assert_eq!(
            (&value["nodes"][0]["code"], &value["nodes"][0]["applied"]),
            (&json!("ST0102"), &json!(1))
        );
    }

    #[test]
    fn removals_make_updates_complete() {
        let now = at("2026-01-01T00:00:00Z");
        let mut model = Model::default();
        for name in ["a", "b", "c"] {
            model.apply_row(&row(name, "Synced", "2026-01-01T00:01:00Z"), now);
        }
        let seen = model.version();
        model.remove_row("a");
        model.retain_rows(&BTreeSet::from(["b".to_owned()]));
        assert!(model.since(seen).complete);
        assert_eq!(names(&model, seen), ["b Synced"]);
        assert!(!model.since(model.version()).complete);
        assert!(model.since(model.version() + 1).complete, "a version of an earlier process");
    }

    #[test]
    fn rows_expire_without_an_event() {
        let mut model = Model::default();
        model.apply_row(&row("a", "Synced", "2026-01-01T00:01:00Z"), at("2026-01-01T00:00:00Z"));
        let seen = model.version();
        model.expire(at("2026-01-01T00:00:59Z"));
        assert_eq!(model.version(), seen);
        model.expire(at("2026-01-01T00:01:01Z"));
        assert!(model.since(seen).nodes[0].outdated);
        model.apply_row(&row("a", "Synced", "2026-01-01T00:03:00Z"), at("2026-01-01T00:02:00Z"));
        assert!(!model.since(seen).nodes[0].outdated);
    }

    #[test]
    fn problems_and_rollouts_are_changes() {
        let mut model = Model::default();
        model.set_problem(Some("the API server is away".into()));
        assert_eq!(model.since(0).problem, Some("the API server is away"));
        let seen = model.version();
        model.set_problem(None);
        assert!(model.version() > seen && model.since(seen).problem.is_none());
        let rollout = ProxyRollout::new("r-1", switchtower_crds::ProxyRolloutSpec::default());
        model.apply_rollout(rollout.clone());
        let seen = model.version();
        model.apply_rollout(rollout);
        assert_eq!(model.version(), seen);
        model.retain_rollouts(&BTreeSet::new());
        assert!(model.since(seen).complete && model.since(seen).rollouts.is_empty());
        model.remove_rollout("r-1");
    }
}
