//! The demonstration on a real cluster: a Deployment behind a Service, shown with plain kubectl.
//!
//! Every step checks what it states.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use super::control_plane::Kubectl;
use super::install::NAMESPACE;
use super::layout::{Layout, Tools};
use super::shell::{print, say, wait_until};

pub(super) const MANIFESTS: &str = include_str!("demo.yaml");
/// Connections per check of a Service: with 6 pods, one of them is missed with a probability of 1 in 10,000.
const CONNECTIONS: u32 = 60;

struct Demo {
    kubectl: Kubectl,
    layout: Layout,
}

/// Runs the demonstration and removes its objects, also after a failure.
pub fn demo(layout: &Layout, tools: &Tools) -> Result<()> {
    let start = Instant::now();
    let demo = Demo { kubectl: Kubectl::new(layout, tools), layout: layout.clone() };
    let result = demo.run();
    let removed = demo.kubectl.run("delete namespace demo --ignore-not-found --wait=false");
    result?;
    removed?;
    say(&format!("done in {:.1} s", start.elapsed().as_secs_f32()));
    Ok(())
}

impl Demo {
    fn run(&self) -> Result<()> {
        say("a Deployment of three pods behind a Service, and a client");
        self.kubectl.apply(MANIFESTS)?;
        self.show("rollout status --namespace demo deployment/web --timeout=60s")?;
        self.kubectl.run("wait --namespace demo --for=condition=Ready pod/client --timeout=60s")?;
        self.backends_become(3)?;
        self.show("get proxystatus")?;

        say("scaled up to six, then down to two: the pods that answer follow");
        self.scale(6)?;
        self.scale(2)?;

        say("no pods: refused at once, not timed out");
        self.kubectl.run("scale --namespace demo deployment/web --replicas=0")?;
        wait_until("the refusal", Duration::from_secs(30), || self.refused())?;
        self.scale(3)?;

        self.kill_an_agent()?;
        self.show("get proxystatus")
    }

    /// Runs kubectl and prints the command with its output.
    fn show(&self, line: &str) -> Result<()> {
        print(&format!("$ kubectl {line}"))?;
        print(self.kubectl.run(line)?.trim_end())
    }

    fn scale(&self, replicas: usize) -> Result<()> {
        self.show(&format!("scale --namespace demo deployment/web --replicas={replicas}"))?;
        self.kubectl.run("rollout status --namespace demo deployment/web --timeout=60s")?;
        self.backends_become(replicas)
    }

    fn backends_become(&self, expected: usize) -> Result<()> {
        let start = Instant::now();
        let names = wait_until(&format!("answers from {expected} pods"), Duration::from_secs(30), || {
            let names = self.backends(CONNECTIONS)?;
            ensure!(names.len() == expected, "{} pods answered: {names:?}", names.len());
            Ok(names)
        })?;
        let names: Vec<String> = names.into_iter().collect();
        print(&format!(
            "  {expected} pods answer after {:.1} s: {}",
            start.elapsed().as_secs_f32(),
            names.join(" ")
        ))
    }

    /// Connects to the Service by its DNS name and returns the names of the pods; every connection must be answered.
    fn backends(&self, connections: u32) -> Result<BTreeSet<String>> {
        // One client process that closes its connection after each answer and exits at the first failure.
        let script = format!(
            "curl --silent --show-error --fail --fail-early --max-time 2 --header 'Connection: close' \
             --write-out '\\n' 'http://web.demo.svc.cluster.local/hostname?[1-{connections}]'"
        );
        let answers = self.in_client(&script)?;
        Ok(answers.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect())
    }

    fn in_client(&self, script: &str) -> Result<String> {
        self.kubectl.run_arguments(&["exec", "--namespace=demo", "client", "--", "sh", "-c", script])
    }

    fn refused(&self) -> Result<()> {
        // Exit code 7: the connection was refused; 28: it timed out.
        let code = self
            .in_client("curl --silent --max-time 2 http://web.demo.svc.cluster.local/ >/dev/null; echo $?")?;
        match code.trim() {
            "7" => print("  refused"),
            other => bail!("curl ended with code {other}"),
        }
    }

    fn kill_an_agent(&self) -> Result<()> {
        let Some(node) = self.layout.node_names().pop() else { bail!("the cluster has no nodes") };
        say(&format!("the agent of {node} is killed: connections keep working, and the agent restarts"));
        let agents =
            format!("--namespace {NAMESPACE} --selector app.kubernetes.io/name=switchtower-node-agent");
        let selector = format!("{agents} --field-selector spec.nodeName={node}");
        self.show(&format!("delete pod {selector} --grace-period=0 --force --wait=false"))?;
        let mut looks = 0;
        let start = Instant::now();
        wait_until("the agent's restart", Duration::from_secs(60), || {
            self.backends(20)?;
            looks += 1;
            self.kubectl.run(&format!("wait {agents} pod --for=condition=Ready --timeout=1s"))?;
            self.kubectl.run(&format!("wait proxystatus/{node} --for=condition=Ready --timeout=1s"))
        })?;
        print(&format!(
            "  running again after {:.1} s; {} connections in that time, none failed",
            start.elapsed().as_secs_f32(),
            looks * 20
        ))
    }
}
