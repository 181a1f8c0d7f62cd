//! Extreme events in a joined fleet: their duration and cost, and the delay of other changes while they last.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::oneshot;

use super::agent::Agents;
use super::latency::Latency;
use super::trickle::Trickle;
use super::{Measured, load};

/// Nodes whose agents read one byte per second.
pub(super) const SLOW_READERS: usize = 50;
/// Endpoints of the large Service.
const LARGE: usize = 20_000;
/// Time in which all agents restart one after the other.
const ROLLING: Duration = Duration::from_secs(30);
/// Time for which slow readers are connected.
const SLOW: Duration = Duration::from_secs(15);
/// Endpoint changes of other Services per second.
const PROBES: u32 = 5;

/// An extreme event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// Every Service gets a label.
    Labels,
    /// Every Service gets session affinity.
    Affinity,
    /// A Service with 20,000 endpoints is created.
    LargeService,
    /// 50 agents join that read one byte per second.
    SlowReaders,
    /// All agents restart within 30 seconds.
    RollingRestart,
    /// The API server restarts.
    ApiServerRestart,
}

impl Event {
    const ALL: [Self; 6] = [
        Self::Labels,
        Self::Affinity,
        Self::LargeService,
        Self::SlowReaders,
        Self::RollingRestart,
        Self::ApiServerRestart,
    ];
}

impl fmt::Display for Event {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Labels => write!(formatter, "a label for every Service"),
            Self::Affinity => write!(formatter, "session affinity for every Service"),
            Self::LargeService => write!(formatter, "a new Service with {LARGE} endpoints"),
            Self::SlowReaders => write!(formatter, "{SLOW_READERS} agents that read one byte per second"),
            Self::RollingRestart => write!(formatter, "restart of all agents within {} s", ROLLING.as_secs()),
            Self::ApiServerRestart => write!(formatter, "restart of the API server"),
        }
    }
}

/// Figures of one event. CPU time and memory are those of the controller.
#[derive(Debug, Serialize, Deserialize)]
pub struct Extreme {
    /// The event.
    pub event: Event,
    /// Duration of the event itself, in seconds.
    pub event_seconds: f64,
    /// From the end of the event until all agents held a change that was written after it, in seconds.
    pub settled_seconds: f64,
    /// CPU time from the start of the event until then, in seconds.
    pub cpu: f64,
    /// Resident memory then, in MiB.
    pub memory: f64,
    /// Updates that each node received.
    pub updates_per_node: f64,
    /// Delay of endpoint changes of other Services during the event; `None` if the API server takes none.
    pub probes: Option<Latency>,
}

/// Tokens of the slow readers, and the directory for their files.
pub(super) struct Extras<'a> {
    pub(super) tokens: &'a [String],
    pub(super) directory: &'a Path,
}

impl Measured<'_> {
    /// Runs all events one after the other.
    pub(super) fn extremes(
        &self,
        agents: &mut Agents,
        extras: &Extras<'_>,
        progress: &dyn Fn(&str),
    ) -> Result<Vec<Extreme>> {
        let mut all = Vec::new();
        for event in Event::ALL {
            progress(&event.to_string());
            all.push(self.extreme(event, agents, extras).with_context(|| event.to_string())?);
        }
        Ok(all)
    }

    fn extreme(&self, event: Event, agents: &mut Agents, extras: &Extras<'_>) -> Result<Extreme> {
        agents.record();
        let before = self.usage()?;
        let probes = if event == Event::ApiServerRestart {
            self.product.control_plane().restart_api_server()?;
            None
        } else {
            Some(self.probe_during(|| self.cause(event, agents, extras))?)
        };
        let ended = self.usage()?;
        let last = self.product.kube().block_on(self.load.change())?;
        let settled =
            agents.wait("the last change", self.patience(), |agent| agent.slices() >= last.version)?;
        let after = self.usage()?;
        let updates = agents.take();
        Ok(Extreme {
            event,
            event_seconds: ended.at.duration_since(before.at).as_secs_f64(),
            settled_seconds: settled.duration_since(ended.at).as_secs_f64(),
            cpu: after.cpu - before.cpu,
            memory: after.memory,
            updates_per_node: self.updates_per_node(&updates),
            probes: probes.map(|changes| Latency::of(&changes, &updates).0),
        })
    }

    /// Changes endpoints while `cause` runs.
    fn probe_during(&self, cause: impl FnOnce() -> Result<()>) -> Result<Vec<load::Change>> {
        let (done, ended) = oneshot::channel::<()>();
        std::thread::scope(|scope| {
            let probes = scope.spawn(|| {
                let ended = async {
                    // An error means that `cause` failed.
                    let _ = ended.await;
                };
                self.product.kube().block_on(self.load.run_until(PROBES, ended))
            });
            let caused = cause();
            drop(done);
            let probes = probes.join().map_err(|_| anyhow::anyhow!("the probes panicked"))?;
            caused.and(probes)
        })
    }

    fn cause(&self, event: Event, agents: &mut Agents, extras: &Extras<'_>) -> Result<()> {
        let (kube, client) = (self.product.kube(), self.product.kube().client());
        let patch = |patch| kube.block_on(load::patch_services(&client, self.plan.services, &patch));
        match event {
            Event::Labels => patch(json!({"metadata": {"labels": {"fleet": "labelled"}}})),
            Event::Affinity => patch(json!({"spec": {"sessionAffinity": "ClientIP"}})),
            Event::LargeService => kube.block_on(load::create_large(&client, LARGE, self.plan.nodes)),
            Event::SlowReaders => self.slow_readers(extras),
            Event::RollingRestart => {
                let before = agents.returns();
                agents.restart_all(ROLLING);
                agents.wait_for_return(&before, self.patience()).map(drop)
            }
            Event::ApiServerRestart => Ok(()),
        }
    }

    fn slow_readers(&self, extras: &Extras<'_>) -> Result<()> {
        let trickle = Trickle::start(self.runtime, self.product.controller_address())?;
        let path = extras.directory.join("controllers");
        std::fs::write(&path, format!("{}\n", trickle.address()))?;
        let slow = Agents::start(self.runtime, self.plan.nodes, extras.tokens, extras.directory, 0)?;
        std::thread::sleep(SLOW);
        drop(slow);
        Ok(())
    }
}
