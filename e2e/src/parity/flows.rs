//! UDP flows that exist while the cluster changes: the backend of the same socket before and after.
//!
//! The choice of a flow's backend is random and differs between the worlds. Flows are therefore compared by their
//! previous backend: a flow stays, moves to another backend, or gets no answer. Pods answer with their names, so
//! staying and moving are indistinguishable if another port of the same pod takes over.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::Result;

use super::case::Service;
use super::compare::{Agreed, Answers, Difference, TIMEOUT};
use super::manifests;
use super::probes::{Kind, ORIGINS, Origin, Probe};
use super::world::{Side, World};
use crate::probe::Transport;
use crate::probe::volley::Flow;

/// Number of flows to each destination.
const FLOWS: usize = 6;
/// Timeout of both proxies' connection tracking updates after the rules are in place.
const DEADLINE: Duration = Duration::from_secs(15);
/// Interval between two queries.
const PAUSE: Duration = Duration::from_millis(50);
const FIRST_TIMEOUT: Duration = Duration::from_millis(350);
const STAYS: &str = "stays";

/// An open flow and the backend that answered it.
type Open = (Flow, String);

/// The flows of both worlds, by the index of their probe.
#[derive(Debug)]
pub(super) struct Flows {
    probes: Vec<Probe>,
    /// The targets behind each probe's destination when its flows were opened.
    targets: Vec<BTreeSet<Target>>,
    /// Set for each probe whose Service had two slices at that time.
    split: Vec<bool>,
    switchtower: Vec<Vec<Open>>,
    kube_proxy: Vec<Vec<Open>>,
}

impl Flows {
    /// Opens flows to every UDP destination with an answer; `services` is the current state.
    pub(super) fn open(world: &World, agreed: &[Agreed], services: &[Service]) -> Result<Self> {
        let answered = |agreed: &&Agreed| {
            let Probe { transport, sticky, origin, .. } = agreed.probe;
            let replied = agreed.answers.iter().any(|answer| answer.contains(" sees "));
            // A pod of another node is a client like one outside.
            transport == Transport::Udp && !sticky && replied && origin != Origin::RemotePod
        };
        let probes: Vec<_> = agreed.iter().filter(answered).map(|agreed| agreed.probe.clone()).collect();
        let all: Vec<_> = agreed.iter().map(|agreed| agreed.probe.clone()).collect();
        let targets = probes.iter().map(|probe| targets(probe, &all, services)).collect();
        let split = probes.iter().map(|probe| is_split(probe, services)).collect();
        let switchtower = open(world, Side::Switchtower, &probes)?;
        let kube_proxy = open(world, Side::KubeProxy, &probes)?;
        Ok(Self { probes, targets, split, switchtower, kube_proxy })
    }

    /// Queries every flow repeatedly until both worlds agree or the deadline passes. `probes` and `services` are the
    /// current state.
    pub(super) fn differences(
        &self,
        world: &World,
        probes: &[Probe],
        services: &[Service],
    ) -> Result<Vec<Difference>> {
        let start = Instant::now();
        let served: Vec<_> = self.probes.iter().map(|probe| is_served(probe, probes, services)).collect();
        // Without a serving endpoint, nothing can have taken over.
        let same_port = |at: usize| {
            let before = &self.targets[at];
            !served[at] || before.len() == 1 && targets(&self.probes[at], probes, services) == *before
        };
        let same_port: Vec<_> = (0..self.probes.len()).map(same_port).collect();
        let renamed = |at: usize| {
            served[at] && renamed(&self.targets[at], &targets(&self.probes[at], probes, services))
        };
        // Flows to a node port stay when no endpoint is left, and end when their own endpoint is removed. If two
        // slices lose their endpoints one after the other, timing decides which of the two a proxy sees.
        let in_parts = |at: usize| {
            let probe = &self.probes[at];
            let split = self.split[at] || is_split(probe, services);
            split && probe.kind.of_node() && !has_endpoint(probe, probes, services)
        };
        let up_to_chance: Vec<_> = (0..self.probes.len()).map(|at| renamed(at) || in_parts(at)).collect();
        loop {
            let timeout = if start.elapsed() < DEADLINE / 2 { FIRST_TIMEOUT } else { TIMEOUT };
            let ask = |side, opened| fates(world, side, opened, &self.probes, &same_port, timeout);
            let ours = ask(Side::Switchtower, &self.switchtower)?;
            let theirs = ask(Side::KubeProxy, &self.kube_proxy)?;
            let mut differences = compare(&self.probes, &served, &ours, &theirs);
            differences.retain(|(at, _)| !up_to_chance[*at]);
            let differences: Vec<_> = differences.into_iter().map(|(_, difference)| difference).collect();
            if differences.is_empty() || start.elapsed() > DEADLINE {
                return Ok(differences);
            }
            std::thread::sleep(PAUSE);
        }
    }
}

