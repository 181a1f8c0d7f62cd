//! One node's view: the layers that it subscribes to, merged as an agent merges them.
//!
//! Frontends come from the CLUSTER layer only. Each pool comes as a whole from the most specific layer that has it: NODE,
//! then ZONE, then CLUSTER. Removing an override therefore restores the default.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use switchtower_proto::v1::change::Change as Kind;
use switchtower_proto::v1::{
    Change, Cidr, Endpoint, Family, Frontend, FrontendKey, LayerKind, LocalEndpoint, NodeRecord, PoolKey,
    Protocol, Role, ServicePort, Settings,
};

use crate::wire;

type Pools = BTreeMap<PoolKey, BTreeSet<Endpoint>>;

/// The view of one node.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct View {
    frontends: BTreeMap<FrontendKey, Frontend>,
    cluster: Pools,
    zone: Pools,
    own: Pools,
    service_cidrs: BTreeSet<Cidr>,
    local_endpoints: BTreeSet<LocalEndpoint>,
    host_addresses: BTreeSet<IpAddr>,
    node: Option<NodeRecord>,
    settings: Option<Settings>,
}

impl View {
    /// Applies a change of one of the node's layers. Ignores everything but frontends, pools and
    /// facts (health checks).
    pub fn apply(&mut self, layer: LayerKind, change: &Change) {
        let pools = match layer {
            LayerKind::Zone => &mut self.zone,
            LayerKind::Node => &mut self.own,
            LayerKind::Cluster | LayerKind::Settings | LayerKind::HealthChecks | LayerKind::Unspecified => {
                &mut self.cluster
            }
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
            Some(Kind::LocalEndpoint(endpoint)) => drop(self.local_endpoints.insert(endpoint.clone())),
            Some(Kind::LocalEndpointRemoved(endpoint)) => drop(self.local_endpoints.remove(endpoint)),
            Some(Kind::HealthCheck(_) | Kind::HealthCheckRemoved(_)) | None => {}
        }
    }

    /// Sets the addresses of the node's interfaces, which only the node knows. Without them, a NodePort counts as
    /// served on the node's primary addresses only.
    pub fn set_host_addresses(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        self.host_addresses = addresses.into_iter().collect();
    }

    /// The addresses on which the node serves NodePorts: its primary ones, or those of its interfaces that are inside
    /// `nodePortAddresses`, loopback excluded.
    pub fn node_port_addresses(&self) -> BTreeSet<IpAddr> {
        let node = self.node.iter().flat_map(|node| &node.addresses);
        let primary: BTreeSet<IpAddr> = node.filter_map(|octets| wire::address(octets)).collect();
        let settings = self.settings.as_ref();
        let served = settings.map(|settings| settings.node_port_addresses.as_slice()).unwrap_or_default();
        if served.is_empty() {
            return primary;
        }
        let ranges: Vec<IpNet> = served.iter().filter_map(wire::net).collect();
        let all = if self.host_addresses.is_empty() { &primary } else { &self.host_addresses };
        let inside =
            |address: &&IpAddr| !address.is_loopback() && ranges.iter().any(|range| range.contains(*address));
        all.iter().filter(inside).copied().collect()
    }

    /// The frontend of an address, or the node port if NodePorts are served on the address.
    pub fn frontend(&self, key: &FrontendKey) -> Option<&Frontend> {
        self.frontends.get(key).or_else(|| {
            let address = wire::address(&key.address)?;
            let anywhere = FrontendKey { address: Vec::new(), ..key.clone() };
            let frontend = self.frontends.get(&anywhere)?;
            self.node_port_addresses().contains(&address).then_some(frontend)
        })
    }

    /// Returns true for an endpoint on the node: its connections to itself through a Service are masqueraded.
    pub fn is_local_endpoint(&self, protocol: Protocol, endpoint: &Endpoint) -> bool {
        self.local_endpoints.contains(&LocalEndpoint {
            address: endpoint.address.clone(),
            protocol: protocol.into(),
            port: endpoint.port,
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
