//! Both families together: view changes to mirror changes and their inverses. Pure.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use switchtower_proto::address_bytes;
use switchtower_proto::v1::{
    Cidr, Endpoint, Family, Frontend as ViewFrontend, FrontendKey, LocalDetection, LocalEndpoint, NodeRecord,
    PoolKey, Protocol, ProxyMode, Role, ServicePort, Settings, Target as ViewTarget, Verdict,
};

use super::element::{Key, Range};
use super::layout::{Hooks, LocalPods, RuleConfig};
use super::mirror::{Facts, Frontend, Mirror, Reference, Target, UnprogrammedItem};
use super::pool_role::PoolRole;
use super::port_name::PortName;
use crate::kernel::change::KernelChange;

/// Maximum addresses per family on which node ports are served: each port has an element per address.
pub(crate) const NODE_PORT_ADDRESSES: usize = 256;
/// kube-proxy's masquerade bit.
const DEFAULT_MARK: u32 = 0x4000;

/// The inverse of a change.
#[derive(Debug)]
pub(crate) enum Undo {
    Change(KernelChange),
    Node(Option<NodeRecord>),
    Settings(Option<Settings>),
    HostAddresses(Vec<IpAddr>),
    Controllers(Vec<SocketAddr>),
}

/// The desired content of both tables.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) v4: Mirror<4>,
    pub(crate) v6: Mirror<16>,
    node: Option<NodeRecord>,
    settings: Option<Settings>,
    host_addresses: Vec<IpAddr>,
    controllers: Vec<SocketAddr>,
}

/// Calls a generic function for the mirror of the family that an address length or family names.
macro_rules! for_family {
    ($plan:expr, $family:expr, |$mirror:ident| $body:expr) => {
        match $family {
            Family::Ipv4 => {
                let $mirror = &mut $plan.v4;
                $body
            }
            Family::Ipv6 => {
                let $mirror = &mut $plan.v6;
                $body
            }
            Family::Unspecified => None,
        }
    };
}

impl Plan {
    /// Empty tables.
    pub(crate) fn new() -> Self {
        Plan {
            v4: Mirror::new(),
            v6: Mirror::new(),
            node: None,
            settings: None,
            host_addresses: Vec::new(),
            controllers: Vec::new(),
        }
    }

    /// Applies one change; returns its inverses in the order in which [`Plan::undo`] must apply them. A malformed change
    /// and one without effect have none.
    pub(crate) fn apply(&mut self, change: &KernelChange) -> Vec<Undo> {
        let undo = match change {
            KernelChange::Frontend(frontend) => {
                let family = family_of(frontend.key.as_ref());
                for_family!(self, family, |mirror| set_frontend(mirror, frontend))
            }
            KernelChange::FrontendRemoved(key) => {
                for_family!(self, family_of(Some(key)), |mirror| remove_frontend(mirror, key))
            }
            KernelChange::Pool { key, added, removed } => {
                return for_family!(self, key.family(), |mirror| Some(change_pool(
                    mirror, key, added, removed
                )))
                .unwrap_or_default();
            }
            KernelChange::PoolRemoved(key) => {
                for_family!(self, key.family(), |mirror| remove_pool(mirror, key))
            }
            KernelChange::LocalEndpoint(endpoint) => self.set_hairpin(endpoint, true),
            KernelChange::LocalEndpointRemoved(endpoint) => self.set_hairpin(endpoint, false),
            KernelChange::ServiceCidr(cidr) => self.set_service_cidr(cidr, true),
            KernelChange::ServiceCidrRemoved(cidr) => self.set_service_cidr(cidr, false),
            KernelChange::Node(node) => Some(self.replace(Undo::Node(Some(node.clone())))),
            KernelChange::Settings(settings) => Some(self.replace(Undo::Settings(Some(settings.clone())))),
            KernelChange::HostAddresses(addresses) => {
                Some(self.replace(Undo::HostAddresses(addresses.clone())))
            }
            KernelChange::Controllers(addresses) => Some(self.replace(Undo::Controllers(addresses.clone()))),
        };
        undo.into_iter().collect()
    }

