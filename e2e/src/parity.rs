//! Differential test: the same cluster state through the real kube-proxy and through Switchtower.
//!
//! There are one API server and two laboratories with the same nodes and pods. In one, kube-proxy programs node n1;
//! in the other, an agent does. The same probes run through both, to every address of every Service: from a local
//! pod, a pod that is an endpoint, a pod of another node, a host process and an off-cluster client. The test compares
//! the backend, the source address that it saw, and whether other probes were refused or got no answer.

mod both;
pub mod case;
mod compare;
mod flows;
pub mod generate;
mod health;
mod manifests;
mod plan;
mod probes;
mod report;
pub mod settings;
mod world;

use anyhow::Result;

pub use both::Both;
pub use compare::{Agreed, Answers, Difference, Disagreement};
pub use health::essence;
pub use probes::{Kind, ORIGINS, Origin, Probe};
pub use report::{explain, report};
pub use world::World;

use case::{Case, Step};
use flows::Flows;
use world::Side;

/// Result of a case.
#[derive(Debug, Clone)]
pub enum Verdict {
    /// The proxies agree in every state.
    Agreement {
        /// Results that both proxies agree on, one entry per state.
        states: Vec<Vec<Agreed>>,
        /// Results of kube-proxy that differed once and agreed on a second attempt.
        wavered: Vec<Difference>,
    },
    /// The first state in which they disagree.
    Disagreement(Box<Disagreement>),
}

/// Runs a case until the proxies disagree.
///
/// # Errors
/// The laboratory fails, which proves nothing about the proxies.
pub fn run(world: &mut World, case: &Case) -> Result<Verdict> {
    let mut services = case.services.clone();
    let (mut agreements, mut wavered) = (Vec::new(), Vec::new());
    world.reset(&services)?;
    world.set(&case.settings)?;
    let mut steps = case.steps.iter();
    let mut flows: Option<Flows> = None;
    loop {
        world.settle()?;
        let probes = plan::probes(world, &services)?;
        let compare::Compared { agreed, mut differences, wavered: once } = compare::compare(world, &probes)?;
        wavered.extend(once);
        differences.extend(health::differences(world, &services)?);
        if let Some(flows) = flows {
            differences.extend(flows.differences(world, &probes, &services)?);
        }
        if !differences.is_empty() {
            let after = agreements.len();
            let rulesets = [world.ruleset(Side::KubeProxy)?, world.ruleset(Side::Switchtower)?];
            let found = Disagreement { case: case.clone(), after, differences, rulesets };
            return Ok(Verdict::Disagreement(Box::new(found)));
        }
        agreements.push(agreed);
        let Some(step) = steps.next() else {
            return Ok(Verdict::Agreement { states: agreements, wavered });
        };
        let last = agreements.last().map(Vec::as_slice).unwrap_or_default();
        flows = Some(Flows::open(world, last, &services)?);
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
    }
}

/// Shrinks a disagreeing case as far as possible within `attempts` runs.
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
            if let Verdict::Disagreement(found) = run(world, &case)? {
                smallest = *found;
                continue 'smaller;
            }
        }
        return Ok(smallest);
    }
}
