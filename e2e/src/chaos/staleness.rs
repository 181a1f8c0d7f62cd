//! How stale each kernel is, and whether its row reports that.
//!
//! A Service gets a new endpoint port every second. The highest port in a kernel shows which change it holds, read with
//! `nft`, independently of agents and controllers.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use serde_json::json;
use switchtower_crds::{ProxyStatus, ProxyStatusStatus};

use super::Phase;
use crate::lab::objects;
use crate::observe::kernel;
use crate::scene::Scene;
use crate::switchtower::FleetNode;

/// Interval between changes.
const CHANGES: Duration = Duration::from_secs(1);
/// Interval between readings of a node.
const READINGS: Duration = Duration::from_millis(250);
/// Port of the first change.
const FIRST_PORT: usize = 30_000;
/// Number of ports, which are used in turn.
const PORTS: usize = 30_000;
/// Timeout of a request for a row.
const ROW_TIMEOUT: Duration = Duration::from_secs(2);
const SERVICE: &str = "marker";
const POD: &str = "a1";

/// Times at which the API server confirmed the changes.
#[derive(Debug, Default)]
pub(super) struct Changes(Mutex<Vec<Instant>>);

impl Changes {
    fn written(&self) -> Vec<Instant> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes changes until the end.
    ///
    /// # Errors
    /// The API server refuses.
    pub(super) fn make(&self, scene: &Scene, phase: &Phase) -> Result<()> {
        scene.service(SERVICE, &json!({"ports": [{"name": "tcp", "protocol": "TCP", "port": 80}]}));
        let (pod, node) = scene.fleet.pod(POD)?;
        let endpoints = [objects::endpoint(pod, &node.net, false)];
        let mut number = 0;
        phase.repeat(CHANGES, || {
            let ports = [("tcp", "TCP", u16::try_from(FIRST_PORT + number % PORTS)?)];
            let slice = objects::slice(&scene.namespace, SERVICE, SERVICE, false, &ports, &endpoints);
            scene.fleet.kube().apply(&slice)?;
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Instant::now());
            number += 1;
            Ok(())
        })
    }
}

/// What was seen of a node during a fault.
#[derive(Debug, Clone, Default)]
pub(super) struct Sight {
    /// Longest time for which the kernel lacked a change.
    pub(super) stale: Duration,
    /// Longest time for which the kernel lacked a change while the row said that the node is ready.
    pub(super) untrue: Duration,
    /// States and reasons of the row, other than Synced.
    pub(super) said: BTreeSet<String>,
}

/// Sight of one node, reset for each fault.
#[derive(Debug, Default)]
pub(super) struct Observer(Mutex<Sight>);

impl Observer {
    /// Returns what was seen since the last call.
    pub(super) fn take(&self) -> Sight {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Reads kernel and row of a node until the end.
    ///
    /// # Errors
    /// The kernel cannot be read.
    pub(super) fn observe(
        &self,
        scene: &Scene,
        node: &FleetNode,
        changes: &Changes,
        phase: &Phase,
    ) -> Result<()> {
        while !phase.is_over() {
            let row = read_row(scene, &node.net.name);
            // Written before the kernel is read: a later change may not have arrived.
            let written = changes.written();
            let held = marker(node)?;
            let missing = written.get(held.map_or(0, |held| held + 1));
            let stale = missing.map_or(Duration::ZERO, Instant::elapsed);
            let mut sight = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            sight.stale = sight.stale.max(stale);
            if let Some(row) = row {
                if is_ready(&row) {
                    sight.untrue = sight.untrue.max(stale);
                }
                if row.state != "Synced" {
                    sight.said.insert(summary(&row));
                }
            }
            drop(sight);
            std::thread::sleep(READINGS);
        }
        Ok(())
    }
}

/// Number of the last change that the kernel holds.
fn marker(node: &FleetNode) -> Result<Option<usize>> {
    let backends = kernel::map_elements(&node.net.namespace, "ip", "backends").context("reading a kernel")?;
    let numbers = backends.iter().flat_map(|text| text.split(|character: char| !character.is_ascii_digit()));
    let ports = numbers.filter_map(|text| text.parse::<usize>().ok()?.checked_sub(FIRST_PORT));
    Ok(ports.filter(|number| *number < PORTS).max())
}

/// `None` while the API server does not answer.
fn read_row(scene: &Scene, node: &str) -> Option<ProxyStatusStatus> {
    let api: Api<ProxyStatus> = Api::all(scene.fleet.kube().client());
    let row = async { tokio::time::timeout(ROW_TIMEOUT, api.get(node)).await };
    scene.fleet.kube().block_on(row).ok()?.ok()?.status
}

/// Returns true if the row says that the node is ready, and has not expired.
fn is_ready(row: &ProxyStatusStatus) -> bool {
    let ready = row.conditions.iter().any(|one| one.type_ == "Ready" && one.status == "True");
    let expired = row.stale_after.as_ref().is_some_and(|at| at.0 < Timestamp::now());
    ready && !expired
}

fn summary(row: &ProxyStatusStatus) -> String {
    let failed = row.conditions.iter().find(|one| one.type_ == "Ready" && one.status != "True");
    failed.map_or_else(|| row.state.clone(), |ready| format!("{}: {}", row.state, ready.reason))
}
