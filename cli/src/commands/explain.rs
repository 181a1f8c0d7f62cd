//! `explain`: the path of a Service's packets.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde::Serialize;
use switchtower_admin_api::codes;
use switchtower_admin_api::{ConnectionOutcome, Explanation, Finding, KernelCheck, NodeGroup, VIEWER};

use crate::args::{ExplainArgs, Global, ServiceName};
use crate::cluster::Cluster;
use crate::controller::{Controller, escaped};
use crate::error::CliError;
use crate::output::{Exit, Report, Style, count, names, wrapped};

/// Start of the second column.
const INDENT: usize = 9;
/// Maximum number of endpoints to list.
const ENDPOINTS: usize = 6;

/// Value of the report.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Found {
    #[serde(flatten)]
    explanation: Explanation,
    endpoints: EndpointCounts,
}

/// Endpoints of the Service in the API server.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct EndpointCounts {
    slices: usize,
    ready: usize,
    terminating: usize,
    unready: usize,
}

pub(crate) async fn run(global: &Global, args: &ExplainArgs, style: Style) -> Result<Report, CliError> {
    if args.subject.to_ascii_uppercase().starts_with("ST0") {
        return super::codes::one(&args.subject);
    }
    let subject = ServiceName::parse(&args.subject).map_err(CliError::new)?;
    let cluster = Cluster::new(global).await?;
    let namespace = subject.namespace.as_deref().unwrap_or(cluster.namespace()).to_owned();
    let service = cluster.service(&namespace, &subject.name).await?;
    let service = service.ok_or_else(|| {
        let name = &subject.name;
        CliError::new(format!("Service {namespace}/{name} not found; use -n to select another namespace"))
    })?;
    served(&service, &subject)?;
    let (from, pods_node) = source(&cluster, args).await?;
    let node = args.node.clone().or(pods_node);
    let slices = cluster.slices(&namespace, &subject.name).await?;

    let mut query = vec![];
    query.extend(subject.port.as_ref().map(|port| format!("port={}", escaped(port))));
    query.extend(node.as_ref().map(|node| format!("node={}", escaped(node))));
    query.extend(from.map(|from| format!("from={}", escaped(&from.to_string()))));
    let path = format!("/v1/services/{namespace}/{}/explanation?{}", subject.name, query.join("&"));
    let mut controller = Controller::connect(global, &cluster, VIEWER).await?;
    let found = Found { explanation: controller.get(&path).await?, endpoints: endpoints(&slices) };
    let exit = if is_well(&found.explanation) { Exit::Ok } else { Exit::Wrong };
    Report::new(text(&found, args.all, style), &found, exit)
}

/// Returns an error for a Service or port that no service proxy serves.
fn served(service: &Service, subject: &ServiceName) -> Result<(), CliError> {
    let spec = service.spec.clone().unwrap_or_default();
    let labels = service.metadata.labels.clone().unwrap_or_default();
    let not = |why: &str| {
        let message = format!("Service {} is not served by a service proxy: {why}", subject.name);
        Err(CliError::coded(codes::NOT_SERVED, message))
    };
    if spec.type_.as_deref() == Some("ExternalName") {
        return not("it has type ExternalName, which only DNS resolves");
    }
    if spec.cluster_ip.as_deref() == Some("None") {
        return not("it is headless; clients resolve its endpoints through DNS");
    }
    if let Some(other) = labels.get("service.kubernetes.io/service-proxy-name") {
        return not(&format!("its label service.kubernetes.io/service-proxy-name assigns it to {other:?}"));
    }
    if labels.contains_key("service.kubernetes.io/headless") {
        return not("it has the label service.kubernetes.io/headless");
    }
    let port = |port: &str| {
        spec.ports.iter().flatten().any(|known| {
            known.name.as_deref() == Some(port)
                || known.port.to_string() == port
                || known.node_port.is_some_and(|known| known.to_string() == port)
        })
    };
    match &subject.port {
        Some(wanted) if !port(wanted) => {
            let known = spec.ports.iter().flatten().map(|port| match &port.name {
                Some(name) => format!("{name} ({})", port.port),
                None => port.port.to_string(),
            });
            let known: Vec<String> = known.collect();
            let message =
                format!("Service {} has no port {wanted}; it has {}", subject.name, known.join(", "));
            Err(CliError::coded(codes::UNDEFINED_PORT, message))
        }
        _ => Ok(()),
    }
}

