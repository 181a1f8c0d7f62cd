//! Random cases from a seed. The same seed and number always produce the same case.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

use self::endpoints::endpoints;
use super::case::{Case, Endpoint, Families, Port, Protocol, Service, ServiceType, Step, TARGET_PORTS};
use super::settings::{Detection, Settings};

/// Source ranges of a Service that contain the off-cluster client.
pub(crate) const CLIENT_RANGE_V4: &str = "198.18.0.0/16";
pub(crate) const CLIENT_RANGE_V6: &str = "fd18::/16";

mod endpoints;
#[cfg(test)]
mod tests;

/// Seed and number of cases of the random test, chosen so that few cases cover every rule.
pub const TESTED: (u64, u64) = (21_231, 30);

/// Maximum number of Services, and of steps, per case.
const SERVICES: usize = 5;
const STEPS: usize = 3;
/// Consecutive cases with the same settings: changing settings takes as long as a case.
const GROUP: u64 = 5;

/// The case `number` of `seed`.
pub fn case(seed: u64, number: u64) -> Case {
    let mut rng = StdRng::seed_from_u64(seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let services: Vec<_> =
        (0..rng.random_range(1..=SERVICES)).map(|index| service(&mut rng, index)).collect();
    let mut now: Vec<_> = services.iter().cloned().map(Some).collect();
    let steps = (0..rng.random_range(0..=STEPS)).map(|_| step(&mut rng, &mut now)).collect();
    let settings = settings(seed, number / GROUP);
    Case { name: format!("seed {seed} case {number}"), settings, services, steps }
}

/// The settings of the `group`th cases of `seed`, drawn independently of the cases.
fn settings(seed: u64, group: u64) -> Settings {
    let mut rng = StdRng::seed_from_u64(!seed ^ group.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    // Each pod of node n1 has its own device; the client pod's is pod3.
    let detection = match rng.random_range(0..8) {
        0..3 => Detection::NodeCidr,
        3 | 4 => Detection::ClusterCidr,
        5 => Detection::BridgeInterface("pod3".to_owned()),
        6 => Detection::InterfaceNamePrefix("pod".to_owned()),
        _ => Detection::None,
    };
    let networks = [
        &[][..],
        &["0.0.0.0/0", "::/0"],
        &["0.0.0.0/0"],
        &["10.77.0.0/24", "fd00:77::/64"],
        &["198.18.0.0/15", "10.77.0.1/32"],
        &["10.244.0.0/16", "127.0.0.0/8", "::/0"],
    ];
    let some = networks.choose(&mut rng).copied().unwrap_or_default();
    let networks = if rng.random_bool(0.4) { &[] } else { some };
    Settings {
        detection,
        node_port_addresses: networks.iter().map(|&network| network.to_owned()).collect(),
        masquerade_all: rng.random_bool(0.2),
    }
}

/// A random change of the current state.
fn step(rng: &mut StdRng, now: &mut [Option<Service>]) -> Step {
    let index = rng.random_range(0..now.len());
    match now[index].take() {
        Some(service) if rng.random_bool(0.12) => Step::Delete(service.name),
        old => {
            let new = match old {
                Some(old) if rng.random_bool(0.85) => changed(rng, old, index),
                _ => service(rng, index),
            };
            now[index] = Some(new.clone());
            Step::Apply(new)
        }
    }
}

/// The Service after a change as users and controllers make it.
fn changed(rng: &mut StdRng, mut service: Service, index: usize) -> Service {
    match rng.random_range(0..11) {
        0 | 1 if !service.endpoints.is_empty() => {
            service.endpoints.remove(rng.random_range(0..service.endpoints.len()));
        }
        2 if !service.endpoints.is_empty() => {
            let at = any_endpoint(rng, &mut service.endpoints);
            let (ready, serving) = (rng.random_bool(0.3), rng.random_bool(0.6));
            let endpoint = &mut service.endpoints[at];
            (endpoint.ready, endpoint.serving, endpoint.terminating) = (ready, ready || serving, !ready);
        }
        10 if !service.endpoints.is_empty() => {
            let at = any_endpoint(rng, &mut service.endpoints);
            (service.endpoints[at].zones, service.endpoints[at].nodes) = (Vec::new(), Vec::new());
        }
        3 => service.service_type = any_type(rng),
        4 => service.internal_local = !service.internal_local,
        5 => service.external_local = !service.external_local,
        6 => service.ports = ports(rng, index),
        7 => service.affinity_seconds = service.affinity_seconds.is_none().then_some(60),
        8 => service.labels = if service.labels.is_empty() { foreign_label(rng) } else { Vec::new() },
        9 if !service.external_ips.is_empty() => service.external_ips.clear(),
        _ => service.endpoints = endpoints(rng, index),
    }
    valid(service, index)
}

/// An endpoint whose address is unique: of two non-terminating ones with the same address, kube-proxy picks any.
fn any_endpoint(rng: &mut StdRng, endpoints: &mut Vec<Endpoint>) -> usize {
    let chosen = endpoints[rng.random_range(0..endpoints.len())].clone();
    endpoints.retain(|endpoint| endpoint.pod != chosen.pod);
    endpoints.push(chosen);
    endpoints.len() - 1
}

/// Removes what the type does not support, and adds what it requires.
fn valid(mut service: Service, index: usize) -> Service {
    let balancer = service.service_type == ServiceType::LoadBalancer;
    service.load_balancer_ips = if balancer { addresses(198, index) } else { Vec::new() };
    if !balancer {
        service.source_ranges.clear();
        service.load_balancer_proxy = false;
        service.without_node_ports = false;
    }
    let external = service.service_type != ServiceType::ClusterIP;
    service.external_local &= external || !service.external_ips.is_empty();
    for port in &mut service.ports {
        // The same number for the same port of TCP and UDP.
        let number = 30_000 + index as u16 * 10 + (port.port - 80);
        port.node_port = (external && !service.without_node_ports).then_some(number);
    }
    // A Service's only port needs no name.
    if index % 2 == 1 && service.ports.len() == 1 {
        service.ports[0].name.clear();
    }
    service
}

fn any_type(rng: &mut StdRng) -> ServiceType {
    let types =
        [ServiceType::ClusterIP, ServiceType::NodePort, ServiceType::LoadBalancer, ServiceType::LoadBalancer];
    *types.choose(rng).unwrap_or(&ServiceType::ClusterIP)
}

/// Labels that make a service proxy ignore the Service.
fn foreign_label(rng: &mut StdRng) -> Vec<(String, String)> {
    let labels =
        [("service.kubernetes.io/service-proxy-name", "other"), ("service.kubernetes.io/headless", "")];
    let chosen = labels.choose(rng).into_iter();
    chosen.map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// Addresses and node ports follow from the Service's index: if two Services claim one address, kube-proxy picks the
/// winner by map order; conflicts are tested elsewhere.
fn service(rng: &mut StdRng, index: usize) -> Service {
    let service_type = any_type(rng);
    let families = *[Families::Ipv4, Families::Ipv6, Families::Dual].choose(rng).unwrap_or(&Families::Dual);
    let service = Service {
        name: format!("s{index}"),
        service_type,
        families,
        ports: ports(rng, index),
        internal_local: rng.random_bool(0.25),
        external_local: rng.random_bool(0.45),
        affinity_seconds: rng.random_bool(0.15).then_some(60),
        external_ips: if rng.random_bool(0.4) { addresses(203, index) } else { Vec::new() },
        load_balancer_ips: Vec::new(),
        load_balancer_proxy: rng.random_bool(0.15),
        source_ranges: if rng.random_bool(0.45) { ranges(rng) } else { Vec::new() },
        without_node_ports: rng.random_bool(0.15),
        labels: if rng.random_bool(0.05) { foreign_label(rng) } else { Vec::new() },
        endpoints: endpoints(rng, index),
    };
    valid(service, index)
}

fn addresses(first: u8, index: usize) -> Vec<IpAddr> {
    let number = index as u8 + 1;
    let (second, third) = if first == 203 { (0, 113) } else { (51, 100) };
    vec![
        IpAddr::V4(Ipv4Addr::new(first, second, third, number)),
        IpAddr::V6(Ipv6Addr::new(0xfd00, first.into(), 0, 0, 0, 0, 0, number.into())),
    ]
}

fn ranges(rng: &mut StdRng) -> Vec<String> {
    let all = [CLIENT_RANGE_V4, CLIENT_RANGE_V6, "10.244.1.0/24", "10.99.0.0/16", "fd99::/64"];
    all.iter().filter(|_| rng.random_bool(0.4)).map(|range| (*range).to_owned()).collect()
}

fn ports(rng: &mut StdRng, index: usize) -> Vec<Port> {
    let mut ports: Vec<Port> = Vec::new();
    for number in 0..rng.random_range(1..=3u16) {
        let mut protocol = match rng.random_range(0..20) {
            0..10 => Protocol::TCP,
            10..17 => Protocol::UDP,
            _ => Protocol::SCTP,
        };
        let mut port = 80 + number;
        // Some Services have one number for two protocols.
        if let Some(before) = ports.last().filter(|_| number == 1 && rng.random_bool(0.4)) {
            port = before.port;
            protocol = if before.protocol == Protocol::TCP { Protocol::UDP } else { Protocol::TCP };
        }
        let target = rng.random_bool(0.95).then(|| *TARGET_PORTS.choose(rng).unwrap_or(&TARGET_PORTS[0]));
        let name = format!("s{index}-{number}");
        ports.push(Port { name, protocol, port, node_port: None, target });
    }
    ports
}
