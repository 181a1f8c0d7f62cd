//! Helpers of the scenarios: concise Services and endpoints, and assertions on answers.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use switchtower_e2e::parity::case::{Case, Endpoint, Families, Port, Protocol, Service, ServiceType, Step};
use switchtower_e2e::parity::settings::Settings;
use switchtower_e2e::parity::{Agreed, Kind, Origin, Probe, Verdict, World, explain, run};

/// Pods by location: two on the node under test (zone a), two on a node of the same zone, two in zone b.
pub(crate) const P1: usize = 0;
pub(crate) const P2: usize = 1;
pub(crate) const P3: usize = 2;
pub(crate) const P4: usize = 3;
pub(crate) const P5: usize = 4;

/// The two laboratories, started on first use.
pub(crate) fn world() -> MutexGuard<'static, World> {
    static WORLD: OnceLock<Mutex<World>> = OnceLock::new();
    let start = || Mutex::new(World::start().unwrap_or_else(|error| panic!("{error:#}")));
    WORLD.get_or_init(start).lock().unwrap_or_else(PoisonError::into_inner)
}

/// A state in which both proxies agree.
pub(crate) struct State(Vec<Agreed>);

impl State {
    /// A probe from an origin to a kind of address.
    pub(crate) fn probe(&self, origin: Origin, kind: Kind) -> Probe {
        let wanted = |agreed: &&Agreed| agreed.probe.origin == origin && agreed.probe.kind == kind;
        self.0.iter().find(wanted).unwrap().probe.clone()
    }

    /// All answers from an origin to a kind of address, over all ports and families.
    pub(crate) fn answers(&self, origin: Origin, kind: Kind) -> BTreeSet<String> {
        let wanted = |agreed: &&Agreed| agreed.probe.origin == origin && agreed.probe.kind == kind;
        let found: Vec<_> = self.0.iter().filter(wanted).collect();
        assert!(!found.is_empty(), "no probe from {origin:?} to {kind:?}");
        found.into_iter().flat_map(|agreed| agreed.answers.iter().cloned()).collect()
    }

    /// The pods that answered; every probe must have been answered.
    pub(crate) fn pods(&self, origin: Origin, kind: Kind) -> Vec<String> {
        let pods: BTreeSet<String> = self
            .answers(origin, kind)
            .iter()
            .map(|answer| answer.split_once(" sees ").map_or(answer.as_str(), |(pod, _)| pod).to_owned())
            .collect();
        pods.into_iter().collect()
    }

    /// Asserts that all probes from an origin to a kind of address had the same outcome.
    #[track_caller]
    pub(crate) fn all(&self, origin: Origin, kind: Kind, wanted: &str) {
        assert_eq!(self.answers(origin, kind), BTreeSet::from([wanted.to_owned()]), "{origin:?} to {kind:?}");
    }

    /// Asserts that every backend saw the client's own address, or that none did.
    #[track_caller]
    pub(crate) fn keeps_source(&self, origin: Origin, kind: Kind, kept: bool) {
        for answer in self.answers(origin, kind) {
            let own = answer.ends_with(" sees the client's own address");
            assert!(answer.contains(" sees ") && own == kept, "{origin:?} to {kind:?}: {answer}");
        }
    }
}

pub(crate) const REFUSED: &str = "refused";
pub(crate) const SILENCE: &str = "no answer";

/// Applies the Services and the changes; every state must agree with kube-proxy.
#[track_caller]
pub(crate) fn agree(services: Vec<Service>, steps: Vec<Step>) -> Vec<State> {
    agree_in(&mut world(), services, steps)
}

/// The same in a world that the test continues to use.
#[track_caller]
pub(crate) fn agree_in(world: &mut World, services: Vec<Service>, steps: Vec<Step>) -> Vec<State> {
    agree_with(world, Settings::default(), services, steps)
}

/// The same with settings.
#[track_caller]
pub(crate) fn agree_with(
    world: &mut World,
    settings: Settings,
    services: Vec<Service>,
    steps: Vec<Step>,
) -> Vec<State> {
    let name = std::thread::current().name().unwrap_or("a scenario").to_owned();
    let case = Case { name, settings, services, steps };
    match run(world, &case).unwrap() {
        Verdict::Agreement { states, .. } => states.into_iter().map(State).collect(),
        Verdict::Disagreement(found) => panic!("{}", explain(&found)),
    }
}

/// Applies one Service and returns its state.
#[track_caller]
pub(crate) fn agreed(service: Service) -> State {
    agree(vec![service], Vec::new()).pop().unwrap()
}

/// A dual-stack ClusterIP Service `web` with port 80 of TCP and of UDP.
pub(crate) fn cluster_ip(endpoints: Vec<Endpoint>) -> Service {
    Service {
        name: "web".to_owned(),
        service_type: ServiceType::ClusterIP,
        families: Families::Dual,
        ports: vec![port(Protocol::TCP, 80, 8080), port(Protocol::UDP, 80, 8080)],
        internal_local: false,
        external_local: false,
        affinity_seconds: None,
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        load_balancer_proxy: false,
        source_ranges: Vec::new(),
        without_node_ports: false,
        labels: Vec::new(),
        endpoints,
    }
}

/// The same Service with every kind of address.
pub(crate) fn balancer(endpoints: Vec<Endpoint>) -> Service {
    let ips = |texts: [&str; 2]| texts.map(|text| text.parse().unwrap()).to_vec();
    let mut service = Service {
        service_type: ServiceType::LoadBalancer,
        external_ips: ips(["203.0.113.9", "fd00:cb::9"]),
        load_balancer_ips: ips(["198.51.100.9", "fd00:c6::9"]),
        ..cluster_ip(endpoints)
    };
    service.ports.iter_mut().for_each(|port| port.node_port = Some(30_080));
    service
}

/// A port, named after its protocol and number.
pub(crate) fn port(protocol: Protocol, port: u16, target: u16) -> Port {
    let name = format!("{protocol:?}-{port}").to_lowercase();
    Port { name, protocol, port, node_port: None, target: Some(target) }
}

/// A ready endpoint.
pub(crate) fn ready(pod: usize) -> Endpoint {
    Endpoint {
        pod,
        ready: true,
        serving: true,
        terminating: false,
        zones: Vec::new(),
        nodes: Vec::new(),
        nowhere: false,
        bare: false,
        second: false,
    }
}

/// An endpoint that is neither ready nor terminating.
pub(crate) fn unready(pod: usize) -> Endpoint {
    Endpoint { ready: false, serving: false, ..ready(pod) }
}

/// A terminating endpoint, optionally still serving.
pub(crate) fn terminating(pod: usize, serving: bool) -> Endpoint {
    Endpoint { ready: false, serving, terminating: true, ..ready(pod) }
}

/// The endpoint with zone hints.
pub(crate) fn zones(endpoint: Endpoint, zones: &[&str]) -> Endpoint {
    Endpoint { zones: zones.iter().map(|&zone| zone.to_owned()).collect(), ..endpoint }
}

/// The endpoint with node hints.
pub(crate) fn nodes(endpoint: Endpoint, nodes: &[&str]) -> Endpoint {
    Endpoint { nodes: nodes.iter().map(|&node| node.to_owned()).collect(), ..endpoint }
}

/// The step that changes a Service.
pub(crate) fn then(service: &Service, change: impl FnOnce(&mut Service)) -> Step {
    let mut service = service.clone();
    change(&mut service);
    Step::Apply(service)
}