fn open(world: &World, side: Side, probes: &[Probe]) -> Result<Vec<Vec<Open>>> {
    let mut opened: Vec<Vec<Open>> = probes.iter().map(|_| Vec::new()).collect();
    for origin in ORIGINS {
        let mine: Vec<usize> = (0..probes.len()).filter(|at| probes[*at].origin == origin).collect();
        let each = mine.iter().flat_map(|at| std::iter::repeat_n(*at, FLOWS));
        let all: Vec<usize> = each.collect();
        let (flows, outcomes) = world.namespace(side, origin).run(|| {
            let open = |at: &usize| Flow::open(probes[*at].to, world.source_port(side, origin));
            let flows = all.iter().map(open).collect::<Result<Vec<_>>>()?;
            let outcomes = Flow::ask_all(&flows.iter().collect::<Vec<_>>(), FIRST_TIMEOUT)?;
            Ok::<_, anyhow::Error>((flows, outcomes))
        })??;
        for ((at, flow), outcome) in all.iter().zip(flows).zip(outcomes) {
            if let Some(backend) = outcome.backend() {
                opened[*at].push((flow, backend.to_owned()));
            }
        }
    }
    Ok(opened)
}

/// Outcomes of flows by their previous backend.
type Fates = BTreeMap<String, BTreeSet<String>>;

fn fates(
    world: &World,
    side: Side,
    opened: &[Vec<Open>],
    probes: &[Probe],
    same_port: &[bool],
    timeout: Duration,
) -> Result<Vec<Fates>> {
    let mut fates = vec![Fates::new(); probes.len()];
    for origin in ORIGINS {
        let of_origin = |at: &usize| probes[*at].origin == origin;
        let mine: Vec<(usize, &Open)> = (0..probes.len())
            .filter(of_origin)
            .flat_map(|at| opened[at].iter().map(move |open| (at, open)))
            .collect();
        let flows: Vec<&Flow> = mine.iter().map(|(_, (flow, _))| flow).collect();
        let outcomes = world.namespace(side, origin).run(|| Flow::ask_all(&flows, timeout))??;
        for ((at, (_, before)), outcome) in mine.into_iter().zip(outcomes) {
            let fate = match outcome.backend() {
                Some(_) if !same_port[at] => "is answered".to_owned(),
                Some(backend) if backend == before => STAYS.to_owned(),
                Some(_) => "moves".to_owned(),
                None => outcome.to_string(),
            };
            fates[at].entry(before.clone()).or_default().insert(fate);
        }
    }
    Ok(fates)
}

/// Name of a Service, name of its port, target port.
type Target = (String, String, Option<u16>);

/// Checks whether the port of a Service was renamed. Between the change of the Service and that of its slices, such a
/// port has no endpoint: destinations whose flows end with the last endpoint then start new flows.
fn renamed(before: &BTreeSet<Target>, now: &BTreeSet<Target>) -> bool {
    let other_name = |(service, port, _): &Target| {
        let of_service = |target: &&Target| target.0 == *service;
        now.iter().any(|target| of_service(&target))
            && !now.iter().filter(of_service).any(|target| target.1 == *port)
    };
    before.iter().any(other_name)
}

/// The targets of all Services that claim a probe's destination.
fn targets(flow: &Probe, probes: &[Probe], services: &[Service]) -> BTreeSet<Target> {
    let same = |probe: &&Probe| probe.transport == flow.transport && probe.to == flow.to;
    let target = |probe: &Probe| {
        let service = services.iter().find(|service| service.name == probe.service);
        let port = service.and_then(|service| service.ports.iter().find(|port| port.name == probe.port));
        (probe.service.clone(), probe.port.clone(), port.and_then(|port| port.target))
    };
    probes.iter().filter(same).map(target).collect()
}

