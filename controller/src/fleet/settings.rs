//! Revisions of settings: one layer each, and their assignment to nodes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use switchtower_core::layer::Layers;
use switchtower_core::model::LayerId;
use switchtower_core::propagation::{Change as FollowedChange, Publication, TraceContext};
use switchtower_proto::v1::change::Change as Op;
use switchtower_proto::v1::{Change, ConntrackSettings, LocalDetection, ProxyMode, Settings};
use switchtower_proto::{DRAIN_GATE, SHADOW_MODE};

use super::{Fleet, Nodes};
use crate::propagation::{new_trace, unix_nanoseconds};
use crate::status::{News, Observation};
use crate::sync::lock;

/// Profile and revision of settings.
pub type SettingsName = (Arc<str>, u64);

/// Assignment of settings to a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettingsAssignment {
    /// The node.
    pub node: Arc<str>,
    /// Its settings.
    pub settings: SettingsName,
    /// Trace of the assignment; `None` starts a new one.
    pub trace: Option<u128>,
}

/// Default built-in settings: used without a ProxyProfile and without settings adopted from kube-proxy
/// ([`crate::builtin`]).
#[must_use]
pub fn builtin_settings() -> Settings {
    Settings {
        profile: "builtin".to_owned(),
        revision: 0,
        local_detection: LocalDetection::NodeCidr as i32,
        masquerade_mark: 0x4000,
        conntrack: Some(ConntrackSettings {
            max_per_core: 32_768,
            min: 131_072,
            tcp_established_timeout_seconds: 86_400,
            tcp_close_wait_timeout_seconds: 3_600,
            ..ConntrackSettings::default()
        }),
        ..Settings::default()
    }
}

/// Returns the change that sets the content of a revision's layer.
pub(super) fn change(settings: Settings) -> Change {
    Change { change: Some(Op::Settings(settings)) }
}

/// Describes an assignment as a change. Such changes are rare and have a large effect, so their traces are always
/// kept.
fn change_of((profile, revision): &SettingsName, trace: Option<u128>, received: u64) -> FollowedChange {
    let object = if *revision == 0 {
        "built-in settings".to_owned()
    } else {
        format!("ProxyRollout {profile}-{revision}")
    };
    let new = new_trace();
    let trace =
        TraceContext { trace: trace.filter(|trace| *trace != 0).unwrap_or(new.trace), sampled: true, ..new };
    FollowedChange {
        id: 0,
        object: object.into(),
        service: None,
        received,
        triggered: None,
        trace,
        origin: None,
    }
}

impl Fleet {
    /// Sets the available revisions, in addition to the built-in one. A revision that is still assigned to a node is
    /// kept.
    pub fn set_settings(&self, wanted: &BTreeMap<SettingsName, Settings>) {
        let mut nodes = lock(&self.nodes);
        let mut changes = BTreeMap::new();
        for ((profile, revision), settings) in wanted {
            let name = (profile.clone(), *revision);
            if nodes.settings.get(&name) != Some(settings) {
                changes.insert(LayerId::Settings(name.0.clone(), name.1), vec![change(settings.clone())]);
                nodes.settings.insert(name.clone(), settings.clone());
                for node in nodes.having(&name) {
                    self.detection_changed(&mut nodes, &node);
                }
            }
        }
        let unused = |name: &&SettingsName| !wanted.contains_key(*name) && !nodes.has_settings(name);
        let removed: Vec<SettingsName> = nodes.settings.keys().filter(unused).cloned().collect();
        removed.iter().for_each(|name| drop(nodes.settings.remove(name)));
        let removed: Vec<_> =
            removed.into_iter().map(|(profile, revision)| LayerId::Settings(profile, revision)).collect();
        if changes.is_empty() && removed.is_empty() {
            return;
        }
        let source = self.read(Layers::source);
        self.follow_drain_gate(&nodes);
        let applied = self.write(|layers| layers.apply(changes, &removed, Vec::new(), source));
        let woken = nodes.wake(&applied);
        self.mark_all(&mut nodes, &woken.idle, News::Progress);
    }

