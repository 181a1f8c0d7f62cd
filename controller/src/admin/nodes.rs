//! Content of a node's kernel, compared with the view.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use switchtower_admin_api::{
    ChainInfo, Destination, FrontendTreatment, NodeDiff, NodeFrontends, NodeRules, Stage,
};
use switchtower_core::explain::{self, Held, Side, Subject};
use switchtower_core::names;
use switchtower_proto::v1::query::Kind as Query;
use switchtower_proto::v1::{
    ChainsQuery, ElementsQuery, FrontendKey, FrontendsQuery, KernelTable, LookupQuery, Stamp,
};

use super::AdminError;
use crate::fleet::Fleet;

/// Maximum number of differences in an answer.
const DIFFERENCES: usize = 200;
/// Maximum number of frontends that are read.
const FRONTENDS: u32 = 100_000;
/// Maximum number of reads of a kernel while changes are in flight.
const ATTEMPTS: usize = 5;
/// Interval between reads.
const PAUSE: Duration = Duration::from_millis(200);

async fn ask(fleet: &Arc<Fleet>, node: &str, query: Query) -> Result<KernelTable, AdminError> {
    let payload = fleet.ask(node, query).await?;
    KernelTable::decode(payload.as_slice()).map_err(|_| AdminError::Answer(node.to_owned()))
}

/// Reads single frontends, repeatedly while changes are in flight.
pub(super) async fn lookup(
    fleet: &Arc<Fleet>,
    node: &str,
    frontends: Vec<FrontendKey>,
) -> Result<KernelTable, AdminError> {
    settled(fleet, node, Query::Lookup(LookupQuery { frontends })).await
}

/// Queries until the kernel's stamp has the desired digest, at most [`ATTEMPTS`] times.
async fn settled(fleet: &Arc<Fleet>, node: &str, query: Query) -> Result<KernelTable, AdminError> {
    let mut table = ask(fleet, node, query.clone()).await?;
    for _ in 1..ATTEMPTS {
        let desired = fleet.desired_digest(node).map(|digest| digest.to_bytes().to_vec());
        if table.stamp.as_ref().map(|stamp| &stamp.digest) == desired.as_ref() {
            break;
        }
        tokio::time::sleep(PAUSE).await;
        table = ask(fleet, node, query.clone()).await?;
    }
    Ok(table)
}

/// Returns the targets of a kernel's frontends.
pub(super) fn found(table: &KernelTable) -> BTreeMap<FrontendKey, Held> {
    let frontends = table.frontends.iter();
    frontends.filter_map(|frontend| Some((frontend.key.clone()?, explain::found(frontend)))).collect()
}

fn stage(stamp: &Stamp) -> Stage {
    Stage { generation: stamp.generation, digest: hex(&stamp.digest) }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) async fn diff(fleet: &Arc<Fleet>, node: &str) -> Result<NodeDiff, AdminError> {
    let unknown = || AdminError::UnknownNode(node.to_owned());
    let standing = fleet.standing(node).ok_or_else(unknown)?;
    let query = Query::Frontends(FrontendsQuery { limit: FRONTENDS });
    let table = settled(fleet, node, query).await?;
    let (view, digest) = fleet.view(node, None).ok_or_else(unknown)?;
    let expected = explain::expected(&view, view.frontends());
    let mut differences = explain::differences(&expected, &found(&table));
    let differences_total = differences.len();
    differences.truncate(DIFFERENCES);
    let known = fleet.observation(node).unwrap_or_default();
    let samples = known.deviations.iter().flat_map(|deviations| &deviations.samples);
    Ok(NodeDiff {
        node: node.to_owned(),
        desired: Stage { generation: standing.desired, digest: hex(&digest.to_bytes()) },
        acknowledged: Stage {
            generation: known.applied,
            digest: known.digest.map(|digest| hex(&digest)).unwrap_or_default(),
        },
        kernel: table.stamp.as_ref().map(stage),
        frontends: expected.len(),
        differences,
        differences_total,
        deviations: samples.map(|sample| format!("{}: {}", sample.item, sample.reason)).collect(),
    })
}

/// Returns the treatment of every frontend in the node's desired state.
pub(super) fn frontends(fleet: &Arc<Fleet>, node: &str) -> Result<NodeFrontends, AdminError> {
    let unknown = || AdminError::UnknownNode(node.to_owned());
    let (view, _) = fleet.view(node, None).ok_or_else(unknown)?;
    let frontends = view.frontends().filter_map(|frontend| {
        // A NodePort is the same on every address.
        let (key, held) = explain::expected(&view, std::iter::once(frontend)).into_iter().next()?;
        let is_node_port = frontend.key.as_ref().is_some_and(|key| key.address.is_empty());
        let any = vec![0; key.address.len()];
        let key = if is_node_port { FrontendKey { address: any, ..key } } else { key };
        let affinity = [&held.inside, &held.outside]
            .into_iter()
            .any(|side| matches!(side, Side::Forward(forward) if forward.affinity_seconds > 0));
        Some(FrontendTreatment {
            frontend: names::frontend(&key),
            service_port: frontend.service_port.as_ref().map(names::service_port).unwrap_or_default(),
            inside: destination(&held.inside),
            outside: destination(&held.outside),
            affinity,
            sources: held.sources.iter().map(ToString::to_string).collect(),
        })
    });
    Ok(NodeFrontends { node: node.to_owned(), frontends: frontends.collect() })
}

fn destination(side: &Side) -> Destination {
    match side {
        Side::Forward(forward) => {
            Destination::Endpoints(forward.endpoints.iter().map(names::endpoint).collect())
        }
        Side::Reject => Destination::Refused,
        Side::Drop | Side::Broken => Destination::Dropped,
    }
}

/// Returns the frontends of one Service, looked up one by one in the kernel.
pub(super) async fn rules_of(
    fleet: &Arc<Fleet>,
    node: &str,
    subject: Subject<'_>,
) -> Result<NodeRules, AdminError> {
    let unknown = || AdminError::UnknownNode(node.to_owned());
    let (view, _) = fleet.view(node, Some((subject.namespace, subject.name))).ok_or_else(unknown)?;
    let frontends = explain::frontends(&view, subject);
    if frontends.is_empty() {
        return Err(AdminError::UnknownService(format!("{}/{}", subject.namespace, subject.name)));
    }
    let keys = frontends.iter().filter_map(|frontend| frontend.key.clone()).collect();
    let table = lookup(fleet, node, keys).await?;
    Ok(NodeRules {
        node: node.to_owned(),
        kernel: table.stamp.as_ref().map(stage),
        services: table.frontends.iter().flat_map(|frontend| explain::rules(&view, frontend)).collect(),
        chains: Vec::new(),
        elements: Vec::new(),
        elements_total: 0,
    })
}

pub(super) async fn rules(
    fleet: &Arc<Fleet>,
    node: &str,
    text: String,
    limit: u32,
) -> Result<NodeRules, AdminError> {
    let chains = ask(fleet, node, Query::Chains(ChainsQuery {})).await?;
    let elements = ask(fleet, node, Query::Elements(ElementsQuery { text, limit })).await?;
    let chain = |chain: switchtower_proto::v1::KernelChain| ChainInfo {
        family: chain.family,
        name: chain.name,
        hook: chain.hook,
        rules: chain.rules,
        foreign: chain.foreign,
    };
    Ok(NodeRules {
        node: node.to_owned(),
        kernel: elements.stamp.as_ref().map(stage),
        services: Vec::new(),
        chains: chains.chains.into_iter().map(chain).collect(),
        elements: elements.elements,
        elements_total: elements.total,
    })
}
