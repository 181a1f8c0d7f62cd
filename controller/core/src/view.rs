//! One node's view: the layers that it subscribes to, merged as an agent merges them.
//!
//! Frontends come from the CLUSTER layer alone; of each pool the most specific layer's counts as a whole:
//! NODE before ZONE before CLUSTER. So losing an override lets the default show again by itself.

use std::collections::{BTreeMap, BTreeSet};

use switchtower_proto::v1::change::Change as Kind;
use switchtower_proto::v1::{
    Change, Cidr, Endpoint, Family, Frontend, FrontendKey, LayerKind, NodeRecord, PoolKey, Role, ServicePort,
    Settings,
};

type Pools = BTreeMap<PoolKey, BTreeSet<Endpoint>>;

/// The view of one node.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct View {
    frontends: BTreeMap<FrontendKey, Frontend>,
    cluster: Pools,
    zone: Pools,
    own: Pools,
    service_cidrs: BTreeSet<Cidr>,
    node: Option<NodeRecord>,
    settings: Option<Settings>,
}

impl View {
    /// Applies a change of one of the node's layers. What concerns neither frontends nor pools nor facts
    /// (hairpin entries, health checks) is passed over.
    pub fn apply(&mut self, layer: LayerKind, change: &Change) {
        let pools = match layer {
            LayerKind::Zone => &mut self.zone,
            LayerKind::Node => &mut self.own,
            LayerKind::Cluster | LayerKind::Settings | LayerKind::Unspecified => &mut self.cluster,
        };
        match &change.change {
            Some(Kind::Frontend(frontend)) => {
                let key = frontend.key.clone().unwrap_or_default();
                self.frontends.insert(key, frontend.clone());
            }
            Some(Kind::FrontendRemoved(key)) => drop(self.frontends.remove(key)),
            Some(Kind::Pool(patch)) => {
                let pool = pools.entry(patch.key.clone().unwrap_or_default()).or_default();
                pool.retain(|endpoint| !patch.removed.contains(endpoint));
                pool.extend(patch.added.iter().cloned());
            }
            Some(Kind::PoolRemoved(key)) => drop(pools.remove(key)),
            Some(Kind::Node(node)) => self.node = Some(node.clone()),
            Some(Kind::ServiceCidr(cidr)) => drop(self.service_cidrs.insert(cidr.clone())),
            Some(Kind::ServiceCidrRemoved(cidr)) => drop(self.service_cidrs.remove(cidr)),
            Some(Kind::Settings(settings)) => self.settings = Some(settings.clone()),
            Some(
                Kind::LocalEndpoint(_)
                | Kind::LocalEndpointRemoved(_)
                | Kind::HealthCheck(_)
                | Kind::HealthCheckRemoved(_),
            )
            | None => {}
        }
    }

    /// The frontend of an address, or the node port if the address is one of the node's primary ones.
    pub fn frontend(&self, key: &FrontendKey) -> Option<&Frontend> {
        self.frontends.get(key).or_else(|| {
            let node = self.node.as_ref()?;
            let anywhere = FrontendKey { address: Vec::new(), ..key.clone() };
            node.addresses.contains(&key.address).then(|| self.frontends.get(&anywhere)).flatten()
        })
    }

    /// The pool of a service port that the node uses; `None` is the same as an empty one.
    pub fn pool(
        &self,
        service_port: &ServicePort,
        family: Family,
        role: Role,
    ) -> Option<&BTreeSet<Endpoint>> {
        let key =
            PoolKey { service_port: Some(service_port.clone()), family: family.into(), role: role.into() };
        self.own.get(&key).or_else(|| self.zone.get(&key)).or_else(|| self.cluster.get(&key))
    }

    /// All frontends.
    pub fn frontends(&self) -> impl Iterator<Item = &Frontend> {
        self.frontends.values()
    }

    /// ServiceCIDRs.
    pub fn service_cidrs(&self) -> impl Iterator<Item = &Cidr> {
        self.service_cidrs.iter()
    }

    /// The Node's facts.
    pub fn node(&self) -> Option<&NodeRecord> {
        self.node.as_ref()
    }

    /// The settings in force.
    pub fn settings(&self) -> Option<&Settings> {
        self.settings.as_ref()
    }
}