    /// Applies an inverse that [`Plan::apply`] returned.
    pub(crate) fn undo(&mut self, undo: Undo) {
        match undo {
            Undo::Change(change) => {
                self.apply(&change);
            }
            other => {
                self.replace(other);
            }
        }
    }

    /// Replaces node facts or settings; returns the previous ones.
    fn replace(&mut self, new: Undo) -> Undo {
        let old = match new {
            Undo::Node(node) => Undo::Node(std::mem::replace(&mut self.node, node)),
            Undo::Settings(settings) => Undo::Settings(std::mem::replace(&mut self.settings, settings)),
            Undo::HostAddresses(addresses) => {
                Undo::HostAddresses(std::mem::replace(&mut self.host_addresses, addresses))
            }
            Undo::Controllers(addresses) => {
                Undo::Controllers(std::mem::replace(&mut self.controllers, addresses))
            }
            Undo::Change(change) => return Undo::Change(change),
        };
        let (facts4, facts6) = (self.facts(), self.facts());
        self.v4.set_facts(facts4);
        self.v6.set_facts(facts6);
        old
    }

    fn set_hairpin(&mut self, endpoint: &LocalEndpoint, present: bool) -> Option<Undo> {
        let changed = match endpoint.address.len() {
            4 => hairpin_key(endpoint).map(|key| self.v4.set_hairpin(key, present)),
            _ => hairpin_key(endpoint).map(|key| self.v6.set_hairpin(key, present)),
        };
        let undo = if present { KernelChange::LocalEndpointRemoved } else { KernelChange::LocalEndpoint };
        changed?.then(|| Undo::Change(undo(endpoint.clone())))
    }

    fn set_service_cidr(&mut self, cidr: &Cidr, present: bool) -> Option<Undo> {
        let changed = match cidr.address.len() {
            4 => range(cidr).map(|range| self.v4.set_service_cidr(range, present)),
            _ => range(cidr).map(|range| self.v6.set_service_cidr(range, present)),
        };
        let undo = if present { KernelChange::ServiceCidrRemoved } else { KernelChange::ServiceCidr };
        changed?.then(|| Undo::Change(undo(cidr.clone())))
    }

    /// Returns the node facts and settings of one family.
    fn facts<const N: usize>(&self) -> Facts<N> {
        let node = self.node.as_ref();
        let own: Vec<[u8; N]> = node
            .iter()
            .flat_map(|node| &node.addresses)
            .filter_map(|address| address.as_slice().try_into().ok())
            .collect();
        let (local_pods, sources) = self.local_pods();
        let settings = self.settings.as_ref();
        let served = settings.map(|settings| settings.node_port_addresses.as_slice()).unwrap_or_default();
        let mut node_ports: BTreeSet<[u8; N]> = if served.is_empty() {
            own.iter().copied().collect()
        } else {
            let ranges: Vec<Range<N>> = served.iter().filter_map(range).collect();
            let addresses = self.host_addresses.iter().filter(|address| !address.is_loopback());
            let addresses =
                addresses.filter_map(|address| address_bytes(*address).as_slice().try_into().ok());
            addresses.filter(|address| ranges.iter().any(|range| range.contains(address))).collect()
        };
        let unserved = node_ports.len().saturating_sub(NODE_PORT_ADDRESSES);
        if unserved > 0 {
            // The node's own addresses first.
            let mut kept: BTreeSet<[u8; N]> =
                own.iter().filter(|own| node_ports.contains(*own)).copied().collect();
            for address in &node_ports {
                if kept.len() >= NODE_PORT_ADDRESSES {
                    break;
                }
                kept.insert(*address);
            }
            node_ports = kept;
        }
        let mark = settings.map_or(0, |settings| settings.masquerade_mark);
        let gate = settings.and_then(|settings| u16::try_from(settings.drain_gate_port).ok());
        let drain_gate = gate.filter(|port| *port != 0);
        let gate_hosts = own.iter().filter(|_| drain_gate.is_some());
        let shadow = settings.is_some_and(|settings| settings.mode() == ProxyMode::Shadow);
        let rules = RuleConfig {
            hooks: if shadow { Hooks::Absent } else { Hooks::Registered },
            mark: if mark == 0 { DEFAULT_MARK } else { mark },
            masquerade_all: settings.is_some_and(|settings| settings.masquerade_all),
            local_pods,
            drain_gate,
            drain_gate_hosts: gate_hosts.map(|address| address.to_vec()).collect(),
        };
        let controllers = controller_keys(&self.controllers);
        Facts { node_ports, unserved, primary: own.first().copied(), local_pods: sources, rules, controllers }
    }