/// Returns the source address and, for a pod, its node.
async fn source(cluster: &Cluster, args: &ExplainArgs) -> Result<(Option<IpAddr>, Option<String>), CliError> {
    let Some(text) = &args.from else { return Ok((args.from_ip, None)) };
    let wrong = || CliError::new(format!("--from {text:?} is not a pod: expected pod/[NAMESPACE/]NAME"));
    let path = text.strip_prefix("pod/").or_else(|| text.strip_prefix("po/")).unwrap_or(text);
    let (namespace, name) = path.split_once('/').unwrap_or((cluster.namespace(), path));
    if name.is_empty() || name.contains('/') {
        return Err(wrong());
    }
    let pod = cluster.pod(namespace, name).await?;
    let pod = pod.ok_or_else(|| CliError::new(format!("Pod {namespace}/{name} not found")))?;
    let address = pod.status.as_ref().and_then(|status| status.pod_ip.as_ref()?.parse().ok());
    let address: IpAddr = address.ok_or_else(|| {
        CliError::new(format!("Pod {namespace}/{name} has no address yet; wait until it is running"))
    })?;
    Ok((Some(address), pod.spec.and_then(|spec| spec.node_name)))
}

fn endpoints(slices: &[EndpointSlice]) -> EndpointCounts {
    let mut counts = EndpointCounts { slices: slices.len(), ..EndpointCounts::default() };
    for endpoint in slices.iter().flat_map(|slice| &slice.endpoints) {
        let conditions = endpoint.conditions.clone().unwrap_or_default();
        if conditions.terminating == Some(true) {
            counts.terminating += 1;
        } else if conditions.ready != Some(false) {
            counts.ready += 1;
        } else {
            counts.unready += 1;
        }
    }
    counts
}

fn findings(explanation: &Explanation) -> impl Iterator<Item = &Finding> {
    explanation.groups.iter().flat_map(|group| &group.findings)
}

fn is_well(explanation: &Explanation) -> bool {
    findings(explanation).all(works)
}

fn works(finding: &Finding) -> bool {
    finding.outcome == ConnectionOutcome::Forwarded
        && !matches!(finding.kernel, Some(KernelCheck::Differs(_)))
}

fn text(found: &Found, all: bool, style: Style) -> String {
    let explanation = &found.explanation;
    let mut text = String::new();
    let groups: Vec<(&NodeGroup, Vec<&Finding>)> = explanation
        .groups
        .iter()
        .map(|group| (group, if all { group.findings.iter().collect() } else { notable(&group.findings) }))
        .collect();
    // Failures of any group come before working combinations.
    for (group, shown) in &groups {
        for finding in shown.iter().filter(|finding| !works(finding)) {
            text += &paragraph(explanation, group, finding, style);
            text.push('\n');
        }
    }
    for (group, shown) in &groups {
        for finding in shown.iter().filter(|finding| works(finding)) {
            text += &paragraph(explanation, group, finding, style);
            text.push('\n');
        }
        let hidden = group.findings.len() - shown.len();
        if hidden > 0 {
            text += &format!(
                "         {} with the same outcome; use --all to list them\n\n",
                count(hidden, "more combination")
            );
        }
    }
    text += &about_endpoints(found.endpoints);
    text += &about_nodes(explanation, style);
    text
}

/// Returns the first finding of each distinct outcome.
fn notable(findings: &[Finding]) -> Vec<&Finding> {
    let mut shown: Vec<&Finding> = Vec::new();
    for finding in findings {
        let differs = matches!(finding.kernel, Some(KernelCheck::Differs(_)));
        let same = |known: &&&Finding| {
            (&known.kind, known.outcome, &known.code, &known.endpoints, known.masquerade)
                == (&finding.kind, finding.outcome, &finding.code, &finding.endpoints, finding.masquerade)
        };
        if differs || shown.iter().find(same).is_none() {
            shown.push(finding);
        }
    }
    shown
}

