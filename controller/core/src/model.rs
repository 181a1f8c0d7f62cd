//! Input of the compiler: the facts of Services, EndpointSlices and Nodes that matter, normalised.
//!
//! Everything here is plain data in its smallest form. The controller makes it from API objects and drops
//! the rest: an EndpointSlice held as the API type costs 80 times as much.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::IpAddr;
use std::num::NonZeroU64;
use std::sync::Arc;

use ipnet::IpNet;
use switchtower_proto::v1::Protocol;

/// `namespace` and `name` of an object.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

/// Identity of a pod: a hash of namespace and name, because every endpoint has one. Two pods with the same hash would wait
/// for each other at the drain gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodId(NonZeroU64);

impl PodId {
    /// Returns the identity of a pod.
    #[must_use]
    pub fn of(namespace: &str, name: &str) -> Self {
        let mut hasher = DefaultHasher::new();
        (namespace, name).hash(&mut hasher);
        Self(NonZeroU64::new(hasher.finish()).unwrap_or(NonZeroU64::MAX))
    }
}

/// internalTrafficPolicy and externalTrafficPolicy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TrafficPolicy {
    /// All endpoints.
    #[default]
    Cluster,
    /// Endpoints on the node only.
    Local,
}

/// One port of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePortSpec {
    /// The port's name, empty if unnamed.
    pub name: Arc<str>,
    /// TCP, UDP or SCTP.
    pub protocol: Protocol,
    /// `port`, 1..65535.
    pub port: u16,
    /// `nodePort`, `None` if 0 or absent.
    pub node_port: Option<u16>,
}

/// A Service that the proxy serves. Headless and ExternalName Services are never in the model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Service {
    /// Its key.
    pub key: ObjectKey,
    /// `metadata.uid`; the last tie-break between claimants.
    pub uid: Arc<str>,
    /// `metadata.creationTimestamp`, seconds since 1970; the older claimant wins.
    pub created: i64,
    /// At most one per family (`spec.clusterIPs`). A family without one is not served at all.
    pub cluster_ips: Vec<IpAddr>,
    /// Ports in the order of the object. Duplicates are the compiler's to reject.
    pub ports: Vec<ServicePortSpec>,
    /// `spec.externalIPs`, parsed.
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[].ip` whose ipMode is absent or VIP.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.loadBalancerSourceRanges`, parsed.
    pub source_ranges: Vec<IpNet>,
    /// `spec.externalTrafficPolicy`.
    pub external_policy: TrafficPolicy,
    /// `spec.internalTrafficPolicy`.
    pub internal_policy: TrafficPolicy,
    /// ClientIP affinity, seconds; `None` without.
    pub affinity_seconds: Option<u32>,
    /// `spec.healthCheckNodePort` where kube-proxy serves it: type LoadBalancer and externalTrafficPolicy Local.
    pub health_check_port: Option<u16>,
}

/// A port of an EndpointSlice; unnamed (nil) and zero ports never get here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlicePort {
    /// Matches the Service port's name.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// 1..65535.
    pub port: u16,
}

/// One endpoint; conditions already defaulted (ready and serving nil → true, terminating nil → false).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SliceEndpoint {
    /// `addresses[0]`.
    pub address: IpAddr,
    /// Condition.
    pub ready: bool,
    /// Condition.
    pub serving: bool,
    /// Condition.
    pub terminating: bool,
    /// `nodeName`.
    pub node: Option<Arc<str>>,
    /// `targetRef`, if it is a pod.
    pub pod: Option<PodId>,
    /// `hints.forZones`.
    pub zones: Box<[Arc<str>]>,
    /// `hints.forNodes`.
    pub nodes: Box<[Arc<str>]>,
}

/// An EndpointSlice of one family (IPv4 or IPv6; FQDN never gets here).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointSlice {
    /// The slice's own key.
    pub key: ObjectKey,
    /// `kubernetes.io/service-name`, in the slice's namespace.
    pub service: Arc<str>,
    /// `addressType` IPv6.
    pub ipv6: bool,
    /// Its ports.
    pub ports: Vec<SlicePort>,
    /// Its endpoints.
    pub endpoints: Vec<SliceEndpoint>,
}

/// A Node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Name.
    pub name: Arc<str>,
    /// Primary addresses, at most one per family (kube-proxy: GetNodeHostIPs).
    pub addresses: Vec<IpAddr>,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Vec<IpNet>,
    /// `topology.kubernetes.io/zone`, `None` if absent or empty.
    pub zone: Option<Arc<str>>,
    /// Not being deleted and not tainted ToBeDeletedByClusterAutoscaler.
    pub eligible: bool,
}

/// One event for the compiler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// Added or changed.
    Service(Service),
    /// Gone, or no longer served.
    ServiceDeleted(ObjectKey),
    /// Added or changed.
    Slice(EndpointSlice),
    /// Gone.
    SliceDeleted(ObjectKey),
    /// Added or changed.
    Node(Node),
    /// Gone.
    NodeDeleted(Arc<str>),
    /// All ServiceCIDRs.
    ServiceCidrs(Vec<IpNet>),
}

/// The layers of the view; a node subscribes to one of each kind.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LayerId {
    /// The same for all nodes.
    Cluster,
    /// Endpoints that topology hints select in a zone.
    Zone(Arc<str>),
    /// Items of a single node.
    Node(Arc<str>),
    /// One revision of one profile.
    Settings(Arc<str>, u64),
    /// Health check node ports, the same for all nodes.
    HealthChecks,
}
