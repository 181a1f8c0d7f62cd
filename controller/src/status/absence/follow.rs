//! Watches the Pods of the agents' ServiceAccount in the controller's own namespace.

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt as _, watcher as watch};
use kube::{Api, Client};

use super::Agents;
use super::pod::{AgentPod, agent_pod};
use crate::watch::{Lean, Restores};

/// Watches the Pods until the process ends. Retries while the controller may not read Pods; rows then have no blocker.
pub async fn run(
    client: Client,
    namespace: String,
    service_account: String,
    agents: Agents,
    mut restores: Restores,
) {
    let api: Api<Lean<Pod>> = Api::namespaced(client, &namespace);
    let selector = format!("spec.serviceAccountName={service_account}");
    let follow =
        || Box::pin(watch(api.clone(), watcher::Config::default().fields(&selector)).default_backoff());
    let mut events = follow();
    let mut listed: Vec<AgentPod> = Vec::new();
    let mut logged = false;
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            Ok(()) = restores.changed() => {
                events = follow();
                continue;
            }
        };
        let Some(event) = event else { return };
        match event {
            Ok(Event::Init) => listed.clear(),
            Ok(Event::InitApply(pod)) => listed.extend(agent_pod(&pod.0)),
            Ok(Event::InitDone) => {
                agents.pods_listed(std::mem::take(&mut listed));
                logged = false;
            }
            Ok(Event::Apply(pod)) => agent_pod(&pod.0).into_iter().for_each(|pod| agents.pod(pod)),
            Ok(Event::Delete(pod)) => {
                agent_pod(&pod.0).into_iter().for_each(|pod| agents.pod_gone(&pod.node, &pod.name));
            }
            Err(error) => {
                if !std::mem::replace(&mut logged, true) {
                    tracing::warn!(%error, %namespace, "failed to watch the agents' Pods; rows do not show why an agent is absent; retrying");
                }
            }
        }
    }
}