fn paragraph(explanation: &Explanation, group: &NodeGroup, finding: &Finding, style: Style) -> String {
    let place = match &explanation.node {
        Some(node) => format!("on {node}"),
        None => format!("on {} ({})", count(group.nodes, "node"), names(&group.names, group.nodes, 3)),
    };
    let verdict = match finding.outcome {
        ConnectionOutcome::Forwarded => style.good("FORWARDED"),
        ConnectionOutcome::Refused => style.bad("REFUSED"),
        ConnectionOutcome::Dropped => style.bad("DROPPED"),
        ConnectionOutcome::NotServed => style.warn("NOT SERVED"),
    };
    let code = finding.code.clone().unwrap_or_default();
    let kind = &finding.kind;
    let mut text = format!("{verdict}  {kind} {} {place}  {code}\n", finding.frontend).replace("  \n", "\n");
    let mut line = |name: &str, value: &str| {
        text += &format!(" {name:7} {}\n", wrapped(value, INDENT));
    };
    line("from", &finding.from);
    line("why", &finding.why);
    if !finding.path.is_empty() {
        line("path", &finding.path.join(" -> "));
    }
    if !finding.endpoints.is_empty() {
        line("to", &names(&finding.endpoints, finding.endpoints.len(), ENDPOINTS));
    }
    if let Some(example) = &finding.example {
        let to = match example.endpoints.as_slice() {
            [] => String::new(),
            endpoints => format!(" to {}", names(endpoints, endpoints.len(), ENDPOINTS)),
        };
        line(
            "such as",
            &format!("on {}: {}{to}; {}", example.node, example.frontend, example.path.join(" -> ")),
        );
    }
    if let Some(own) = &finding.hairpin {
        line("itself", &format!("{own} is the source; a connection to itself is masqueraded"));
    }
    if finding.affinity_seconds > 0 {
        line("sticky", &format!("clients keep their endpoint for {} s", finding.affinity_seconds));
    }
    match &finding.kernel {
        None => {}
        Some(KernelCheck::Agrees) => line("kernel", "matches"),
        Some(KernelCheck::Differs(how)) => {
            line("kernel", &format!("{} differs: {how}", codes::KERNEL_DIFFERS.code));
        }
        Some(KernelCheck::Unknown(why)) => line("kernel", &format!("unknown: {why}")),
    }
    if let Some(code) = finding.code.as_deref().and_then(codes::find) {
        line("fix", code.action);
    }
    text
}

fn about_endpoints(counts: EndpointCounts) -> String {
    let EndpointCounts { slices, ready, terminating, unready } = counts;
    let text = match (slices, ready + terminating + unready) {
        (0, _) => "no EndpointSlice: the Service has no selector, or was just created".to_owned(),
        (_, 0) => "none: the selector matches no pod".to_owned(),
        _ => {
            let mut parts = vec![format!("{ready} ready")];
            parts.extend((unready > 0).then(|| format!("{unready} not ready")));
            parts.extend((terminating > 0).then(|| format!("{terminating} terminating")));
            format!("{}, in {} (both address families)", parts.join(", "), count(slices, "EndpointSlice"))
        }
    };
    format!("endpoints {}\n", wrapped(&text, 10))
}

fn about_nodes(explanation: &Explanation, style: Style) -> String {
    let total = explanation.not_current_total;
    if total == 0 {
        return match &explanation.node {
            Some(node) => format!("node     {node} holds the latest generation\n"),
            None => "nodes    all nodes hold the latest generation\n".to_owned(),
        };
    }
    let standing = |standing: &switchtower_admin_api::NodeStatus| {
        let node = &standing.node;
        match (&standing.failure, standing.connected) {
            (_, false) => format!("{node} (agent not connected)"),
            (Some(failure), true) => format!("{node} (refused: {failure})"),
            (None, true) => {
                format!("{node} (behind by {})", standing.desired.saturating_sub(standing.applied))
            }
        }
    };
    let listed: Vec<String> = explanation.not_current.iter().map(standing).collect();
    let text = format!(
        "may not apply yet on {}: {}; see kubectl switchtower status",
        count(total, "node"),
        names(&listed, total, 5)
    );
    format!("{}        {}\n", style.bad("!"), wrapped(&text, INDENT))
}

#[cfg(test)]
mod tests;