    /// Returns the detection of local pods. A family without a CIDR has none.
    fn local_pods<const N: usize>(&self) -> (LocalPods, Vec<Range<N>>) {
        let Some(settings) = &self.settings else { return (LocalPods::Unknown, Vec::new()) };
        let by_source = |cidrs: &[Cidr]| {
            let ranges: Vec<Range<N>> = cidrs.iter().filter_map(range).collect();
            (if ranges.is_empty() { LocalPods::Unknown } else { LocalPods::Sources }, ranges)
        };
        let interface = settings.interface.clone();
        // The kernel limits interface names to 15 bytes.
        let named = (1..16).contains(&interface.len());
        match settings.local_detection() {
            LocalDetection::NodeCidr => {
                by_source(self.node.as_ref().map(|node| node.pod_cidrs.as_slice()).unwrap_or_default())
            }
            LocalDetection::ClusterCidr => by_source(&settings.cluster_cidrs),
            LocalDetection::BridgeInterface if named => (LocalPods::Interface(interface), Vec::new()),
            LocalDetection::InterfaceNamePrefix if named => {
                (LocalPods::InterfacePrefix(interface), Vec::new())
            }
            _ => (LocalPods::Unknown, Vec::new()),
        }
    }

    /// Brings the elements of both families in line with the view.
    pub(crate) fn settle(&mut self) {
        self.v4.settle();
        self.v6.settle();
    }

    /// Returns the refused items of both families.
    pub(crate) fn refusals(&self) -> Vec<UnprogrammedItem> {
        let mut all = self.v4.refusals();
        all.extend(self.v6.refusals());
        all
    }
}

/// Returns the frontends of one family that would capture connections to these controllers.
pub(crate) fn controller_keys<const N: usize>(controllers: &[SocketAddr]) -> BTreeSet<Key<N>> {
    let keys = controllers.iter().filter_map(|controller| {
        let address = address_bytes(controller.ip().to_canonical());
        key(&address, Protocol::Tcp, controller.port().into())
    });
    keys.collect()
}

fn family_of(key: Option<&FrontendKey>) -> Family {
    key.map_or(Family::Unspecified, FrontendKey::family)
}

fn range<const N: usize>(cidr: &Cidr) -> Option<Range<N>> {
    Range::new(&cidr.address, cidr.prefix_length)
}

/// Returns the key of an element; `None` if the address is of the other family, or a part is malformed.
pub(crate) fn key<const N: usize>(address: &[u8], protocol: Protocol, port: u32) -> Option<Key<N>> {
    let port = u16::try_from(port).ok().filter(|port| *port != 0)?;
    let protocol = u8::try_from(protocol as i32).ok().filter(|protocol| *protocol != 0)?;
    Some(Key { address: address.try_into().ok()?, port, protocol })
}

fn hairpin_key<const N: usize>(endpoint: &LocalEndpoint) -> Option<Key<N>> {
    key(&endpoint.address, endpoint.protocol(), endpoint.port)
}

fn reference<const N: usize>(frontend: &FrontendKey) -> Option<Reference<N>> {
    if frontend.address.is_empty() {
        let Key { port, protocol, .. } = key::<N>(&[0; N], frontend.protocol(), frontend.port)?;
        return Some(Reference::NodePort { protocol, port });
    }
    key(&frontend.address, frontend.protocol(), frontend.port).map(Reference::Explicit)
}

