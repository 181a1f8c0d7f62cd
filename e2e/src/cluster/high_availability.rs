//! The component `high-availability`: two controllers on two nodes, of which the standby takes over.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::control_plane::Kubectl;
use super::install::{NAMESPACE, write_overlay};
use super::layout::{Layout, Tools};
use super::shell::{say, wait_until};

/// A Service that claims the address and port of the standby.
const CLAIM: &str = "test-standby-address";
/// Port at which agents reach the controllers.
const PORT: u16 = 9_443;
/// Timeout for Pods to start and for controllers to notice each other, every ten seconds.
const STARTED: Duration = Duration::from_secs(90);
/// Timeout for agents to connect to a controller whose address is only in the ConfigMap.
const DELIVERED: Duration = Duration::from_secs(180);
/// Timeout of a takeover: the Lease expires after 15 seconds at most.
const TAKEN_OVER: Duration = Duration::from_secs(30);
/// Timeout of all agents to reach the next controller.
const MOVED: Duration = Duration::from_secs(30);

/// Installs the component, removes the active controller, and restores the installation with one controller.
///
/// # Errors
/// The replicas do not know each other, or the standby does not take over.
pub(super) fn check(layout: &Layout, tools: &Tools) -> Result<()> {
    let pair = Pair { kubectl: Kubectl::new(layout, tools), layout };
    let overlay = write_overlay(layout, tools, "high-availability", &["high-availability"])?;
    pair.kubectl.run(&format!("apply -k {overlay}"))?;
    let checked = pair.take_over();
    let base = write_overlay(layout, tools, "overlay", &[])?;
    pair.kubectl.run(&format!("delete service --ignore-not-found {CLAIM}"))?;
    pair.kubectl.run(&format!("apply -k {base}"))?;
    pair.kubectl
        .run(&format!("delete --namespace {NAMESPACE} poddisruptionbudget/switchtower-controller"))?;
    // On a node without a controller before, agents learn its address from the ConfigMap, which the kubelet delivers.
    let restored = wait_until("one controller", DELIVERED, || {
        let pods = pair.pods()?;
        ensure!(pods.len() == 1 && pair.holder()? == pods[0].name, "{pods:?}");
        pair.connected_to(&pods[0].name)
    });
    checked.and(restored)
}

#[derive(Debug)]
struct Pod {
    name: String,
    node: String,
    address: IpAddr,
}

struct Pair<'a> {
    kubectl: Kubectl,
    layout: &'a Layout,
}