fn is_split(probe: &Probe, services: &[Service]) -> bool {
    services.iter().any(|service| service.name == probe.service && manifests::has_second(service))
}

/// Checks whether flows stay with a destination: it has a serving endpoint, or is a node port.
fn is_served(flow: &Probe, probes: &[Probe], services: &[Service]) -> bool {
    flow.kind.of_node() || has_endpoint(flow, probes, services)
}

/// Checks whether a destination has a serving endpoint now.
fn has_endpoint(flow: &Probe, probes: &[Probe], services: &[Service]) -> bool {
    let same = |probe: &&Probe| probe.transport == flow.transport && probe.to == flow.to;
    let serves = |probe: &Probe| {
        let service = services.iter().find(|service| service.name == probe.service);
        service.is_some_and(|service| {
            let port = service.ports.iter().find(|port| port.name == probe.port);
            let endpoints = service.endpoints.iter().any(|endpoint| endpoint.serving);
            let own = probe.kind != Kind::LoadBalancer || !service.load_balancer_proxy;
            own && service.labels.is_empty() && endpoints && port.is_some_and(|port| port.target.is_some())
        })
    };
    probes.iter().filter(same).any(serves)
}

/// Compares flows by the index of their probe. Backends that only one world's flows had are ignored.
fn compare(probes: &[Probe], served: &[bool], ours: &[Fates], theirs: &[Fates]) -> Vec<(usize, Difference)> {
    let mut differences = Vec::new();
    for (at, (((probe, served), ours), theirs)) in probes.iter().zip(served).zip(ours).zip(theirs).enumerate()
    {
        let differ = |backend: &String| match theirs.get(backend) {
            _ if !served => ours[backend].contains(STAYS),
            Some(fate) => *fate != ours[backend],
            None => false,
        };
        let words = |fates: &Fates| -> Answers {
            fates.iter().flat_map(|(from, to)| to.iter().map(move |to| format!("{from} {to}"))).collect()
        };
        if ours.keys().any(differ) {
            let what = format!("flows that existed before: {probe}");
            differences.push((at, Difference { what, kube_proxy: words(theirs), switchtower: words(ours) }));
        }
    }
    differences
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::ProbeResult;

    fn fates(entries: &[(&str, &str)]) -> Vec<Fates> {
        let mut fates = Fates::new();
        for (before, fate) in entries {
            fates.entry((*before).to_owned()).or_default().insert((*fate).to_owned());
        }
        vec![fates]
    }

    #[test]
    fn port_with_another_name_is_renamed() {
        let targets = |names: &[(&str, &str)]| -> BTreeSet<Target> {
            names
                .iter()
                .map(|(service, port)| ((*service).to_owned(), (*port).to_owned(), Some(8080)))
                .collect()
        };
        let before = targets(&[("web", "dns")]);
        assert!(renamed(&before, &targets(&[("web", "udp")])));
        assert!(!renamed(&before, &targets(&[("web", "dns")])));
        assert!(!renamed(&before, &targets(&[("other", "udp")])), "another Service took over");
        assert!(!renamed(&before, &targets(&[])));
    }

    #[test]
    fn flows_compared_by_common_previous_backends() {
        let to = ([10, 96, 0, 1], 80).into();
        let probes = [Probe {
            origin: Origin::Client,
            transport: Transport::Udp,
            to,
            service: "web".to_owned(),
            kind: Kind::ClusterIP,
            port: "udp".to_owned(),
            sticky: false,
        }];
        let ours = fates(&[("p1", "moves"), ("p2", "stays")]);
        let compare =
            |served, theirs: &[(&str, &str)]| compare(&probes, &[served], &ours, &fates(theirs)).len();
        assert_eq!(compare(true, &[("p1", "moves"), ("p3", "moves")]), 0);
        assert_eq!(compare(true, &[("p1", "stays"), ("p2", "stays")]), 1);
        assert_eq!(compare(true, &[("p2", &ProbeResult::Silence.to_string())]), 1);
        // No endpoint serves any more: p2 stayed, which it must not.
        assert_eq!(compare(false, &[("p1", "stays"), ("p2", "stays")]), 1);
    }
}
