//! Breaks agents on a real cluster: the affected node's ProxyStatus must report the reason, and the other nodes keep
//! working.
//!
//! The DaemonSet is changed so that only a deleted Pod gets the fault, and restored afterwards. Another node loses
//! its kubelet: its agent must keep working, and it takes the cluster a minute to consider the node lost.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::control_plane::Kubectl;
use super::install::NAMESPACE;
use super::layout::{Layout, Tools};
use super::machine::Machine;
use super::shell::{Results, say, wait_until};
use super::{node, pki};

const DAEMON_SET: &str = "daemonset/switchtower-node-agent";
/// Timeout: a lost stream is reported after ten seconds, and a crashed container must have restarted twice.
const SHOWN: Duration = Duration::from_secs(90);
/// ConfigMaps that replace the one written by the controller.
const FOREIGN: &str = "test-foreign-authority";
const GARBAGE: &str = "test-garbage";

/// A fault of an agent's Pod.
struct Fault {
    name: &'static str,
    /// Strategic merge patch of the Pod's template.
    template: Value,
    /// Accepted reasons on the ProxyStatus.
    reasons: &'static [&'static str],
    /// Text that the ProxyStatus message must contain.
    message: &'static str,
}

fn faults() -> Vec<Fault> {
    let container = |extra: Value| {
        let mut container = json!({"name": "node-agent"});
        for (key, value) in extra.as_object().into_iter().flatten() {
            container[key] = value.clone();
        }
        json!({"spec": {"containers": [container]}})
    };
    vec![
        Fault {
            name: "an image that does not exist",
            template: container(json!({"image": "switchtower.invalid/no-such-image:1"})),
            reasons: &["ErrImagePull", "ImagePullBackOff"],
            message: "switchtower.invalid/no-such-image:1",
        },
        Fault {
            name: "an agent that crashes",
            template: container(json!({"args": ["--no-such-flag"]})),
            reasons: &["CrashLoopBackOff"],
            message: "--no-such-flag",
        },
        Fault {
            name: "no capability NET_ADMIN",
            template: container(json!({"securityContext": {"capabilities": {"add": []}}})),
            reasons: &["KernelRefused"],
            message: "not permitted",
        },
        Fault {
            name: "no bootstrap ConfigMap",
            template: bootstrap("no-such-map"),
            reasons: &["BootstrapMissing"],
            message: "ca.crt",
        },
        Fault {
            name: "garbage in the bootstrap ConfigMap",
            template: bootstrap(GARBAGE),
            reasons: &["BootstrapInvalid"],
            message: "ca.crt",
        },
        Fault {
            name: "another authority in the bootstrap ConfigMap",
            template: bootstrap(FOREIGN),
            reasons: &["ControllerUntrusted"],
            message: ":9443",
        },
    ]
}

fn bootstrap(map: &str) -> Value {
    json!({"spec": {"volumes": [{"name": "bootstrap", "configMap": {"name": map, "optional": true}}]}})
}

/// Applies each fault to the last node, and prints a line for each and the total.
///
/// # Errors
/// A fault was not reported.
pub fn check(layout: &Layout, tools: &Tools) -> Result<()> {
    let kubectl = Kubectl::new(layout, tools);
    let Some(node) = layout.node_names().pop() else { bail!("the cluster has no nodes") };
    let bench = Bench { kubectl, layout: layout.clone(), tools: tools.clone(), node };
    let mut results = Results::default();
    bench.write_config_maps()?;
    let silent = bench.kill_a_kubelet()?;
    for fault in faults() {
        results.add(fault.name, || bench.try_one(&fault))?;
    }
    results.add("a killed kubelet, then its agent", || bench.lost(silent))?;
    bench.kubectl.run(&format!("delete configmap --namespace {NAMESPACE} {FOREIGN} {GARBAGE}"))?;
    results.end("faults")
}

struct Bench {
    kubectl: Kubectl,
    layout: Layout,
    tools: Tools,
    node: String,
}