    /// Returns the features that an agent must have for the settings.
    pub(crate) fn required_features(&self, name: &SettingsName) -> Vec<String> {
        let nodes = lock(&self.nodes);
        let Some(settings) = nodes.settings.get(name) else { return Vec::new() };
        let needed = [
            (settings.drain_gate_port != 0, DRAIN_GATE),
            (settings.mode() == ProxyMode::Shadow, SHADOW_MODE),
        ];
        needed.into_iter().filter(|(needed, _)| *needed).map(|(_, feature)| feature.to_owned()).collect()
    }

    /// Settings of nodes without a profile, and the base of all profiles.
    #[must_use]
    pub fn builtin_settings(&self) -> &Settings {
        &self.builtin_settings
    }

    /// Assigns revisions to nodes, which replace the previous ones with the next update. The Nodes need not exist
    /// yet. A revision that was not set counts as empty: call [`Fleet::set_settings`] first.
    ///
    /// Equal assignments of connected nodes are followed as one change.
    pub fn assign_settings(&self, assignments: impl IntoIterator<Item = SettingsAssignment>) {
        let received = unix_nanoseconds(SystemTime::now());
        let mut nodes = lock(&self.nodes);
        let mut idle = Vec::new();
        let mut together: BTreeMap<(SettingsName, Option<u128>), Vec<Arc<str>>> = BTreeMap::new();
        for SettingsAssignment { node: name, settings, trace } in assignments {
            if nodes.assigned.get(&name) == Some(&settings) {
                continue;
            }
            nodes.assigned.insert(name.clone(), settings.clone());
            let Some(node) = nodes.nodes.get_mut(&name) else { continue };
            if let Some(subscription) = &mut node.subscription {
                subscription.settings = settings.clone();
            }
            self.detection_changed(&mut nodes, &name);
            let Some(node) = nodes.nodes.get(&name) else { continue };
            match &node.signal {
                Some(_) => together.entry((settings, trace)).or_default().push(name),
                None => idle.push(name),
            }
        }
        for ((settings, trace), names) in together {
            self.publish_assignment(&mut nodes, &change_of(&settings, trace, received), &names);
        }
        self.mark_all(&mut nodes, &idle, News::Progress);
    }

    /// Forgets the assignments of names that have neither a Node nor a row any more.
    pub fn forget_settings<'a>(&self, names: impl IntoIterator<Item = &'a Arc<str>>) {
        let mut nodes = lock(&self.nodes);
        for name in names {
            let exists = nodes.nodes.get(name).is_some_and(|node| node.subscription.is_some());
            if !exists {
                nodes.assigned.remove(name);
            }
        }
    }

    #[cfg(test)]
    pub(crate) fn assignments(&self) -> usize {
        lock(&self.nodes).assigned.len()
    }

    /// Publishes a revision of the layers for the assignment, although no layer changes, so that it is followed like
    /// any other change. Wakes the nodes.
    fn publish_assignment(&self, nodes: &mut Nodes, change: &FollowedChange, names: &[Arc<str>]) {
        let source = self.read(Layers::source);
        let applied = self.write(|layers| layers.apply(BTreeMap::new(), &[], Vec::new(), source));
        let mut followed = Vec::new();
        for name in names {
            let Some(node) = nodes.nodes.get_mut(name) else { continue };
            node.assigned_at = applied.revision;
            followed.extend(node.slot);
            if let Some(signal) = &node.signal {
                signal.changed();
            }
        }
        let publication = Publication {
            changes: vec![change.clone()],
            total: 1,
            compiling: change.received,
            published: unix_nanoseconds(SystemTime::now()),
        };
        self.propagation.publish(applied.revision, publication, &followed);
    }

    /// Calls `look` with the observation of each node. The closure must be quick: it blocks the streams.
    pub fn each_observation(&self, mut look: impl FnMut(&Arc<str>, &Observation)) {
        for (name, node) in &lock(&self.nodes).nodes {
            if let Some(observation) = &node.observation {
                look(name, observation);
            }
        }
    }
}
