//! Nodes on which the agent cannot do its work, on a real cluster: the reason is on that node's row, and the
//! other nodes go on.
//!
//! The DaemonSet is changed so that only a Pod that is deleted gets the fault; afterwards it is what it was.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::control_plane::Kubectl;
use super::install::NAMESPACE;
use super::layout::{Layout, Tools};
use super::shell::{print, say, wait_until};

const DAEMON_SET: &str = "daemonset/switchtower-node-agent";
/// A lost stream shows after ten seconds; a crashed container must have been started again twice.
const SHOWN: Duration = Duration::from_secs(90);

/// One thing that is wrong with an agent's Pod.
struct Fault {
    name: &'static str,
    /// Over the Pod's template, as a strategic merge patch.
    template: Value,
    /// Any of these reasons on the row.
    reasons: &'static [&'static str],
    /// The row's message holds it.
    words: &'static str,
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
            words: "switchtower.invalid/no-such-image:1",
        },
        Fault {
            name: "an agent that crashes",
            template: container(json!({"args": ["--no-such-flag"]})),
            reasons: &["CrashLoopBackOff"],
            words: "--no-such-flag",
        },
        Fault {
            name: "no capability NET_ADMIN",
            template: container(json!({"securityContext": {"capabilities": {"add": []}}})),
            reasons: &["KernelRefused"],
            words: "not permitted",
        },
        Fault {
            name: "no bootstrap ConfigMap",
            template: json!({"spec": {"volumes": [
                {"name": "bootstrap", "configMap": {"name": "no-such-map", "optional": true}},
            ]}}),
            reasons: &["BootstrapMissing"],
            words: "ca.crt",
        },
    ]
}

/// Tries each fault on the last node, and prints a line for each and the total. An error if one did not show.
pub fn check(layout: &Layout, tools: &Tools) -> Result<()> {
    let kubectl = Kubectl::new(layout, tools);
    let Some(node) = layout.node_names().pop() else { bail!("the cluster has no nodes") };
    let bench = Bench { kubectl, layout: layout.clone(), node };
    let (mut passed, mut failed) = (0, 0);
    for fault in faults() {
        let start = Instant::now();
        match bench.try_one(&fault) {
            Ok(()) => {
                passed += 1;
                print(&format!("test {} ... ok ({:.0} s)", fault.name, start.elapsed().as_secs_f32()))?;
            }
            Err(error) => {
                failed += 1;
                print(&format!("test {} ... FAILED: {error:#}", fault.name))?;
            }
        }
    }
    print(&format!("faults: {passed} passed, {failed} failed"))?;
    ensure!(failed == 0, "{failed} faults did not show as they should");
    Ok(())
}

struct Bench {
    kubectl: Kubectl,
    layout: Layout,
    node: String,
}

impl Bench {
    fn try_one(&self, fault: &Fault) -> Result<()> {
        say(&format!("{} on {}", fault.name, self.node));
        let spec = self.object(&format!("get --namespace {NAMESPACE} {DAEMON_SET}"))?["spec"].take();
        let broken = json!({"spec": {
            "updateStrategy": {"type": "OnDelete", "rollingUpdate": null},
            "template": fault.template,
        }});
        let shown = self.change("strategic", &broken).and_then(|()| self.shows(fault));
        let whole = json!({"spec": {"template": spec["template"], "updateStrategy": spec["updateStrategy"]}});
        let restored = self.change("merge", &whole).and_then(|()| self.all_ready());
        shown?;
        restored.context("after the fault was gone")
    }

    /// Patches the DaemonSet and replaces the node's Pod.
    fn change(&self, kind: &str, patch: &Value) -> Result<()> {
        let (kind, patch) = (format!("--type={kind}"), patch.to_string());
        let namespace = format!("--namespace={NAMESPACE}");
        self.kubectl.run_words(&["patch", &namespace, DAEMON_SET, &kind, "--patch", &patch])?;
        self.kubectl
            .run(&format!(
                "delete pod --namespace {NAMESPACE} --selector app.kubernetes.io/name=switchtower-node-agent \
                 --field-selector spec.nodeName={} --grace-period=1 --wait",
                self.node
            ))
            .map(drop)
    }

    fn shows(&self, fault: &Fault) -> Result<()> {
        wait_until("the reason on the row", SHOWN, || {
            let (ready, reason, message) = self.ready(&self.node)?;
            ensure!(
                ready == "False" && fault.reasons.contains(&reason.as_str()),
                "{ready} {reason} {message}"
            );
            ensure!(message.contains(fault.words), "{message:?} lacks {:?}", fault.words);
            Ok(())
        })?;
        for other in self.layout.node_names().iter().filter(|other| **other != self.node) {
            let (ready, reason, message) = self.ready(other)?;
            ensure!(ready == "True", "{other} is affected: {reason} {message}");
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

    /// Status, reason and message of the Ready condition of a node's row.
    fn ready(&self, node: &str) -> Result<(String, String, String)> {
        let row = self.object(&format!("get proxystatus {node}"))?;
        let conditions = row.pointer("/status/conditions").and_then(Value::as_array);
        let ready = conditions.into_iter().flatten().find(|known| known["type"] == "Ready");
        let ready = ready.with_context(|| format!("the row of {node} has no condition Ready"))?;
        let text = |key: &str| ready[key].as_str().unwrap_or_default().to_owned();
        Ok((text("status"), text("reason"), text("message")))
    }

    fn object(&self, line: &str) -> Result<Value> {
        let text = self.kubectl.run(&format!("{line} --output json"))?;
        serde_json::from_str(&text).with_context(|| format!("`kubectl {line}` printed no JSON"))
    }
}
