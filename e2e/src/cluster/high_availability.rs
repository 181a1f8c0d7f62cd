//! Two replicas of the controller on two nodes: each serves agents, and one replaces the other.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::control_plane::Kubectl;
use super::install::NAMESPACE;
use super::layout::{Layout, Tools};
use super::shell::{say, wait_until};

/// A Service that claims the address and port of a follower.
const CLAIM: &str = "test-follower-address";
/// Port at which agents reach the controllers.
const PORT: u16 = 9_443;
/// Timeout for Pods to start and for replicas to notice each other.
const STARTED: Duration = Duration::from_secs(90);
/// Timeout of a takeover: the Lease expires after 15 seconds at most.
const TAKEN_OVER: Duration = Duration::from_secs(30);
/// Timeout of all agents to reach another replica.
const MOVED: Duration = Duration::from_secs(30);

/// Removes the leader; its agents move to the other replica, or to the one that replaces it.
///
/// # Errors
/// The replicas do not know each other, or an agent stays without one.
pub(super) fn check(layout: &Layout, tools: &Tools) -> Result<()> {
    let pair = Pair { kubectl: Kubectl::new(layout, tools), layout };
    let checked = pair.take_over();
    pair.kubectl.run(&format!("delete service --ignore-not-found {CLAIM}"))?;
    checked
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
        let (leader, follower) = wait_until("two ready controllers", STARTED, || self.both())?;
        ensure!(leader.node != follower.node, "both controllers run on {}", leader.node);
        let expected: BTreeSet<_> =
            [&leader, &follower].map(|pod| SocketAddr::new(pod.address, PORT).to_string()).into();
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
            wait_until("the follower's address in the agent's state", STARTED, || {
                let known = std::fs::read_to_string(&file).unwrap_or_default();
                let follower = SocketAddr::new(follower.address, PORT).to_string();
                ensure!(known.lines().any(|line| line == follower), "{node} knows {known:?}");
                Ok(())
            })?;
        }
        self.claim(follower.address).context("the follower's address")?;
        let budget = self.object("get poddisruptionbudget switchtower-controller")?;
        ensure!(budget["status"]["currentHealthy"] == 2, "the budget counts {}", budget["status"]);

        say(&format!("removing the leader on {}", leader.node));
        let start = Instant::now();
        self.kubectl.run(&format!(
            "delete pod --namespace {NAMESPACE} {} --force --grace-period=0 --wait=false",
            leader.name
        ))?;
        wait_until("another replica is the leader", TAKEN_OVER, || {
            let holder = self.holder()?;
            ensure!(holder != leader.name, "{holder} is");
            Ok(())
        })?;
        say(&format!("another replica is the leader after {:.1} s", start.elapsed().as_secs_f32()));
        wait_until("every agent is connected to another replica", MOVED, || self.left(&leader.name))?;
        say(&format!("every row is Ready again after {:.1} s", start.elapsed().as_secs_f32()));
        Ok(())
    }

    /// The leader and the other replica; both are ready.
    fn both(&self) -> Result<(Pod, Pod)> {
        let mut pods = self.pods()?;
        ensure!(pods.len() == 2, "ready: {pods:?}");
        let holder = self.holder()?;
        let leader = pods.iter().position(|pod| pod.name == holder);
        let leader = pods.swap_remove(leader.with_context(|| format!("{holder} is the leader"))?);
        Ok((leader, pods.remove(0)))
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

    /// Every row is Ready, and its agent is connected to another replica than this one.
    fn left(&self, replica: &str) -> Result<()> {
        for node in self.layout.node_names() {
            let row = self.object(&format!("get proxystatus {node}"))?;
            let connected = row["status"]["agent"]["connectedTo"].as_str().unwrap_or_default();
            ensure!(!connected.is_empty() && connected != replica, "{node} is connected to {connected:?}");
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
