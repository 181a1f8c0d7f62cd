//! The next action of a migration, from the observed state. Pure.
//!
//! The label [`LABEL`] of a Node is the place of the node: absent (kube-proxy serves it), `both`, `switchtower`, or
//! `kube-proxy` after its return. Every action is derived from labels, rows, Pods and Jobs, so that a command continues
//! after an interruption at any point.
//!
//! Invariant: a node always has a proxy with effect. kube-proxy leaves a node only after the node's rules passed their
//! trial, and the rules lose their effect only after kube-proxy's rules are present again.

use serde::Serialize;
use switchtower_admin_api::NodeState;

/// Label of Nodes with the place of the node.
pub(super) const LABEL: &str = "switchtower.dev/proxy";
/// Values of the label, see [`Place`].
pub(super) const BOTH: &str = "both";
pub(super) const SWITCHTOWER: &str = "switchtower";
pub(super) const KUBE_PROXY: &str = "kube-proxy";
/// Profile with mode Active for nodes that move.
pub(super) const ACTIVE_PROFILE: &str = "kube-proxy-migration";
/// Profile with mode Shadow for nodes that return.
pub(super) const SHADOW_PROFILE: &str = "kube-proxy-return";

/// Place of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Place {
    /// kube-proxy serves the node, and the migration has not touched it.
    Untouched,
    /// Both proxies serve the node; Switchtower's rules precede.
    Both,
    /// Only Switchtower serves the node, or kube-proxy is leaving.
    Switchtower,
    /// The node returned to kube-proxy.
    KubeProxy,
}

impl Place {
    /// Parses the value of the label.
    pub(super) fn of(label: Option<&str>) -> Self {
        match label {
            Some(BOTH) => Self::Both,
            Some(SWITCHTOWER) => Self::Switchtower,
            Some(KUBE_PROXY) => Self::KubeProxy,
            _ => Self::Untouched,
        }
    }

    /// The inverse of [`Place::of`].
    pub(super) fn label(self) -> Option<&'static str> {
        match self {
            Self::Untouched => None,
            Self::Both => Some(BOTH),
            Self::Switchtower => Some(SWITCHTOWER),
            Self::KubeProxy => Some(KUBE_PROXY),
        }
    }
}

/// kube-proxy's Pod on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Presence {
    Absent,
    NotReady,
    Ready,
}

/// The Job that removes kube-proxy's rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Cleanup {
    Absent,
    Running,
    /// Also after the migration is finished and the Jobs are deleted.
    Complete,
    Failed,
}

/// Observed state of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct NodeView {
    pub(super) name: String,
    pub(super) place: Place,
    /// State in the row; `None`: no row.
    #[serde(serialize_with = "state_name")]
    pub(super) state: Option<NodeState>,
    /// Name of the profile in force.
    pub(super) profile: String,
    /// The node has rules of kube-proxy, according to the row in mode Active.
    pub(super) kube_proxy_rules: bool,
    pub(super) kube_proxy: Presence,
    pub(super) cleanup: Cleanup,
}

fn state_name<S: serde::Serializer>(state: &Option<NodeState>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(state.map_or("Missing", NodeState::as_str))
}

impl NodeView {
    /// The node's rules are in force and current.
    pub(super) fn is_active(&self) -> bool {
        let active =
            [NodeState::Synced, NodeState::NotExclusive, NodeState::PodsNotLocal, NodeState::Drifted];
        self.state.is_some_and(|state| active.contains(&state))
    }

    fn is_reachable(&self) -> bool {
        let away = [NodeState::Absent, NodeState::Stale, NodeState::Unknown];
        self.state.is_some_and(|state| !away.contains(&state))
    }

    /// Returns whether only Switchtower serves the node, and kube-proxy's rules were removed.
    pub(super) fn has_moved(&self) -> bool {
        self.place == Place::Switchtower
            && self.is_active()
            && self.kube_proxy == Presence::Absent
            && self.cleanup == Cleanup::Complete
            && !self.kube_proxy_rules
    }

    /// Returns whether the node is served by Switchtower although it has no label: it joined after the migration.
    fn joined_later(&self) -> bool {
        self.place == Place::Untouched && self.profile == ACTIVE_PROFILE
    }

    /// Returns whether only kube-proxy serves the node.
    pub(super) fn has_returned(&self) -> bool {
        match self.place {
            Place::Untouched => !self.joined_later(),
            Place::KubeProxy => self.state == Some(NodeState::Shadow),
            Place::Both | Place::Switchtower => false,
        }
    }
}

/// The latest rollout of a profile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Rollout {
    /// In progress, or not started yet.
    Running,
    /// Complete, or there is none.
    Over,
    /// Failed or aborted, with the message.
    Failed(String),
}

/// The next action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    /// Label the nodes `both` and roll out mode Active to them.
    Activate(Vec<String>),
    /// Label the node `switchtower`: kube-proxy leaves it.
    Detach(String),
    /// Remove kube-proxy's rules from the node.
    CleanUp(String),
    /// Label the node `both`: kube-proxy returns to it.
    Attach(Vec<String>),
    /// Label the nodes `kube-proxy` and roll out mode Shadow to them.
    Deactivate(Vec<String>),
    /// Wait for this.
    Wait(String),
    /// An operator must act.
    Stuck(String),
    /// Nothing is left, except for these unreachable nodes.
    Finished(Vec<String>),
}

