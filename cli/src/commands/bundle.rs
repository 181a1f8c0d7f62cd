//! `bundle`: one archive with everything that support needs, without credentials.
//!
//! A part that cannot be read does not stop the others: `errors.txt` in the archive contains the reasons.

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};
use switchtower_admin_api::{ControllerInfo, MetricsText, NodeDiff, NodeRules, OPERATOR, VIEWER};

use crate::args::{BundleArgs, CheckArgs, Global, StatusArgs};
use crate::cluster::Cluster;
use crate::cluster::support::LogOf;
use crate::controller::{Controller, escaped};
use crate::error::CliError;
use crate::output::{Exit, Report, Style, count, create_file};

mod archive;
mod redact;

use archive::Archive;
use redact::Redactor;

/// Maximum number of pods whose logs are read. Controllers come first, then agents that are not ready.
const PODS: usize = 20;
/// Maximum number of elements of a node's tables.
const ELEMENTS: u32 = 100_000;

pub(crate) async fn run(global: &Global, args: &BundleArgs) -> Result<Report, CliError> {
    let cluster = Cluster::new(global).await?;
    let now = cluster.now().await;
    let stamp = now.strftime("%Y%m%dT%H%M%SZ").to_string();
    let name = format!("switchtower-bundle-{stamp}");
    let path = args.file.clone().unwrap_or_else(|| PathBuf::from(format!("{name}.tar.gz")));
    let file = create_file(&path, "--file")?;
    let maximum = usize::try_from(args.max_size).unwrap_or(usize::MAX).saturating_mul(1 << 20);
    let modified = u64::try_from(now.as_second()).unwrap_or_default();
    let mut bundle = Bundle {
        archive: Archive::new(file, &name, maximum, modified),
        redactor: Redactor::new(args.redact_addresses),
        parts: Vec::new(),
        errors: Vec::new(),
    };
    let written = bundle.collect(global, args, &cluster, now).await;
    let summary = written.and_then(|()| bundle.finish());
    // Half an archive looks like a whole one.
    let summary = summary.map_err(|error| {
        let _ = std::fs::remove_file(&path);
        CliError::new(format!("cannot write {}: {error}; check the free space", path.display()))
    })?;
    let size = std::fs::metadata(&path).map(|known| known.len()).unwrap_or_default();
    let summary = Summary { file: path.display().to_string(), bytes: size, ..summary };
    let exit = if summary.errors.is_empty() { Exit::Ok } else { Exit::Wrong };
    Report::new(text(&summary), &summary, exit)
}

/// Value of the report.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Summary {
    file: String,
    bytes: u64,
    parts: Vec<String>,
    errors: Vec<String>,
    incomplete: Vec<String>,
}

fn text(summary: &Summary) -> String {
    let kilobytes = summary.bytes.div_ceil(1024);
    let mut text = format!("{}: {}, {kilobytes} KiB\n", summary.file, count(summary.parts.len(), "file"));
    for error in &summary.errors {
        text += &format!("! not included: {error}\n");
    }
    for shortened in &summary.incomplete {
        text += &format!("! incomplete: {shortened}\n");
    }
    text + "Review the content before you send it: names of Services and nodes are included.\n"
}

struct Bundle {
    archive: Archive<File>,
    redactor: Redactor,
    parts: Vec<String>,
    errors: Vec<String>,
}

impl Bundle {
    async fn collect(
        &mut self,
        global: &Global,
        args: &BundleArgs,
        cluster: &Cluster,
        now: Timestamp,
    ) -> std::io::Result<()> {
        let versions = match cluster.version().await {
            Ok((major, minor)) => json!(format!("{major}.{minor}")),
            Err(error) => json!(error.message),
        };
        let about =
            json!({"plugin": env!("CARGO_PKG_VERSION"), "apiServer": versions, "time": now.to_string()});
        self.add("about.json", &format!("{about:#}\n"))?;
        self.reports(global).await?;
        self.object("rows.json", cluster.rows().await)?;
        self.object("profiles.json", cluster.profiles().await)?;
        self.object("rollouts.json", cluster.rollouts().await)?;
        self.object("nodes.json", cluster.nodes().await)?;
        self.object("events.json", cluster.events().await)?;
        let system = cluster.system_namespace();
        for map in ["switchtower-builtin-settings", "switchtower-api-server", "switchtower-bootstrap"] {
            self.object(&format!("configmaps/{map}.json"), cluster.find(system, map).await)?;
        }
        self.object("deployments.json", cluster.system_objects::<Deployment>().await)?;
        self.object("daemonsets.json", cluster.system_objects::<DaemonSet>().await)?;
        let pods = cluster.system_objects::<Pod>().await;
        self.object("pods.json", pods.clone())?;
        self.logs(cluster, pods.unwrap_or_default(), i64::from(args.log_lines)).await?;
        self.controller(global, cluster).await?;
        if !args.node.is_empty() {
            self.tables(global, cluster, &args.node).await?;
        }
        Ok(())
    }

    /// Adds the texts of `status` and `check --post`.
    async fn reports(&mut self, global: &Global) -> std::io::Result<()> {
        let status = super::status::run(global, &StatusArgs { all: true }, Style::PLAIN).await;
        self.result("status.txt", status.map(|report| report.text))?;
        let check = super::check::run(global, &CheckArgs { pre: false, post: true }, Style::PLAIN).await;
        self.result("check.txt", check.map(|report| report.text))
    }

