//! `check`: is anything in the way before the installation; does everything work together after it.

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use serde::Serialize;
use switchtower_core::admin::{ControllerInfo, OPERATOR, VIEWER};
use switchtower_core::codes::{self, Code};
use switchtower_crds::ProxyStatus;

use crate::args::{CheckArgs, Global};
use crate::cluster::Cluster;
use crate::controller::Controller;
use crate::error::CliError;
use crate::output::{Exit, Report, Style, count, names, wrapped};

/// The oldest API server whose objects the controller knows.
const API_VERSION: (u32, u32) = (1, 33);
/// The supported floor; the README says how it was tried.
const KERNEL: (u32, u32) = (6, 1);

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
enum Verdict {
    Passed,
    Warning,
    Failed,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Check {
    verdict: Verdict,
    what: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    action: Option<&'static str>,
}

impl Check {
    fn passed(what: impl Into<String>) -> Self {
        Self { verdict: Verdict::Passed, what: what.into(), code: None, action: None }
    }

    fn warning(code: Code, what: impl Into<String>) -> Self {
        let (code, action) = (Some(code.code), Some(code.action));
        Self { verdict: Verdict::Warning, what: what.into(), code, action }
    }

    fn failed(code: Code, what: impl Into<String>) -> Self {
        Self { verdict: Verdict::Failed, ..Self::warning(code, what) }
    }

