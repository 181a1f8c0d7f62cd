//! Random endpoints of a Service, mostly in shapes that match a rule of kube-proxy and are unlikely by chance.

use rand::Rng as _;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;

use super::super::case::{Endpoint, PODS};

/// Conditions of the endpoints.
#[derive(Debug, Clone, Copy)]
enum Health {
    Ready,
    /// Some are ready.
    Mixed,
    /// None is ready; terminating ones may serve.
    Ending,
    /// Those on the node under test terminate and serve, the others are ready.
    EndingHere,
    /// Those in the node's zone are not ready.
    ZoneDown,
    /// None is ready or terminating.
    Unready,
}

/// Hints in the slices.
#[derive(Debug, Clone, Copy)]
enum Hints {
    None,
    /// Each endpoint's own zone.
    Zones,
    /// Several zones for each endpoint.
    MoreZones,
    /// Zones other than the node's.
    OtherZones,
    /// Each endpoint's own node and zone.
    Nodes,
    /// Each endpoint's own node only.
    OnlyNodes,
    /// Nodes other than the one under test, and each endpoint's own zone.
    OtherNodes,
}

const HEALTH: [Health; 8] = [
    Health::Ready,
    Health::Ready,
    Health::Mixed,
    Health::Mixed,
    Health::Ending,
    Health::EndingHere,
    Health::ZoneDown,
    Health::Unready,
];
const HINTS: [Hints; 12] = [
    Hints::None,
    Hints::None,
    Hints::None,
    Hints::None,
    Hints::None,
    Hints::Zones,
    Hints::Zones,
    Hints::MoreZones,
    Hints::OtherZones,
    Hints::Nodes,
    Hints::OnlyNodes,
    Hints::OtherNodes,
];

/// The endpoints of the `index`th Service.
pub(super) fn endpoints(rng: &mut StdRng, index: usize) -> Vec<Endpoint> {
    let hints = *HINTS.choose(rng).unwrap_or(&Hints::None);
    let health = *HEALTH.choose(rng).unwrap_or(&Health::Ready);
    let present = *[0.0, 0.3, 0.6, 0.6, 1.0, 1.0].choose(rng).unwrap_or(&0.6);
    let mut endpoints: Vec<_> = (0..PODS.len())
        .filter(|_| rng.random_bool(present))
        .collect::<Vec<_>>()
        .into_iter()
        .map(|pod| {
            let endpoint = conditions(rng, pod, health);
            hinted(rng, endpoint, hints)
        })
        .collect();
    forget_hint(rng, &mut endpoints);
    // Some Services have a second slice. A pod is always in the same slice: while it moves, it would be absent for a
    // moment, with a random effect on its flows.
    let second = |pod: usize| index % 3 == 1 && pod >= 3;
    for endpoint in &mut endpoints {
        endpoint.second = second(endpoint.pod);
        // The first pod sends probes too: without a node name it would sometimes reach itself, without masquerading
        // and without an answer.
        endpoint.nowhere = rng.random_bool(0.03) && endpoint.pod != 0;
        endpoint.bare = rng.random_bool(0.3);
    }
    if rng.random_bool(0.3) {
        endpoints.extend(again(&endpoints));
    }
    endpoints
}

fn conditions(rng: &mut StdRng, pod: usize, health: Health) -> Endpoint {
    let (here, same_zone) = (PODS[pod].node == "n1", PODS[pod].node != "n3");
    let (ready, terminating) = match health {
        Health::Ready => (true, false),
        Health::Mixed => {
            let ready = rng.random_bool(0.6);
            (ready, !ready && rng.random_bool(0.6))
        }
        Health::Ending => (false, rng.random_bool(0.8)),
        Health::EndingHere => (!here, here),
        Health::ZoneDown => (!same_zone, same_zone && rng.random_bool(0.5)),
        Health::Unready => (false, false),
    };
    let serving = ready || terminating && rng.random_bool(0.75);
    Endpoint {
        pod,
        ready,
        serving,
        terminating,
        zones: Vec::new(),
        nodes: Vec::new(),
        nowhere: false,
        bare: false,
        second: false,
    }
}

fn hinted(rng: &mut StdRng, mut endpoint: Endpoint, hints: Hints) -> Endpoint {
    let node = PODS[endpoint.pod].node;
    let own = if node == "n3" { "b" } else { "a" };
    let mut other = |names: &[&str]| (*names.choose(rng).unwrap_or(&"d")).to_owned();
    let (own, node) = (own.to_owned(), node.to_owned());
    (endpoint.zones, endpoint.nodes) = match hints {
        Hints::None => (Vec::new(), Vec::new()),
        Hints::Zones => (vec![own], Vec::new()),
        Hints::MoreZones => (vec![other(&["a", "b", "d"]), "c".to_owned()], Vec::new()),
        Hints::OtherZones => (vec![other(&["b", "d"])], Vec::new()),
        Hints::Nodes => (vec![own], vec![node]),
        Hints::OnlyNodes => (Vec::new(), vec![node]),
        Hints::OtherNodes => (vec![own], vec![other(&["n2", "n3", "n9"])]),
    };
    endpoint
}

/// Removes the hint of one endpoint, which disables all others if the endpoint is ready.
fn forget_hint(rng: &mut StdRng, endpoints: &mut [Endpoint]) {
    if endpoints.is_empty() || !rng.random_bool(0.35) {
        return;
    }
    let at = rng.random_range(0..endpoints.len());
    endpoints[at].zones.clear();
    if rng.random_bool(0.7) {
        endpoints[at].nodes.clear();
    }
}

/// Reuses the address of a terminating pod for a new one. Of two non-terminating ones, kube-proxy picks any.
fn again(endpoints: &[Endpoint]) -> Option<Endpoint> {
    let old = endpoints.iter().find(|endpoint| endpoint.terminating)?;
    let conditions = Endpoint { ready: true, serving: true, terminating: false, ..old.clone() };
    Some(Endpoint { second: !old.second, ..conditions })
}