    async fn logs(&mut self, cluster: &Cluster, mut pods: Vec<Pod>, lines: i64) -> std::io::Result<()> {
        pods.sort_by_key(priority);
        let omitted = pods.len().saturating_sub(PODS);
        if omitted > 0 {
            self.errors.push(format!("logs of {omitted} more pods; read them with kubectl logs"));
        }
        for pod in pods.iter().take(PODS) {
            let name = pod.metadata.name.clone().unwrap_or_default();
            let statuses = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
            for container in statuses {
                let previous: &[bool] = if container.restart_count > 0 { &[false, true] } else { &[false] };
                for &previous in previous {
                    let of = LogOf { pod: &name, container: &container.name, previous, lines };
                    let suffix = if previous { ".previous" } else { "" };
                    let file = format!("logs/{name}.{}{suffix}.log", container.name);
                    self.result(&file, cluster.log(of).await)?;
                }
            }
        }
        Ok(())
    }

    /// Adds state and metrics of one replica of the controller.
    async fn controller(&mut self, global: &Global, cluster: &Cluster) -> std::io::Result<()> {
        match Controller::connect(global, cluster, VIEWER).await {
            Ok(mut controller) => {
                self.object("controller.json", controller.get::<ControllerInfo>("/v1/controller").await)?;
                let metrics = controller.get::<MetricsText>("/v1/metrics").await;
                self.result("controller-metrics.txt", metrics.map(|metrics| metrics.text))
            }
            Err(error) => self.result("controller.json", Err(error)),
        }
    }

    /// Adds differences and tables of nodes.
    async fn tables(&mut self, global: &Global, cluster: &Cluster, nodes: &[String]) -> std::io::Result<()> {
        let mut controller = match Controller::connect(global, cluster, OPERATOR).await {
            Ok(controller) => controller,
            Err(error) => return self.result("nodes", Err(error)),
        };
        for node in nodes {
            let path = escaped(node);
            let diff = controller.get::<NodeDiff>(&format!("/v1/nodes/{path}/diff")).await;
            self.object(&format!("nodes/{path}/diff.json"), diff)?;
            let rules =
                controller.get::<NodeRules>(&format!("/v1/nodes/{path}/rules?limit={ELEMENTS}")).await;
            self.object(&format!("nodes/{path}/rules.json"), rules)?;
        }
        Ok(())
    }

    fn object<T: Serialize>(&mut self, name: &str, value: Result<T, CliError>) -> std::io::Result<()> {
        let text = value.and_then(|value| {
            let wrong = |error| CliError::new(format!("cannot encode {name}: {error}"));
            let mut value: Value = serde_json::to_value(value).map_err(wrong)?;
            Redactor::object(&mut value);
            Ok(format!("{value:#}\n"))
        });
        self.result(name, text)
    }

    fn result(&mut self, name: &str, text: Result<String, CliError>) -> std::io::Result<()> {
        match text {
            Ok(text) => self.add(name, &text),
            Err(error) => {
                progress(&format!("{name}: {}", error.message));
                let reason = self.redactor.text(&error.message);
                self.errors.push(format!("{name}: {reason}"));
                Ok(())
            }
        }
    }

    fn add(&mut self, name: &str, text: &str) -> std::io::Result<()> {
        progress(name);
        self.parts.push(name.to_owned());
        self.archive.add(name, &self.redactor.text(text))
    }

    fn finish(mut self) -> std::io::Result<Summary> {
        if !self.errors.is_empty() {
            self.archive.add("errors.txt", &(self.errors.join("\n") + "\n"))?;
        }
        let incomplete = self.archive.finish()?;
        Ok(Summary { parts: self.parts, errors: self.errors, incomplete, ..Summary::default() })
    }
}

/// Prints a line of progress. Standard output is for the result.
fn progress(line: &str) {
    // A closed standard error is no reason to stop.
    let _ = writeln!(std::io::stderr(), "  {line}");
}

/// Sort rank of a pod: controllers, then pods that are not ready, then those with most restarts.
fn priority(pod: &Pod) -> (bool, bool, i32) {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let statuses = || pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
    let restarts: i32 = statuses().map(|container| container.restart_count).sum();
    let ready = statuses().all(|container| container.ready);
    (!name.starts_with("switchtower-controller"), ready, -restarts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, ready: bool, restarts: i32) -> Pod {
        let status =
            json!([{"name": "c", "image": "", "imageID": "", "ready": ready, "restartCount": restarts}]);
        let pod = json!({"metadata": {"name": name}, "status": {"containerStatuses": status}});
        serde_json::from_value(pod).unwrap()
    }

    #[test]
    fn logs_of_troubled_pods_come_first() {
        let mut pods = [
            pod("switchtower-node-agent-a", true, 0),
            pod("switchtower-node-agent-b", true, 5),
            pod("switchtower-node-agent-c", false, 0),
            pod("switchtower-controller-d", true, 0),
        ];
        pods.sort_by_key(priority);
        let names: Vec<_> = pods.iter().map(|pod| pod.metadata.name.as_deref().unwrap()).collect();
        let wanted = [
            "switchtower-controller-d",
            "switchtower-node-agent-c",
            "switchtower-node-agent-b",
            "switchtower-node-agent-a",
        ];
        assert_eq!(names, wanted);
    }
}
