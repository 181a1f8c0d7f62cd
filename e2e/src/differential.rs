//! The differential test: the same cluster state through the real kube-proxy and through Switchtower.
//!
//! One API server; two laboratories with the same nodes and pods. kube-proxy programs node n1 of one, an agent
//! node n1 of the other, and the same probes run through both: from a local pod, from a pod that is an endpoint,
//! from a pod of another node, from a host process and from an off-cluster client, to every address of every
//! Service. Compared are who answered, the source that they saw, and whether others were refused or met silence.

pub mod case;
mod compare;
pub mod generate;
mod manifests;
mod plan;
mod world;

use anyhow::Result;

pub use compare::{Disagreement, report};
pub use world::World;

use case::{Case, Step};

/// Sources that the off-cluster client's range of a Service can name.
pub(crate) const CLIENT_RANGE_V4: &str = "198.18.0.0/16";
pub(crate) const CLIENT_RANGE_V6: &str = "fd18::/16";

/// Runs a case; returns the first state in which the proxies disagree.
///
/// # Errors
/// The laboratory fails, which says nothing about the proxies.
pub fn run(world: &mut World, case: &Case) -> Result<Option<Disagreement>> {
    let mut services = case.services.clone();
    world.reset()?;
    for service in &services {
        world.apply(service)?;
    }
    let mut done = Vec::new();
    let mut steps = case.steps.iter();
    loop {
        world.settle()?;
        let probes = plan::probes(world, &services)?;
        let differences = compare::differences(world, &probes)?;
        if !differences.is_empty() {
            return Ok(Some(Disagreement { case: case.clone(), after: done.len(), differences }));
        }
        let Some(step) = steps.next() else { return Ok(None) };
        match step {
            Step::Apply(service) => {
                services.retain(|other| other.name != service.name);
                services.push(service.clone());
                world.apply(service)?;
            }
            Step::Delete(name) => {
                services.retain(|other| other.name != *name);
                world.delete(name)?;
            }
        }
        done.push(step);
    }
}

/// Makes a case that disagrees as small as it gets within `attempts` runs.
///
/// # Errors
/// As [`run`].
pub fn shrink(world: &mut World, found: Disagreement, mut attempts: usize) -> Result<Disagreement> {
    let mut smallest = found;
    'smaller: loop {
        for case in smallest.case.shrink() {
            if attempts == 0 {
                return Ok(smallest);
            }
            attempts -= 1;
            if let Some(found) = run(world, &case)? {
                smallest = found;
                continue 'smaller;
            }
        }
        return Ok(smallest);
    }
}
