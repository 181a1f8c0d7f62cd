//! Check that nodes recognize their own pods: the fleet knows endpoints, Nodes and settings, no single node does.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use switchtower_core::compiled::{Problem, ProblemObject, ProblemReason};
use switchtower_core::locality::{Detection, Localities, Locality, PodChange};
use switchtower_core::wire;
use switchtower_proto::v1::NodeRecord;

use super::{Fleet, Nodes};
use crate::status::News;
use crate::sync::lock;

/// Inputs of local detection in addition to the settings.
#[derive(Debug, Default)]
pub(super) struct NodeFacts {
    addresses: Vec<IpAddr>,
    pod_cidrs: Vec<IpNet>,
}

impl From<&NodeRecord> for NodeFacts {
    fn from(record: &NodeRecord) -> Self {
        Self {
            addresses: record.addresses.iter().filter_map(|octets| wire::address(octets)).collect(),
            pod_cidrs: record.pod_cidrs.iter().filter_map(wire::net).collect(),
        }
    }
}

impl Fleet {
    /// Records ready endpoints that appeared or disappeared.
    pub fn pods_changed(&self, changes: &[PodChange]) {
        if changes.is_empty() {
            return;
        }
        let mut nodes = lock(&self.nodes);
        for change in changes {
            self.note(&mut nodes, &change.node, |localities| localities.change(change));
        }
    }

    /// Updates local detection after a change of a Node's record or settings.
    pub(super) fn detection_changed(&self, nodes: &mut Nodes, name: &Arc<str>) {
        let Some(node) = nodes.nodes.get(name) else { return };
        let Some(subscription) = &node.subscription else { return };
        let settings = nodes.settings.get(&subscription.settings).unwrap_or(&self.builtin_settings);
        let detection = Detection::of(settings, &node.facts.pod_cidrs);
        let own = node.facts.addresses.clone();
        self.note(nodes, name, |localities| localities.set(name, &own, detection));
    }

    fn note(&self, nodes: &mut Nodes, name: &Arc<str>, change: impl FnOnce(&mut Localities) -> bool) {
        let missed = |nodes: &Nodes| nodes.localities.missed(name) > 0;
        let before = missed(nodes);
        if !change(&mut nodes.localities) {
            return;
        }
        let after = missed(nodes);
        if !before
            && after
            && let Some(locality) = nodes.localities.of(name)
        {
            (self.problems)(problem(name, &locality));
        }
        let news = if before == after { News::Progress } else { News::Transition };
        self.mark(nodes, name, news);
    }
}

fn problem(node: &str, locality: &Locality) -> Problem {
    let object = ProblemObject::Node(node.to_owned());
    Problem { object, reason: ProblemReason::PodsOutside, message: locality.missed_message() }
}
