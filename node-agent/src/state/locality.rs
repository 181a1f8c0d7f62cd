//! Service ports with a Local traffic policy that have no endpoint on this node while others have.

use std::collections::BTreeSet;

use switchtower_proto::v1::{FrontendKind, LayerKind};

use super::State;
use super::pack::{IpFamily, PoolId, PoolRole};

/// Numbers of service ports, as (IPv4, IPv6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct WithoutLocal {
    /// With internalTrafficPolicy Local.
    pub(crate) internal: (usize, usize),
    /// With externalTrafficPolicy Local.
    pub(crate) external: (usize, usize),
}

impl State {
    /// Counts service ports without local endpoints. Walks all frontends, so do not call it for every update.
    pub(crate) fn without_local_endpoints(&self) -> WithoutLocal {
        let (cluster, own) = (self.layer(LayerKind::Cluster), self.layer(LayerKind::Node));
        let (mut internal, mut external) = (BTreeSet::new(), BTreeSet::new());
        for (id, frontend) in &cluster.frontends {
            let inside = frontend.kind() == FrontendKind::ClusterIp;
            // Without any endpoint in the cluster, connections are refused instead of dropped.
            if !frontend.drops_without_local(inside) {
                continue;
            }
            let pool = PoolId { port: frontend.port, family: id.family, role: PoolRole::Local };
            if own.pools.get(&pool).is_none_or(|members| members.len() == 0) {
                let ports = if inside { &mut internal } else { &mut external };
                ports.insert((id.family, frontend.port));
            }
        }
        let count = |ports: &BTreeSet<(IpFamily, _)>| {
            let ipv4 = ports.iter().filter(|(family, _)| *family == IpFamily::V4).count();
            (ipv4, ports.len() - ipv4)
        };
        WithoutLocal { internal: count(&internal), external: count(&external) }
    }
}
