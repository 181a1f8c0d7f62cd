//! Properties of random cases; the tested cases cover every rule.

use super::super::case::PODS;
use super::*;

#[test]
fn same_seed_gives_same_case() {
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

/// A distinction that kube-proxy's rules make, and the predicate for Services of a state.
type Situation = (&'static str, fn(&Service) -> bool);

fn ready(service: &Service) -> impl Iterator<Item = &Endpoint> {
    service.endpoints.iter().filter(|endpoint| endpoint.ready)
}

fn fallback(service: &Service) -> impl Iterator<Item = &Endpoint> {
    service.endpoints.iter().filter(|endpoint| endpoint.terminating && endpoint.serving)
}

fn here(endpoint: &Endpoint) -> bool {
    PODS[endpoint.pod].node == "n1" && !endpoint.nowhere
}

fn zone_a(endpoint: &Endpoint) -> bool {
    endpoint.zones.iter().any(|zone| zone == "a")
}

fn node_n1(endpoint: &Endpoint) -> bool {
    endpoint.nodes.iter().any(|node| node == "n1")
}

fn usable(service: &Service) -> bool {
    ready(service).chain(fallback(service)).next().is_some()
}

fn outside(service: &Service) -> bool {
    service.service_type != ServiceType::ClusterIP || !service.external_ips.is_empty()
}

/// All ready endpoints have zone hints, and some, but not all, name the node's zone.
fn zones_hold(service: &Service) -> bool {
    ready(service).all(|endpoint| !endpoint.zones.is_empty())
        && ready(service).any(zone_a)
        && !ready(service).all(zone_a)
}

fn nodes_hold(service: &Service) -> bool {
    ready(service).all(|endpoint| !endpoint.nodes.is_empty())
        && ready(service).any(node_n1)
        && !ready(service).all(node_n1)
}

fn guards(service: &Service, range: &str) -> bool {
    service.source_ranges.iter().any(|other| other == range)
}

const SITUATIONS: &[Situation] = &[
    ("zone hints hold", |s| zones_hold(s) && !nodes_hold(s)),
    ("one ready endpoint without a hint undoes those for the zone", |s| {
        let (with, without): (Vec<_>, Vec<_>) = ready(s).partition(|endpoint| !endpoint.zones.is_empty());
        without.len() == 1 && with.iter().any(|e| zone_a(e)) && !nodes_hold(s)
    }),
    ("an unready endpoint without a hint undoes nothing", |s| {
        zones_hold(s) && s.endpoints.iter().any(|endpoint| !endpoint.ready && endpoint.zones.is_empty())
    }),
    ("no hint names the zone", |s| {
        ready(s).all(|endpoint| !endpoint.zones.is_empty()) && ready(s).count() > 1 && !ready(s).any(zone_a)
    }),
    ("node hints hold", nodes_hold),
    ("one ready endpoint without a hint undoes those for the node", |s| {
        let (with, without): (Vec<_>, Vec<_>) = ready(s).partition(|endpoint| !endpoint.nodes.is_empty());
        without.len() == 1 && with.iter().any(|e| node_n1(e)) && !zones_hold(s)
    }),
    ("node hints name others, zone hints hold", |s| {
        zones_hold(s) && ready(s).all(|endpoint| !endpoint.nodes.is_empty()) && !ready(s).any(node_n1)
    }),
    ("hints and a Local policy", |s| outside(s) && zones_hold(s) && s.external_local && ready(s).any(here)),
    ("only terminating endpoints serve", |s| ready(s).next().is_none() && fallback(s).count() > 0),
    ("a terminating endpoint among ready ones", |s| ready(s).count() > 0 && fallback(s).count() > 0),
    ("endpoints end and none serves", |s| {
        !usable(s) && s.endpoints.iter().any(|endpoint| endpoint.terminating)
    }),
    ("endpoints, and none is usable", |s| !usable(s) && !s.endpoints.is_empty()),
    ("no endpoints", |s| s.endpoints.is_empty()),
    ("Local, only terminating ones here, ready ones elsewhere", |s| {
        (s.internal_local || outside(s) && s.external_local)
            && ready(s).count() > 0
            && !ready(s).any(here)
            && fallback(s).any(here)
    }),
    ("internal Local, some here", |s| s.internal_local && ready(s).any(here) && !ready(s).all(here)),
    ("internal Local, none here", |s| {
        s.internal_local && usable(s) && !ready(s).any(here) && !fallback(s).any(here)
    }),
    ("internal Local, none anywhere", |s| s.internal_local && !usable(s)),
    ("external Local, some here", |s| {
        outside(s) && s.external_local && ready(s).any(here) && !ready(s).all(here)
    }),
    ("external Local, none here", |s| {
        outside(s) && s.external_local && usable(s) && !ready(s).any(here) && !fallback(s).any(here)
    }),
    ("external Local, none anywhere", |s| outside(s) && s.external_local && !usable(s)),
    ("ranges that hold the node", |s| usable(s) && guards(s, CLIENT_RANGE_V4)),
    ("ranges that hold a pod and not the node", |s| {
        usable(s) && guards(s, "10.244.1.0/24") && !guards(s, CLIENT_RANGE_V4)
    }),
    ("ranges of one family only", |s| {
        usable(s)
            && s.families != Families::Ipv6
            && !s.source_ranges.is_empty()
            && s.source_ranges.iter().all(|range| range.contains(':'))
    }),
    ("a balancer in mode Proxy", |s| usable(s) && s.load_balancer_proxy),
    ("a balancer without node ports", |s| usable(s) && s.without_node_ports),
    ("affinity among several", |s| s.affinity_seconds.is_some() && ready(s).count() > 1),
    ("affinity and a Local policy", |s| {
        s.affinity_seconds.is_some() && (s.internal_local || outside(s) && s.external_local) && usable(s)
    }),
    ("the same address twice", |s| {
        let pods: std::collections::BTreeSet<_> = s.endpoints.iter().map(|endpoint| endpoint.pod).collect();
        pods.len() < s.endpoints.len()
    }),
    ("two slices", |s| s.endpoints.iter().any(|endpoint| endpoint.second)),
    ("an endpoint of no node", |s| ready(s).any(|endpoint| endpoint.nowhere)),
    ("absent conditions", |s| ready(s).any(|endpoint| endpoint.bare)),
    ("a port without a name", |s| s.ports.iter().any(|port| port.name.is_empty())),
    ("a port that no slice has", |s| usable(s) && s.ports.iter().any(|port| port.target.is_none())),
    ("a Service of another proxy", |s| usable(s) && !s.labels.is_empty()),
    ("one family", |s| usable(s) && s.families != Families::Dual),
];

/// All states of a case.
fn states(case: &Case) -> Vec<Vec<Service>> {
    let mut services = case.services.clone();
    let mut states = vec![services.clone()];
    for step in &case.steps {
        match step {
            Step::Apply(service) => {
                services.retain(|other| other.name != service.name);
                services.push(service.clone());
            }
            Step::Delete(name) => services.retain(|other| other.name != *name),
        }
        states.push(services.clone());
    }
    states
}

#[test]
fn tested_cases_cover_every_rule() {
    let (seed, cases) = TESTED;
    let services: Vec<Service> =
        (0..cases).flat_map(|number| states(&case(seed, number))).flatten().collect();
    let count = |situation: &&Situation| services.iter().filter(|service| situation.1(service)).count();
    let counts: Vec<_> = SITUATIONS.iter().map(|situation| (situation.0, count(&situation))).collect();
    let rare: Vec<_> = counts.iter().filter(|(_, count)| *count < 3).collect();
    assert!(rare.is_empty(), "{rare:?} of {counts:#?}");
}

#[test]
fn tested_cases_cover_every_setting() {
    let (seed, cases) = TESTED;
    let settings: Vec<_> = (0..cases).map(|number| case(seed, number).settings).collect();
    let met = |test: fn(&Settings) -> bool| settings.iter().any(test);
    assert!(met(|settings| settings.detection == Detection::NodeCidr), "{settings:?}");
    assert!(met(|settings| settings.detection == Detection::None), "{settings:?}");
    assert!(met(|settings| settings.masquerade_all), "{settings:?}");
    assert!(met(|settings| settings.node_port_addresses.is_empty()), "{settings:?}");
    assert!(met(|settings| !settings.node_port_addresses.is_empty()), "{settings:?}");
}
