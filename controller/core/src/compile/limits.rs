//! Bounds on what Services may occupy: each one, all of a namespace, and all together.
//!
//! Invariants: the outcome depends on the objects alone, never on the order in which they arrived. Within a bound the
//! oldest Services win (creation time, then name). A refused Service is not compiled, so that it costs no more than its
//! EndpointSlices are long. While a bound is kept, an update costs O(log Services); while it is exceeded, one walk over
//! the Services of the namespace (or the cluster).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::model::{EndpointSlice, ObjectKey, Service};

/// An amount of frontends and endpoints.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Frontends: addresses × ports, node ports included.
    pub frontends: usize,
    /// Endpoints, counted for each service port and family.
    pub endpoints: usize,
}

impl Usage {
    fn plus(self, other: Self) -> Self {
        Self { frontends: self.frontends + other.frontends, endpoints: self.endpoints + other.endpoints }
    }

    fn minus(self, other: Self) -> Self {
        Self { frontends: self.frontends - other.frontends, endpoints: self.endpoints - other.endpoints }
    }

    fn min(self, other: Self) -> Self {
        Self {
            frontends: self.frontends.min(other.frontends),
            endpoints: self.endpoints.min(other.endpoints),
        }
    }

    fn exceeds(self, limit: Self) -> bool {
        self.frontends > limit.frontends || self.endpoints > limit.endpoints
    }
}

/// Maximum usage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Of one Service, whose surplus ports, addresses and endpoints are left out.
    pub service: Usage,
    /// Of all Services of a namespace, whose newest are refused beyond it.
    pub namespace: Usage,
    /// Of all Services. Below the 4,000,000 items that an agent takes.
    pub total: Usage,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            service: Usage { frontends: 1_000, endpoints: 50_000 },
            namespace: Usage { frontends: 250_000, endpoints: 500_000 },
            total: Usage { frontends: 1_000_000, endpoints: 2_000_000 },
        }
    }
}

/// A bound that a Service exceeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bound {
    /// Its own: the surplus is left out.
    Service,
    /// That of its namespace: the Service is refused.
    Namespace,
    /// That of all Services: the Service is refused.
    Total,
}

impl Bound {
    /// All bounds.
    pub const ALL: [Self; 3] = [Self::Service, Self::Namespace, Self::Total];

    /// Name in metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::Namespace => "namespace",
            Self::Total => "total",
        }
    }
}

/// Returns an upper bound of what a Service would occupy, from the sizes of its slices.
pub(super) fn demand(service: &Service, slices: &[&EndpointSlice], limit: Usage) -> Usage {
    let mut demand = Usage::default();
    let addresses = service.external_ips.len() + service.load_balancer_ips.len();
    for cluster_ip in &service.cluster_ips {
        for port in &service.ports {
            demand.frontends += 1 + usize::from(port.node_port.is_some()) + addresses;
        }
        let of_family = slices.iter().filter(|slice| slice.ipv6 == cluster_ip.is_ipv6());
        let endpoints: usize = of_family.map(|slice| slice.endpoints.len()).sum();
        demand.endpoints = demand.endpoints.saturating_add(endpoints.saturating_mul(service.ports.len()));
    }
    demand.min(limit)
}

/// Oldest first.
type Order = (i64, ObjectKey);

/// Which Services a bound admits.
#[derive(Debug, Default)]
struct Group {
    sum: Usage,
    members: BTreeMap<Order, Usage>,
    created: BTreeMap<ObjectKey, i64>,
    refused: BTreeSet<ObjectKey>,
}

impl Group {
    fn put(&mut self, key: &ObjectKey, demand: Option<Demand>) {
        if let Some(created) = self.created.remove(key)
            && let Some(usage) = self.members.remove(&(created, key.clone()))
        {
            self.sum = self.sum.minus(usage);
        }
        if let Some(Demand { created, usage }) = demand {
            self.created.insert(key.clone(), created);
            self.members.insert((created, key.clone()), usage);
            self.sum = self.sum.plus(usage);
        }
    }

    /// Returns the Services whose admission changed.
    fn settle(&mut self, limit: Usage) -> Vec<ObjectKey> {
        let mut refused = BTreeSet::new();
        if self.sum.exceeds(limit) {
            let mut admitted = Usage::default();
            for ((_, key), usage) in &self.members {
                let with = admitted.plus(*usage);
                if with.exceeds(limit) {
                    refused.insert(key.clone());
                } else {
                    admitted = with;
                }
            }
        }
        let changed = refused.symmetric_difference(&self.refused).cloned().collect();
        self.refused = refused;
        changed
    }
}

/// Usage that a Service asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Demand {
    /// `metadata.creationTimestamp`, seconds since 1970.
    pub(super) created: i64,
    pub(super) usage: Usage,
}

/// Admits Services within the bounds.
#[derive(Debug, Default)]
pub(super) struct Admission {
    pub(super) limits: Limits,
    demands: BTreeMap<ObjectKey, Demand>,
    namespaces: BTreeMap<Arc<str>, Group>,
    /// Services that their namespace admits.
    total: Group,
}

impl Admission {
    /// Takes the demand of a Service; `None`: it is gone. Returns the other Services whose admission changed.
    pub(super) fn update(&mut self, key: &ObjectKey, demand: Option<Demand>) -> Vec<ObjectKey> {
        if self.demands.get(key) == demand.as_ref() {
            return Vec::new();
        }
        match demand {
            Some(demand) => drop(self.demands.insert(key.clone(), demand)),
            None => drop(self.demands.remove(key)),
        }
        let namespace = self.namespaces.entry(key.namespace.clone()).or_default();
        namespace.put(key, demand);
        let mut changed = namespace.settle(self.limits.namespace);
        for key in changed.iter().chain([key]) {
            let admitted = self.demands.get(key).filter(|_| !namespace.refused.contains(key));
            self.total.put(key, admitted.copied());
        }
        if namespace.members.is_empty() {
            self.namespaces.remove(&key.namespace);
        }
        changed.extend(self.total.settle(self.limits.total));
        changed.retain(|other| other != key);
        changed
    }

    /// The bound for which this Service is refused, if it is.
    pub(super) fn refusal(&self, key: &ObjectKey) -> Option<Bound> {
        let namespace = self.namespaces.get(&key.namespace);
        if namespace.is_some_and(|group| group.refused.contains(key)) {
            return Some(Bound::Namespace);
        }
        self.total.refused.contains(key).then_some(Bound::Total)
    }
}