impl Pair<'_> {
    fn take_over(&self) -> Result<()> {
        let (active, standby) = wait_until("two ready controllers", STARTED, || self.both())?;
        ensure!(active.node != standby.node, "both controllers run on {}", active.node);
        let expected: BTreeSet<_> =
            [&active, &standby].map(|pod| SocketAddr::new(pod.address, PORT).to_string()).into();
        wait_until("both addresses in the bootstrap ConfigMap", STARTED, || {
            let map = self.object("get configmap switchtower-bootstrap")?;
            let listed = map["data"]["controllers"].as_str().unwrap_or_default();
            let listed: BTreeSet<_> =
                listed.split(|char: char| char == ',' || char.is_whitespace()).map(str::to_owned).collect();
            ensure!(expected.is_subset(&listed), "{listed:?} lacks some of {expected:?}");
            Ok(())
        })?;
        for node in self.layout.node_names() {
            let file = self.layout.machine_var(&node).join("lib/switchtower/controllers");
            wait_until("the standby's address in the agent's state", STARTED, || {
                let known = std::fs::read_to_string(&file).unwrap_or_default();
                let standby = SocketAddr::new(standby.address, PORT).to_string();
                ensure!(known.lines().any(|line| line == standby), "{node} knows {known:?}");
                Ok(())
            })?;
        }
        self.claim(standby.address).context("the standby's address")?;
        let budget = self.object("get poddisruptionbudget switchtower-controller")?;
        ensure!(budget["status"]["currentHealthy"] == 2, "the budget counts {}", budget["status"]);

        say(&format!("removing the active controller on {}", active.node));
        let start = Instant::now();
        self.kubectl.run(&format!(
            "delete pod --namespace {NAMESPACE} {} --force --grace-period=0 --wait=false",
            active.name
        ))?;
        wait_until("the standby holds the Lease", TAKEN_OVER, || {
            let holder = self.holder()?;
            ensure!(holder == standby.name, "{holder} holds it");
            Ok(())
        })?;
        say(&format!("the standby holds the Lease after {:.1} s", start.elapsed().as_secs_f32()));
        wait_until("every agent is connected to the standby", MOVED, || self.connected_to(&standby.name))?;
        say(&format!("every row is Ready again after {:.1} s", start.elapsed().as_secs_f32()));
        Ok(())
    }

    /// The active and the standby controller; both are ready.
    fn both(&self) -> Result<(Pod, Pod)> {
        let mut pods = self.pods()?;
        ensure!(pods.len() == 2, "ready: {pods:?}");
        let holder = self.holder()?;
        let active = pods.iter().position(|pod| pod.name == holder);
        let active = pods.swap_remove(active.with_context(|| format!("{holder} holds the Lease"))?);
        Ok((active, pods.remove(0)))
    }

    /// A Service that claims an address of a controller is refused it.
    fn claim(&self, address: IpAddr) -> Result<()> {
        let service = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": CLAIM, "namespace": "default"},
            "spec": {"externalIPs": [address], "ports": [{"port": PORT, "protocol": "TCP"}]},
        });
        self.kubectl.apply(&service.to_string())?;
        wait_until("an Event about the claimed address", STARTED, || {
            let events = self.kubectl.run(&format!(
                "get events --namespace default --output name --field-selector \
                 reason=ControlPlaneAddress,involvedObject.name={CLAIM}"
            ))?;
            ensure!(!events.trim().is_empty(), "no Event");
            Ok(())
        })
    }

    /// Every row is Ready, and its agent is connected to this replica.
    fn connected_to(&self, replica: &str) -> Result<()> {
        for node in self.layout.node_names() {
            let row = self.object(&format!("get proxystatus {node}"))?;
            let connected = row["status"]["agent"]["connectedTo"].as_str().unwrap_or_default();
            ensure!(connected == replica, "{node} is connected to {connected:?}");
            let conditions = row.pointer("/status/conditions").and_then(Value::as_array);
            let ready = conditions.into_iter().flatten().find(|known| known["type"] == "Ready");
            ensure!(ready.is_some_and(|ready| ready["status"] == "True"), "{node}: {ready:?}");
        }
        Ok(())
    }

    /// Name of the Pod that holds the Lease. The identity also has a part that is new after each restart.
    fn holder(&self) -> Result<String> {
        let lease = self.object("get lease switchtower-controller")?;
        let identity = lease["spec"]["holderIdentity"].as_str().unwrap_or_default();
        Ok(identity.split('_').next().unwrap_or_default().to_owned())
    }

    /// Ready controllers that are not being deleted.
    fn pods(&self) -> Result<Vec<Pod>> {
        let pods = self.object("get pods --selector app.kubernetes.io/name=switchtower-controller")?;
        let mut found = Vec::new();
        for pod in pods["items"].as_array().into_iter().flatten() {
            let conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
            let ready =
                conditions.into_iter().any(|known| known["type"] == "Ready" && known["status"] == "True");
            if !ready || !pod["metadata"]["deletionTimestamp"].is_null() {
                continue;
            }
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let address = text(&pod["status"]["hostIP"]).parse().context("hostIP")?;
            let (name, node) = (text(&pod["metadata"]["name"]), text(&pod["spec"]["nodeName"]));
            found.push(Pod { name, node, address });
        }
        Ok(found)
    }

    fn object(&self, line: &str) -> Result<Value> {
        self.kubectl.json(&format!("{line} --namespace {NAMESPACE}"))
    }
}
