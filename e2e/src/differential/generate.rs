//! Random cases from a seed. The same seed and number give the same case.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

use super::case::{Case, Endpoint, Families, PODS, Port, Protocol, Service, ServiceType, Step, TARGET_PORTS};

/// Services per case at most, and steps at most.
const SERVICES: usize = 5;
const STEPS: usize = 3;

/// The case `number` of `seed`.
pub fn case(seed: u64, number: u64) -> Case {
    let mut rng = StdRng::seed_from_u64(seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let services: Vec<_> =
        (0..rng.random_range(1..=SERVICES)).map(|index| service(&mut rng, index)).collect();
    let steps = (0..rng.random_range(0..=STEPS)).map(|_| step(&mut rng, services.len())).collect();
    Case { name: format!("seed {seed} case {number}"), services, steps }
}

fn step(rng: &mut StdRng, services: usize) -> Step {
    let index = rng.random_range(0..services);
    if rng.random_bool(0.15) { Step::Delete(format!("s{index}")) } else { Step::Apply(service(rng, index)) }
}

/// Addresses and node ports follow from the Service's index: who wins where two Services claim one address
/// is up to map order in kube-proxy, and tested elsewhere.
fn service(rng: &mut StdRng, index: usize) -> Service {
    let service_type = *[
        ServiceType::ClusterIP,
        ServiceType::NodePort,
        ServiceType::LoadBalancer,
        ServiceType::LoadBalancer,
    ]
    .choose(rng)
    .unwrap_or(&ServiceType::ClusterIP);
    let families = *[Families::Ipv4, Families::Ipv6, Families::Dual].choose(rng).unwrap_or(&Families::Dual);
    let external_ips = if rng.random_bool(0.4) { addresses(203, index) } else { Vec::new() };
    let external = service_type != ServiceType::ClusterIP || !external_ips.is_empty();
    let balancer = service_type == ServiceType::LoadBalancer;
    Service {
        name: format!("s{index}"),
        service_type,
        families,
        ports: ports(rng, index, service_type),
        internal_local: rng.random_bool(0.25),
        external_local: external && rng.random_bool(0.45),
        affinity_seconds: rng.random_bool(0.15).then_some(60),
        external_ips,
        load_balancer_ips: if balancer { addresses(198, index) } else { Vec::new() },
        source_ranges: if balancer && rng.random_bool(0.3) { ranges(rng) } else { Vec::new() },
        labels: if rng.random_bool(0.05) {
            vec![("service.kubernetes.io/service-proxy-name".to_owned(), "other".to_owned())]
        } else {
            Vec::new()
        },
        endpoints: endpoints(rng),
    }
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
    let all = [super::CLIENT_RANGE_V4, super::CLIENT_RANGE_V6, "10.244.1.0/24", "10.99.0.0/16", "fd99::/64"];
    all.iter().filter(|_| rng.random_bool(0.4)).map(|range| (*range).to_owned()).collect()
}

fn ports(rng: &mut StdRng, index: usize, service_type: ServiceType) -> Vec<Port> {
    (0..rng.random_range(1..=3u16))
        .map(|number| {
            // The first two ports share a number with different protocols in some Services.
            let protocol = if rng.random_bool(0.4) { Protocol::UDP } else { Protocol::TCP };
            let node_port = 30_000 + index as u16 * 10 + number;
            Port {
                name: format!("port{number}"),
                protocol,
                port: 80 + number,
                node_port: (service_type != ServiceType::ClusterIP).then_some(node_port),
                target: rng.random_bool(0.95).then(|| *TARGET_PORTS.choose(rng).unwrap_or(&TARGET_PORTS[0])),
            }
        })
        .collect()
}

fn endpoints(rng: &mut StdRng) -> Vec<Endpoint> {
    // Hints make a difference only where all endpoints have them: decide once, then forget a few.
    let (zones, nodes) = (rng.random_bool(0.35), rng.random_bool(0.15));
    let present = *[0.0, 0.3, 0.6, 1.0].choose(rng).unwrap_or(&0.6);
    let healthy = *[1.0, 0.7, 0.0].choose(rng).unwrap_or(&1.0);
    let mut endpoints = Vec::new();
    for (pod, place) in PODS.iter().enumerate() {
        if !rng.random_bool(present) {
            continue;
        }
        let ready = rng.random_bool(healthy);
        let terminating = !ready && rng.random_bool(0.7);
        let zone = if place.node == "n3" { "b" } else { "a" };
        let other = *["a", "b", "d"].choose(rng).unwrap_or(&"a");
        let hinted = rng.random_bool(0.97);
        endpoints.push(Endpoint {
            pod,
            ready,
            serving: ready || (terminating && rng.random_bool(0.7)),
            terminating,
            zones: match (zones && hinted, rng.random_bool(0.8)) {
                (false, _) => Vec::new(),
                (true, true) => vec![zone.to_owned()],
                (true, false) => vec![other.to_owned(), "c".to_owned()],
            },
            nodes: if nodes && hinted { vec![place.node.to_owned()] } else { Vec::new() },
        });
    }
    endpoints
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_case() {
        assert_eq!(case(7, 3), case(7, 3));
        assert_ne!(case(7, 3), case(7, 4));
        assert_ne!(case(7, 3), case(8, 3));
    }

    #[test]
    fn shrinking_ends() {
        let mut current = case(1, 1);
        let mut steps = 0;
        while let Some(smaller) = current.shrink().into_iter().next() {
            current = smaller;
            steps += 1;
            assert!(steps < 1000, "{current:?}");
        }
        assert!(current.services.is_empty() && current.steps.is_empty());
    }
}