/// Returns the next action on the way to Switchtower. At most `batch` nodes are on the way at a time. `tried`: this command
/// started a rollout for the nodes that are on the way.
pub(super) fn forward(nodes: &[NodeView], rollout: &Rollout, batch: usize, tried: bool) -> Action {
    let moving = |node: &&NodeView| match node.place {
        Place::Both => true,
        Place::Switchtower => !node.has_moved(),
        Place::Untouched | Place::KubeProxy => false,
    };
    let under_way: Vec<&NodeView> = nodes.iter().filter(moving).collect();
    let mut waiting = None;
    let mut inactive = Vec::new();
    for node in &under_way {
        match leave(node, rollout) {
            Action::Wait(reason) => drop(waiting.get_or_insert(reason)),
            Action::Activate(names) => inactive.extend(names),
            action => return action,
        }
    }
    if !inactive.is_empty() {
        return match rollout {
            Rollout::Running => Action::Wait(format!("{} to translate connections", inactive.join(", "))),
            Rollout::Failed(message) if tried => Action::Stuck(format!(
                "the rollout to {} failed: {message}. kube-proxy still serves these nodes",
                inactive.join(", ")
            )),
            Rollout::Over if tried => Action::Wait(format!("the rows of {}", inactive.join(", "))),
            Rollout::Over | Rollout::Failed(_) => Action::Activate(inactive),
        };
    }
    if let Some(reason) = waiting {
        return Action::Wait(reason);
    }
    let candidate = |node: &&NodeView| matches!(node.place, Place::Untouched | Place::KubeProxy);
    let (next, away): (Vec<&NodeView>, Vec<&NodeView>) =
        nodes.iter().filter(candidate).partition(|node| node.is_reachable());
    if next.is_empty() {
        return Action::Finished(away.iter().map(|node| node.name.clone()).collect());
    }
    Action::Activate(next.iter().take(batch).map(|node| node.name.clone()).collect())
}

/// Returns the action for a node that is moving to Switchtower.
fn leave(node: &NodeView, rollout: &Rollout) -> Action {
    let name = node.name.clone();
    if node.place == Place::Both {
        return if node.is_active() && node.profile == ACTIVE_PROFILE && *rollout != Rollout::Running {
            Action::Detach(name)
        } else {
            Action::Activate(vec![name])
        };
    }
    if node.kube_proxy != Presence::Absent {
        return Action::Wait(format!("kube-proxy's Pod on {name} to stop"));
    }
    if !node.is_active() {
        let state = node.state.map_or("no row", NodeState::as_str);
        return Action::Wait(format!("the row of {name} to be ready (now {state})"));
    }
    match node.cleanup {
        Cleanup::Absent => Action::CleanUp(name),
        Cleanup::Running => Action::Wait(format!("the removal of kube-proxy's rules on {name}")),
        Cleanup::Complete => {
            Action::Wait(format!("the agent on {name} to report that kube-proxy's rules are gone"))
        }
        Cleanup::Failed => Action::Stuck(format!(
            "the Job that removes kube-proxy's rules on {name} failed; read its log, delete it and continue"
        )),
    }
}

/// Returns the next action on the way back to kube-proxy. `tried`: this command started a rollout for the nodes that are on
/// the way.
pub(super) fn back(nodes: &[NodeView], rollout: &Rollout, batch: usize, tried: bool) -> Action {
    let mut returning = Vec::new();
    for node in nodes.iter().filter(|node| node.place == Place::Both) {
        if node.kube_proxy != Presence::Ready {
            return Action::Wait(format!("kube-proxy's Pod on {} to be ready", node.name));
        }
        if node.is_active() && !node.kube_proxy_rules {
            return Action::Wait(format!("kube-proxy's rules on {}", node.name));
        }
        returning.push(node.name.clone());
    }
    if !returning.is_empty() {
        return Action::Deactivate(returning);
    }
    let late = |node: &&NodeView| node.place == Place::KubeProxy && !node.has_returned();
    let late: Vec<String> = nodes.iter().filter(late).map(|node| node.name.clone()).collect();
    if !late.is_empty() {
        let names = late.join(", ");
        return match rollout {
            Rollout::Failed(message) if tried => Action::Stuck(format!(
                "the rollout of mode Shadow to {names} failed: {message}. Both proxies serve these nodes"
            )),
            Rollout::Running => Action::Wait(format!("{names} to return to mode Shadow")),
            _ if tried => Action::Wait(format!("the rows of {names}")),
            _ => Action::Deactivate(late),
        };
    }
    // A new revision or the deletion of the profile would end the rollout and revert its nodes to mode Active.
    if *rollout == Rollout::Running {
        return Action::Wait("the rollout of mode Shadow to end".to_owned());
    }
    let moved = |node: &&NodeView| node.place == Place::Switchtower || node.joined_later();
    let next: Vec<&NodeView> = nodes.iter().filter(moved).take(batch).collect();
    // It would remove the rules of the returning kube-proxy.
    if let Some(node) = next.iter().find(|node| node.cleanup == Cleanup::Running) {
        return Action::Wait(format!("the removal of kube-proxy's rules on {} to end", node.name));
    }
    let next: Vec<String> = next.into_iter().map(|node| node.name.clone()).collect();
    if next.is_empty() { Action::Finished(Vec::new()) } else { Action::Attach(next) }
}

#[cfg(test)]
mod tests;
