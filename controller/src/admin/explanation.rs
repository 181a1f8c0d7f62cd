//! Explanations of a Service: on one node, checked against its kernel, or on all nodes, grouped by findings.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use switchtower_admin_api::{Explanation, Finding, KernelCheck, NodeGroup, NodeStatus};
use switchtower_core::explain::{self, Signature, Subject};
use switchtower_core::names;
use switchtower_core::view::View;
use switchtower_proto::v1::FrontendKey;

use super::{AdminError, nodes};
use crate::fleet::Fleet;

/// Maximum number of nodes that are listed as not current.
const NOT_CURRENT: usize = 50;
/// Maximum number of names in a group.
const NAMES: usize = 20;

/// The Service to explain.
#[derive(Debug, Clone)]
pub(super) struct Question {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) port: Option<String>,
    pub(super) from: Option<IpAddr>,
}

impl Question {
    fn subject(&self) -> Subject<'_> {
        Subject { namespace: &self.namespace, name: &self.name, port: self.port.as_deref() }
    }

    fn service(&self) -> Option<(&str, &str)> {
        Some((&self.namespace, &self.name))
    }

    fn full_name(&self) -> String {
        let port = self.port.as_ref().map(|port| format!(":{port}")).unwrap_or_default();
        format!("{}/{}{port}", self.namespace, self.name)
    }
}

fn is_current(standing: &NodeStatus) -> bool {
    standing.connected && standing.applied >= standing.desired && standing.failure.is_none()
}

pub(super) async fn on_node(
    fleet: &Arc<Fleet>,
    question: &Question,
    node: &str,
) -> Result<Explanation, AdminError> {
    let unknown = || AdminError::UnknownNode(node.to_owned());
    let (view, _) = fleet.view(node, question.service()).ok_or_else(unknown)?;
    let mut findings = explain::explain(&view, question.subject(), question.from);
    if findings.is_empty() {
        return Err(AdminError::UnknownService(question.full_name()));
    }
    let standing = fleet.standing(node).ok_or_else(unknown)?;
    check(fleet, node, &view, question.subject(), &mut findings).await;
    let not_current: Vec<NodeStatus> =
        Some(standing).into_iter().filter(|standing| !is_current(standing)).collect();
    Ok(Explanation {
        service: question.full_name(),
        node: Some(node.to_owned()),
        groups: vec![NodeGroup { nodes: 1, names: vec![node.to_owned()], findings }],
        not_current_total: not_current.len(),
        not_current,
    })
}

/// Compares each finding with the kernel.
async fn check(fleet: &Arc<Fleet>, node: &str, view: &View, subject: Subject<'_>, findings: &mut [Finding]) {
    let frontends = explain::frontends(view, subject);
    let keys = frontends.iter().filter_map(|frontend| frontend.key.clone()).collect();
    let answer = nodes::lookup(fleet, node, keys).await;
    let table = match answer {
        Ok(table) => table,
        Err(error) => {
            let unknown = KernelCheck::Unknown(error.to_string());
            findings.iter_mut().for_each(|finding| finding.kernel = Some(unknown.clone()));
            return;
        }
    };
    let expected = explain::expected(view, frontends.into_iter());
    let found = nodes::found(&table);
    for finding in findings {
        let of = |key: &&FrontendKey| names::frontend(key) == finding.frontend;
        let key = expected.keys().find(of).or_else(|| found.keys().find(of));
        let one = |all: &BTreeMap<FrontendKey, explain::Held>| {
            key.and_then(|key| all.get_key_value(key))
                .map(|(key, sides)| (key.clone(), sides.clone()))
                .into_iter()
                .collect::<BTreeMap<_, _>>()
        };
        let differences = explain::differences(&one(&expected), &one(&found));
        finding.kernel = Some(match differences.first() {
            None => KernelCheck::Agrees,
            Some(difference) => KernelCheck::Differs(difference.clone()),
        });
    }
}

/// `elsewhere`: progress of the nodes that other replicas serve.
pub(super) async fn on_all(
    fleet: &Arc<Fleet>,
    question: Question,
    elsewhere: HashMap<String, NodeStatus>,
) -> Result<Explanation, AdminError> {
    let fleet = fleet.clone();
    // Explaining thousands of nodes would block the runtime.
    let all = tokio::task::spawn_blocking(move || grouped(&fleet, &question, elsewhere));
    all.await.map_err(|error| AdminError::Internal(error.to_string()))?
}

fn grouped(
    fleet: &Fleet,
    question: &Question,
    mut elsewhere: HashMap<String, NodeStatus>,
) -> Result<Explanation, AdminError> {
    let mut groups: Vec<NodeGroup> = Vec::new();
    let mut known: HashMap<Signature, usize> = HashMap::new();
    let (mut not_current, mut not_current_total) = (Vec::new(), 0);
    for node in fleet.names() {
        let (Some((view, _)), Some(standing)) =
            (fleet.view(&node, question.service()), fleet.standing(&node))
        else {
            continue;
        };
        let standing = match elsewhere.remove(&*node) {
            Some(elsewhere) if !standing.connected => elsewhere,
            _ => standing,
        };
        if !is_current(&standing) {
            not_current_total += 1;
            if not_current.len() < NOT_CURRENT {
                not_current.push(standing);
            }
        }
        let findings = explain::explain(&view, question.subject(), question.from);
        let index = *known.entry(explain::signature(&findings)).or_insert_with(|| {
            groups.push(NodeGroup { nodes: 0, names: Vec::new(), findings: findings.clone() });
            groups.len() - 1
        });
        let group = &mut groups[index];
        if let Some(first) = group.names.first() {
            explain::join(&mut group.findings, first, &findings);
        }
        group.nodes += 1;
        if group.names.len() < NAMES {
            group.names.push(node.to_string());
        }
    }
    let worst = |group: &NodeGroup| group.findings.iter().map(|finding| finding.outcome).max();
    groups.sort_by_key(|group| std::cmp::Reverse((worst(group), group.nodes)));
    if groups.iter().all(|group| group.findings.is_empty()) {
        return Err(AdminError::UnknownService(question.full_name()));
    }
    Ok(Explanation { service: question.full_name(), node: None, groups, not_current, not_current_total })
}