impl Bench {
    fn write_config_maps(&self) -> Result<()> {
        let real = self
            .kubectl
            .json(&format!("get configmap --namespace {NAMESPACE} switchtower-bootstrap"))?["data"]
            .take();
        let map = |name: &str, data: Value| {
            let metadata = json!({"name": name, "namespace": NAMESPACE});
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}).to_string()
        };
        let foreign = json!({"ca.crt": pki::foreign_authority()?, "controllers": real["controllers"]});
        self.kubectl.apply(&map(FOREIGN, foreign))?;
        self.kubectl.apply(&map(GARBAGE, json!({"ca.crt": "garbage", "controllers": "garbage"}))).map(drop)
    }

    /// Kills the kubelet of a node that does not run the faults, preferably without a controller; returns the node's number.
    fn kill_a_kubelet(&self) -> Result<u8> {
        let controllers = self.kubectl.json(&format!(
            "get pods --namespace {NAMESPACE} --selector app.kubernetes.io/name=switchtower-controller"
        ))?;
        let runs_controller = |node: &str| {
            let mut pods = controllers["items"].as_array().into_iter().flatten();
            pods.any(|pod| pod["spec"]["nodeName"] == node)
        };
        let numbered = (1..).zip(self.layout.node_names()).filter(|(_, name)| *name != self.node);
        let (number, name) = numbered
            .min_by_key(|(_, name)| runs_controller(name))
            .context("no node is left for the fault")?;
        say(&format!("killed the kubelet of {name}; its agent keeps running"));
        Machine::find(&self.layout, &name)?.kill("kubelet")?;
        Ok(number)
    }

    /// Also kills the agent of the node without a kubelet; then restarts the kubelet, which must start the agent.
    fn lost(&self, number: u8) -> Result<()> {
        let name = self.layout.node_names().swap_remove(usize::from(number) - 1);
        let machine = Machine::find(&self.layout, &name)?;
        machine.kill("switchtower-node-agent")?;
        let shown = self.shows(&name, &["NodeStatusUnknown"], "Kubelet stopped posting node status");
        node::start_kubelet(&self.layout, &self.tools, &machine, number)?;
        let restored = self.all_ready();
        shown?;
        restored.context("after the kubelet's restart")
    }

    fn try_one(&self, fault: &Fault) -> Result<()> {
        say(&format!("{} on {}", fault.name, self.node));
        let spec = self.kubectl.json(&format!("get --namespace {NAMESPACE} {DAEMON_SET}"))?["spec"].take();
        let broken = json!({"spec": {
            "updateStrategy": {"type": "OnDelete", "rollingUpdate": null},
            "template": fault.template,
        }});
        let shown = self
            .change("strategic", &broken)
            .and_then(|()| self.shows(&self.node, fault.reasons, fault.message));
        let whole = json!({"spec": {"template": spec["template"], "updateStrategy": spec["updateStrategy"]}});
        let restored = self.change("merge", &whole).and_then(|()| self.all_ready());
        shown?;
        restored.context("after the fault was removed")
    }

    /// Patches the DaemonSet and replaces the node's Pod.
    fn change(&self, kind: &str, patch: &Value) -> Result<()> {
        let (kind, patch) = (format!("--type={kind}"), patch.to_string());
        let namespace = format!("--namespace={NAMESPACE}");
        self.kubectl.run_arguments(&["patch", &namespace, DAEMON_SET, &kind, "--patch", &patch])?;
        self.kubectl
            .run(&format!(
                "delete pod --namespace {NAMESPACE} --selector app.kubernetes.io/name=switchtower-node-agent \
                 --field-selector spec.nodeName={} --grace-period=1 --wait",
                self.node
            ))
            .map(drop)
    }

    /// Waits until the node's ProxyStatus has one of these reasons and the message text; the other nodes must be
    /// Ready.
    fn shows(&self, node: &str, reasons: &[&str], text: &str) -> Result<()> {
        wait_until("the reason in the ProxyStatus", SHOWN, || {
            let (ready, reason, message) = self.ready(node)?;
            ensure!(ready == "False" && reasons.contains(&reason.as_str()), "{ready} {reason} {message}");
            ensure!(message.contains(text), "{message:?} lacks {text:?}");
            Ok(())
        })?;
        for other in self.layout.node_names().iter().filter(|other| *other != node) {
            let (ready, reason, message) = self.ready(other)?;
            ensure!(ready == "True", "{other} is affected too: {reason} {message}");
        }
        Ok(())
    }

    fn all_ready(&self) -> Result<()> {
        wait_until("every node Ready", SHOWN, || {
            for node in self.layout.node_names() {
                let (ready, reason, message) = self.ready(&node)?;
                ensure!(ready == "True", "{node}: {reason} {message}");
            }
            Ok(())
        })
    }

    /// Status, reason and message of the Ready condition in a node's ProxyStatus.
    fn ready(&self, node: &str) -> Result<(String, String, String)> {
        let row = self.kubectl.json(&format!("get proxystatus {node}"))?;
        let conditions = row.pointer("/status/conditions").and_then(Value::as_array);
        let ready = conditions.into_iter().flatten().find(|known| known["type"] == "Ready");
        let ready = ready.with_context(|| format!("the ProxyStatus of {node} has no condition Ready"))?;
        let text = |key: &str| ready[key].as_str().unwrap_or_default().to_owned();
        Ok((text("status"), text("reason"), text("message")))
    }
}