    fn error(error: CliError) -> Self {
        let code = error.code.map(|code| (code.code, code.action)).unzip();
        Self { verdict: Verdict::Failed, what: error.message, code: code.0, action: code.1 }
    }
}

pub(crate) async fn run(global: &Global, args: &CheckArgs, style: Style) -> Result<Report, CliError> {
    let cluster = Cluster::new(global).await?;
    let checks = if args.pre { before(&cluster).await? } else { after(global, &cluster).await? };
    let failed = checks.iter().any(|check| check.verdict == Verdict::Failed);
    let exit = if failed { Exit::Wrong } else { Exit::Ok };
    Report::new(text(&checks, style), &checks, exit)
}

async fn before(cluster: &Cluster) -> Result<Vec<Check>, CliError> {
    let mut checks = vec![api_version(cluster.version().await?)];
    let nodes = cluster.nodes().await?;
    checks.extend(about_nodes(&nodes));
    checks.push(if cluster.exists::<DaemonSet>("kube-system", "kube-proxy").await? {
        Check::warning(codes::KUBE_PROXY_RUNS, "DaemonSet kube-system/kube-proxy exists")
    } else {
        Check::passed("there is no DaemonSet kube-system/kube-proxy")
    });
    let system = cluster.system_namespace();
    checks.push(if cluster.exists::<ConfigMap>(system, "switchtower-api-server").await? {
        Check::passed(
            "the controller reaches the API server without a Service (ConfigMap switchtower-api-server)",
        )
    } else {
        let what = format!("there is no ConfigMap switchtower-api-server in {system}");
        Check::warning(codes::API_SERVER_BY_SERVICE, what)
    });
    Ok(checks)
}

fn api_version(version: (u32, u32)) -> Check {
    let what = format!("the API server is of version {}.{}", version.0, version.1);
    if version >= API_VERSION {
        Check::passed(what)
    } else {
        let needed = format!("{what}, older than {}.{}", API_VERSION.0, API_VERSION.1);
        Check::failed(codes::API_SERVER_TOO_OLD, needed)
    }
}

fn about_nodes(nodes: &[Node]) -> Vec<Check> {
    let name = |node: &&Node| node.metadata.name.clone().unwrap_or_default();
    let linux: Vec<&Node> = nodes.iter().filter(|node| !is_windows(node)).collect();
    let old: Vec<String> =
        linux.iter().filter(|node| kernel(node).is_some_and(|kernel| kernel < KERNEL)).map(name).collect();
    let without = |what: fn(&Node) -> bool| -> Vec<String> {
        linux.iter().filter(|node| !what(node)).map(name).collect()
    };
    let no_address = without(has_address);
    let no_cidr = without(|node| node.spec.as_ref().is_some_and(|spec| spec.pod_cidr.is_some()));
    let mut checks = Vec::new();
    checks.push(if old.is_empty() {
        Check::passed(format!(
            "kernel {}.{} or newer on {}",
            KERNEL.0,
            KERNEL.1,
            count(linux.len(), "Linux node")
        ))
    } else {
        let what =
            format!("{} with an older kernel: {}", count(old.len(), "node"), names(&old, old.len(), 5));
        Check::warning(codes::KERNEL_TOO_OLD, what)
    });
    checks.push(if no_address.is_empty() {
        Check::passed("every node has an InternalIP: NodePorts can be served on it")
    } else {
        let what = format!("without InternalIP: {}", names(&no_address, no_address.len(), 5));
        Check::warning(codes::NODE_WITHOUT_ADDRESS, what)
    });
    if !no_cidr.is_empty() {
        let what = format!("without podCIDR: {}", names(&no_cidr, no_cidr.len(), 5));
        checks.push(Check::warning(codes::NODE_WITHOUT_POD_CIDR, what));
    }
    checks
}

fn is_windows(node: &Node) -> bool {
    let labels = node.metadata.labels.as_ref();
    labels.is_some_and(|labels| labels.get("kubernetes.io/os").is_some_and(|os| os == "windows"))
}

/// `None` while the kubelet has not told it.
fn kernel(node: &Node) -> Option<(u32, u32)> {
    let release = &node.status.as_ref()?.node_info.as_ref()?.kernel_version;
    let mut numbers = release.split(['.', '-']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn has_address(node: &Node) -> bool {
    let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    addresses.into_iter().any(|address| address.type_ == "InternalIP")
}

async fn after(global: &Global, cluster: &Cluster) -> Result<Vec<Check>, CliError> {
    let rows = match cluster.rows().await {
        Ok(rows) => rows,
        Err(error) => return Ok(vec![Check::error(error)]),
    };
    let mut checks = vec![Check::passed("the custom resources are installed")];
    let asked = async {
        Controller::connect(global, cluster, VIEWER).await?.get::<ControllerInfo>("/v1/controller").await
    };
    checks.push(match asked.await {
        Ok(info) => about_controller(&info),
        Err(error) => Check::error(error),
    });
    if let Err(error) = cluster.token(OPERATOR).await {
        let what = format!("diff and rules are not for you: {}", error.message);
        checks.push(Check::warning(codes::NO_RIGHT, what));
    }
    checks.extend(about_rows(&rows));
    Ok(checks)
}

fn about_controller(info: &ControllerInfo) -> Check {
    match info.upstream_age_milliseconds {
        Some(age) if age <= 30_000 => Check::passed(format!(
            "the controller {} {} answers and hears the API server",
            info.replica, info.version
        )),
        _ => Check::failed(codes::UPSTREAM_STALE, format!("the controller {} hears nothing", info.replica)),
    }
}

fn about_rows(rows: &[ProxyStatus]) -> Vec<Check> {
    if rows.is_empty() {
        return vec![Check::failed(codes::NO_NODE_CONNECTED, "there is no ProxyStatus")];
    }
    let with = |condition: &str, status: &str| -> Vec<String> {
        let rows = rows.iter().filter(|row| {
            let conditions = row.status.iter().flat_map(|status| &status.conditions);
            conditions.into_iter().any(|known| known.type_ == condition && known.status == status)
        });
        rows.filter_map(|row| row.metadata.name.clone()).collect()
    };
    let ready = with("Ready", "True");
    let unready =
        rows.iter().filter_map(|row| row.metadata.name.clone()).filter(|name| !ready.contains(name));
    let unready: Vec<String> = unready.collect();
    let mut checks = Vec::new();
    checks.push(if unready.is_empty() {
        Check::passed(format!("{} Ready: every kernel holds what it should", count(rows.len(), "node")))
    } else {
        let listed = names(&unready, unready.len(), 5);
        let what = format!("{} of {} not Ready: {listed}", unready.len(), count(rows.len(), "node"));
        Check::failed(codes::NODE_BEHIND, what)
    });
    let shared = with("Exclusive", "False");
    checks.push(if shared.is_empty() {
        Check::passed("no rules of another service proxy")
    } else {
        let what = format!("rules of kube-proxy on {}", names(&shared, shared.len(), 5));
        Check::failed(codes::NOT_EXCLUSIVE, what)
    });
    let agents = rows.iter().filter_map(|row| row.status.as_ref()?.agent.as_ref());
    let mut versions: Vec<String> = agents.map(|agent| agent.version.clone()).collect();
    versions.sort();
    versions.dedup();
    checks.push(match versions.as_slice() {
        [] | [_] => Check::passed("all agents are of one version"),
        _ => Check::warning(codes::VERSION_SKEW, format!("agents of versions {}", versions.join(", "))),
    });
    checks
}

fn text(checks: &[Check], style: Style) -> String {
    let mut text = String::new();
    for check in checks {
        let sign = match check.verdict {
            Verdict::Passed => style.good("ok     "),
            Verdict::Warning => style.warn("warning"),
            Verdict::Failed => style.bad("FAILED "),
        };
        let code = check.code.map(|code| format!("{code} ")).unwrap_or_default();
        text += &format!("{sign}  {}\n", wrapped(&format!("{code}{}", check.what), 9));
        if let Some(action) = check.action {
            text += &format!("         {}\n", wrapped(action, 9));
        }
    }
    let number = |verdict| checks.iter().filter(|check| check.verdict == verdict).count();
    let (failed, warned) = (number(Verdict::Failed), number(Verdict::Warning));
    text += &format!("\n{}, {failed} failed, {}\n", count(checks.len(), "check"), count(warned, "warning"));
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(name: &str, kernel: &str, cidr: bool) -> Node {
        let spec = if cidr { json!({"podCIDR": "10.244.0.0/24"}) } else { json!({}) };
        let info = json!({
            "architecture": "amd64", "bootID": "", "containerRuntimeVersion": "", "kernelVersion": kernel,
            "kubeProxyVersion": "", "kubeletVersion": "", "machineID": "", "operatingSystem": "linux",
            "osImage": "", "systemUUID": "",
        });
        serde_json::from_value(json!({
            "metadata": {"name": name}, "spec": spec,
            "status": {"nodeInfo": info, "addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
        }))
        .unwrap()
    }

    fn codes_of(checks: &[Check]) -> Vec<Option<&'static str>> {
        checks.iter().map(|check| check.code).collect()
    }

    #[test]
    fn kernels_addresses_and_pod_cidrs() {
        assert_eq!(codes_of(&about_nodes(&[node("a", "6.18.5-amd64", true)])), [None, None]);
        let checks = about_nodes(&[node("a", "5.15.0-25-amd64", true), node("b", "6.18.0", false)]);
        assert_eq!(codes_of(&checks), [Some("ST0403"), None, Some("ST0408")]);
        assert!(checks[0].what.contains("1 node with an older kernel: a"), "{checks:?}");
        assert_eq!(api_version((1, 36)).verdict, Verdict::Passed);
        assert_eq!(api_version((1, 32)).verdict, Verdict::Failed);
    }

    #[test]
    fn rows_that_are_not_ready_fail() {
        let row = |ready: &str, exclusive: &str, version: &str| -> ProxyStatus {
            let condition = |kind: &str, status: &str| {
                json!({"type": kind, "status": status, "reason": "R", "message": "",
                       "lastTransitionTime": "2026-01-01T00:00:00Z"})
            };
            serde_json::from_value(json!({
                "apiVersion": "switchtower.dev/v1alpha1", "kind": "ProxyStatus", "metadata": {"name": "a"},
                "spec": {},
                "status": {"agent": {"version": version},
                           "conditions": [condition("Ready", ready), condition("Exclusive", exclusive)]},
            }))
            .unwrap()
        };
        assert_eq!(codes_of(&about_rows(&[row("True", "True", "0.1.0")])), [None, None, None]);
        let checks = about_rows(&[row("False", "False", "0.1.0"), row("True", "True", "0.2.0")]);
        assert_eq!(codes_of(&checks), [None, Some("ST0107"), Some("ST0303")], "both are named a");
        assert_eq!(codes_of(&about_rows(&[row("False", "True", "0.1.0")])), [Some("ST0103"), None, None]);
        assert_eq!(codes_of(&about_rows(&[])), [Some("ST0304")]);
        let text = text(&about_rows(&[]), Style::PLAIN);
        assert!(text.starts_with("FAILED   ST0304 there is no ProxyStatus\n"), "{text}");
        assert!(text.ends_with("\n1 check, 1 failed, 0 warnings\n"), "{text}");
    }
}