/// Returns the name of a service port; one that a malformed message lacks is empty.
fn name_of(port: Option<&ServicePort>) -> PortName {
    PortName::from(port.unwrap_or(&ServicePort::default()))
}

fn target(target: Option<&ViewTarget>) -> Target {
    target.map_or(Target { role: Role::Cluster, when_empty: Verdict::Reject }, |target| Target {
        role: target.role(),
        when_empty: target.when_empty(),
    })
}

fn set_frontend<const N: usize>(mirror: &mut Mirror<N>, view: &ViewFrontend) -> Option<Undo> {
    let view_key = view.key.as_ref()?;
    let reference = reference(view_key)?;
    let frontend = Frontend {
        kind: view.kind(),
        outside: target(view.outside.as_ref()),
        inside: target(view.inside.as_ref()),
        affinity: view.affinity_seconds.min(86400),
        ranges: view.source_ranges.as_slice().into(),
        port: 0,
    };
    let before = mirror.set_frontend(reference, &name_of(view.service_port.as_ref()), frontend);
    Some(Undo::Change(match before {
        Some((name, frontend)) => KernelChange::Frontend(view_of(view_key.clone(), &name, &frontend)),
        None => KernelChange::FrontendRemoved(view_key.clone()),
    }))
}

fn view_of(key: FrontendKey, name: &PortName, frontend: &Frontend) -> ViewFrontend {
    let target =
        |target: Target| ViewTarget { role: target.role as i32, when_empty: target.when_empty as i32 };
    ViewFrontend {
        key: Some(key),
        kind: frontend.kind as i32,
        service_port: Some(name.into()),
        outside: Some(target(frontend.outside)),
        inside: Some(target(frontend.inside)),
        affinity_seconds: frontend.affinity,
        source_ranges: frontend.ranges.to_vec(),
    }
}

fn remove_frontend<const N: usize>(mirror: &mut Mirror<N>, view: &FrontendKey) -> Option<Undo> {
    let (name, frontend) = mirror.remove_frontend(reference(view)?)?;
    Some(Undo::Change(KernelChange::Frontend(view_of(view.clone(), &name, &frontend))))
}

fn endpoints<const N: usize>(view: &[Endpoint]) -> Vec<([u8; N], u16)> {
    let valid = view.iter().filter_map(|endpoint| {
        let port = u16::try_from(endpoint.port).ok().filter(|port| *port != 0)?;
        Some((endpoint.address.as_slice().try_into().ok()?, port))
    });
    valid.collect()
}

fn view_endpoints<const N: usize>(members: &[([u8; N], u16)]) -> Vec<Endpoint> {
    let endpoint =
        |(address, port): &([u8; N], u16)| Endpoint { address: address.to_vec(), port: u32::from(*port) };
    members.iter().map(endpoint).collect()
}

fn change_pool<const N: usize>(
    mirror: &mut Mirror<N>,
    key: &PoolKey,
    added: &[Endpoint],
    removed: &[Endpoint],
) -> Vec<Undo> {
    let Some(role) = PoolRole::of(key.role()) else { return Vec::new() };
    let name = name_of(key.service_port.as_ref());
    let created = mirror.create_pool(&name, role);
    let removed = mirror.remove_members(&name, role, &endpoints(removed));
    let added = mirror.add_members(&name, role, &endpoints(added));
    if created {
        return vec![Undo::Change(KernelChange::PoolRemoved(key.clone()))];
    }
    let (added, removed) = (view_endpoints(&removed), view_endpoints(&added));
    vec![Undo::Change(KernelChange::Pool { key: key.clone(), added, removed })]
}

fn remove_pool<const N: usize>(mirror: &mut Mirror<N>, key: &PoolKey) -> Option<Undo> {
    let members = mirror.remove_pool(&name_of(key.service_port.as_ref()), PoolRole::of(key.role())?)?;
    let added = view_endpoints(&members);
    Some(Undo::Change(KernelChange::Pool { key: key.clone(), added, removed: Vec::new() }))
}
