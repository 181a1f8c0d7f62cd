//! Destinations of the probes of a trial.
//!
//! A trial searches the view's frontends once; its rounds only visit the results, so their cost does not depend on the
//! cluster.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use switchtower_proto::v1::{FrontendKind, LayerKind, Probe, ProbeKind};

use super::State;
use super::merge::SPECIFIC_FIRST;
use super::pack::{FrontendId, IpFamily, PoolId, PortId};

const TCP: u8 = 6;

/// Round of probes.
#[derive(Debug, Clone, PartialEq)]
pub struct Round {
    /// Number, which the results repeat.
    pub number: u64,
    /// Destinations, at least one per probe.
    pub targets: Vec<Target>,
}

/// Connection of a round.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// The probe.
    pub probe: Probe,
    /// Destination; `None` if there is none.
    pub address: Option<SocketAddr>,
    /// Reason for a missing destination.
    pub absent: Option<String>,
}

/// Position of a probe, and a frontend for it.
pub(super) type Found = (usize, FrontendId);

impl State {
    /// Returns the round of probes to run now, if any. Call it only while the kernel holds the view and the settings in
    /// force.
    pub fn next_round(&mut self, now: Instant) -> Option<Round> {
        let (number, probes) = self.trials.round(now)?;
        let found = match self.trials.frontends.take() {
            Some(found) => found,
            None => self.find_frontends(&probes),
        };
        let mut targets: Vec<Target> = found
            .iter()
            .filter_map(|(index, id)| Some((probes.get(*index)?, id)))
            .flat_map(|(probe, id)| self.targets_of(probe, id))
            .collect();
        for (index, probe) in probes.into_iter().enumerate() {
            let addressed = targets.iter().any(|target| target.probe.name == probe.name);
            if !addressed {
                let what = if found.iter().any(|(at, _)| *at == index) {
                    "the Node has no address of the Service's families".to_owned()
                } else {
                    nothing_found(&probe)
                };
                targets.push(Target { probe, address: None, absent: Some(what) });
            }
        }
        self.trials.frontends = Some(found);
        Some(Round { number, targets })
    }

    fn find_frontends(&self, probes: &[Probe]) -> Vec<Found> {
        let prefixes: Vec<String> =
            probes.iter().map(|probe| format!("{}\0{}\0", probe.namespace, probe.service)).collect();
        let mut all: Vec<(usize, FrontendId, PortId, FrontendKind)> = Vec::new();
        for (id, frontend) in &self.layer(LayerKind::Cluster).frontends {
            if id.protocol != TCP {
                continue;
            }
            let text = self.ports.text(frontend.port);
            let matching =
                prefixes.iter().enumerate().filter(|(_, prefix)| text.starts_with(prefix.as_str()));
            all.extend(matching.map(|(index, _)| (index, *id, frontend.port, frontend.kind())));
        }
        let mut found = Vec::new();
        for (index, probe) in probes.iter().enumerate() {
            let own = || all.iter().filter(|(at, ..)| *at == index);
            let number = probe.port.parse::<u16>().ok();
            // The port number of a Service is that of its ClusterIP; a NodePort has another.
            let numbered: BTreeSet<PortId> = own()
                .filter(|(_, id, _, kind)| *kind == FrontendKind::ClusterIp && Some(id.port) == number)
                .map(|(_, _, port, _)| *port)
                .collect();
            let kind = match probe.kind() {
                ProbeKind::NodePort => FrontendKind::NodePort,
                ProbeKind::ClusterIp | ProbeKind::Unspecified => FrontendKind::ClusterIp,
            };
            let wanted = own().filter(|(_, _, port, own_kind)| {
                let right = match number {
                    _ if probe.port.is_empty() => true,
                    Some(_) => numbered.contains(port),
                    None => self.ports.get(*port).port == probe.port,
                };
                right && *own_kind == kind
            });
            found.extend(wanted.map(|(index, id, ..)| (*index, *id)));
        }
        found.sort_unstable();
        found
    }

    fn targets_of(&self, probe: &Probe, id: &FrontendId) -> Vec<Target> {
        let addresses: Vec<IpAddr> = if id.any {
            let node = self.node().map(|node| node.addresses.as_slice()).unwrap_or_default();
            let own = node.iter().filter_map(|bytes| address(bytes));
            own.filter(|own| own.is_ipv4() == (id.family == IpFamily::V4)).collect()
        } else {
            address(&id.unpack().address).into_iter().collect()
        };
        let absent = self.nothing_behind(id);
        let target = |ip| Target {
            probe: probe.clone(),
            address: Some(SocketAddr::new(ip, id.port)),
            absent: absent.clone(),
        };
        addresses.into_iter().map(target).collect()
    }

    /// Returns the reason why a connection to a frontend must fail, whatever the settings.
    fn nothing_behind(&self, id: &FrontendId) -> Option<String> {
        let Some(frontend) = self.layer(LayerKind::Cluster).frontends.get(id) else {
            return Some("the Service no longer has this address and port".to_owned());
        };
        let pool = PoolId { port: frontend.port, family: id.family, role: frontend.inside_role() };
        let layers = SPECIFIC_FIRST.iter().map(|kind| self.layer(*kind));
        let members = layers.filter_map(|layer| layer.pools.get(&pool)).next();
        let empty = members.is_none_or(|members| members.len() == 0);
        empty.then(|| "the Service has no endpoint for this node".to_owned())
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

fn nothing_found(probe: &Probe) -> String {
    let Probe { namespace, service, port, .. } = probe;
    let what = match probe.kind() {
        ProbeKind::NodePort => "a NodePort",
        ProbeKind::ClusterIp | ProbeKind::Unspecified => "a ClusterIP",
    };
    let of = if port.is_empty() { String::new() } else { format!(" for port {port}") };
    format!("the Service {namespace}/{service} has no TCP port with {what}{of}")
}

#[cfg(test)]
mod tests;
