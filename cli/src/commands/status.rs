//! `status`: state of all nodes, problems first.

use std::collections::BTreeMap;

use k8s_openapi::jiff::Timestamp;
use serde::Serialize;
use switchtower_admin_api::NodeState;
use switchtower_admin_api::codes::{self, Code};
use switchtower_admin_api::{ControllerInfo, VIEWER};
use switchtower_crds::ProxyStatus;

use crate::args::{Global, StatusArgs};
use crate::cluster::Cluster;
use crate::controller::Controller;
use crate::diagnosis::{self, Diagnosis};
use crate::error::CliError;
use crate::output::{Exit, Report, Style, age, count, names, table, wrapped};

/// Maximum number of nodes to list.
const LISTED: usize = 20;

/// Value of the report.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Found {
    controller: Option<ControllerInfo>,
    #[serde(skip_serializing_if = "Option::is_none")]
    controller_error: Option<String>,
    states: BTreeMap<String, usize>,
    nodes: Vec<Diagnosis>,
    problems: Vec<Problem>,
}

/// A message code and the affected nodes.
#[derive(Debug, Serialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
struct Problem {
    code: &'static str,
    title: &'static str,
    action: &'static str,
    nodes: Vec<String>,
}

pub(crate) async fn run(global: &Global, args: &StatusArgs, style: Style) -> Result<Report, CliError> {
    let cluster = Cluster::new(global).await?;
    let rows = cluster.rows().await?;
    let asked = async {
        Controller::connect(global, &cluster, VIEWER).await?.get::<ControllerInfo>("/v1/controller").await
    };
    let found = found(&rows, asked.await, cluster.now().await);
    let exit = if found.problems.is_empty() { Exit::Ok } else { Exit::Wrong };
    Report::new(text(&found, args.all, style), &found, exit)
}

fn found(rows: &[ProxyStatus], controller: Result<ControllerInfo, CliError>, now: Timestamp) -> Found {
    let mut nodes: Vec<Diagnosis> = rows.iter().map(|row| Diagnosis::new(row, now)).collect();
    // Sort by severity, then by duration.
    nodes.sort_by_key(|node| {
        (severity(node.known), !node.outdated, std::cmp::Reverse(node.since_seconds), node.node.clone())
    });
    let mut states = BTreeMap::new();
    for node in &nodes {
        *states.entry(node.state.clone()).or_default() += 1;
    }
    let problems = problems(&nodes, controller.as_ref());
    let (controller, controller_error) = match controller {
        Ok(info) => (Some(info), None),
        Err(error) => (None, Some(error.message)),
    };
    Found { controller, controller_error, states, nodes, problems }
}

/// Returns the sort rank of a state; 0 is the most severe.
fn severity(state: Option<NodeState>) -> u8 {
    match state {
        Some(NodeState::Absent) => 0,
        Some(NodeState::Stale) => 1,
        Some(NodeState::ApplyFailed) => 2,
        Some(NodeState::Unknown) => 3,
        Some(NodeState::Deviating) => 4,
        Some(NodeState::PodsNotLocal | NodeState::NotExclusive) => 5,
        Some(NodeState::Drifted) => 6,
        Some(NodeState::Progressing) => 7,
        None => 8,
        Some(NodeState::Shadow) => 9,
        Some(NodeState::Synced) => 10,
    }
}

fn problems(nodes: &[Diagnosis], asked: Result<&ControllerInfo, &CliError>) -> Vec<Problem> {
    let problem = |code: Code, nodes: Vec<String>| Problem {
        code: code.code,
        title: code.title,
        action: code.action,
        nodes,
    };
    let about_controller = diagnosis::controller(nodes, asked);
    let mut problems: Vec<Problem> =
        about_controller.into_iter().map(|code| problem(code, Vec::new())).collect();
    // Nodes are sorted, therefore problems are too. The table shows the reasons.
    for cause in diagnosis::causes(nodes) {
        let named = cause.nodes.into_iter().map(str::to_owned);
        match problems.iter_mut().find(|known| known.code == cause.code.code) {
            Some(known) => known.nodes.extend(named),
            None => problems.push(problem(cause.code, named.collect())),
        }
    }
    if nodes.is_empty() {
        problems.push(problem(codes::NO_NODE_CONNECTED, Vec::new()));
    }
    problems
}

fn text(found: &Found, all: bool, style: Style) -> String {
    let mut text = controller_line(found, style);
    let states = found.states.iter().map(|(state, number)| format!("{number} {state}"));
    let states: Vec<String> = states.collect();
    text += &format!("nodes       {}: {}\n", found.nodes.len(), states.join(", "));
    text += &versions(&found.nodes);
    let shown: Vec<&Diagnosis> =
        found.nodes.iter().filter(|node| all || node.outdated || node.code.is_some()).collect();
    if !shown.is_empty() {
        let most = if all { usize::MAX } else { LISTED };
        let rows: Vec<Vec<String>> = shown.iter().take(most).map(|node| row(node)).collect();
        text += &format!("\n{}", table(&["NODE", "STATE", "BEHIND", "SINCE", "WHY"], &rows));
        if shown.len() > most {
            text += &format!("... and {} more; use --all to list them\n", shown.len() - most);
        }
    }
    for problem in &found.problems {
        let of = match problem.nodes.len() {
            0 => String::new(),
            number => format!(": {} ({})", count(number, "node"), names(&problem.nodes, number, 5)),
        };
        let sign = style.bad("!");
        text += &format!("\n{sign} {}  {}{of}\n", problem.code, problem.title);
        text += &format!("  {}\n", wrapped(problem.action, 2));
    }
    if found.problems.is_empty() {
        text += &format!("\n{} the kernels of all nodes match the desired state\n", style.good("ok"));
    }
    text
}

fn controller_line(found: &Found, style: Style) -> String {
    match (&found.controller, &found.controller_error) {
        (Some(info), _) => {
            let heard = info
                .upstream_age_milliseconds
                .map_or("never".to_owned(), |age| format!("{}.{} s ago", age / 1_000, age % 1_000 / 100));
            format!(
                "controller  {} {}, {} of {} connected, last API server data {heard}\n",
                info.replica,
                info.version,
                info.connected,
                count(info.nodes, "node")
            )
        }
        (None, error) => {
            let reason = error.clone().unwrap_or_default();
            let unreachable = style.bad("unreachable");
            format!(
                "controller  {unreachable}; showing the last status it wrote\n            {}\n",
                wrapped(&reason, 12)
            )
        }
    }
}

fn versions(nodes: &[Diagnosis]) -> String {
    let list = |of: fn(&Diagnosis) -> &String| {
        let mut counts: BTreeMap<&String, usize> = BTreeMap::new();
        for node in nodes.iter().filter(|node| !of(node).is_empty()) {
            *counts.entry(of(node)).or_default() += 1;
        }
        let shown = counts.iter().map(|(version, number)| match counts.len() {
            1 => (*version).clone(),
            _ => format!("{version} ({number})"),
        });
        shown.collect::<Vec<_>>().join(", ")
    };
    let (agents, kernels) = (list(|node| &node.agent), list(|node| &node.kernel));
    if agents.is_empty() {
        return String::new();
    }
    format!("versions    agents {agents}; kernels {}\n", wrapped(&kernels, 30))
}

fn row(node: &Diagnosis) -> Vec<String> {
    let behind = match node.desired - node.applied {
        0 => "-".to_owned(),
        behind => behind.to_string(),
    };
    vec![
        node.node.clone(),
        node.state.clone(),
        behind,
        node.since_seconds.map_or("-".to_owned(), age),
        match (node.outdated, node.reported_seconds) {
            (true, Some(seconds)) => {
                format!("not renewed for {}; last known: {}: {}", age(seconds), node.reason, node.message)
            }
            _ => format!("{}: {}", node.reason, node.message),
        },
    ]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn row(name: &str, state: &str, ready: bool, generations: (i64, i64)) -> ProxyStatus {
        serde_json::from_value(json!({
            "apiVersion": "switchtower.dev/v1alpha1", "kind": "ProxyStatus", "metadata": {"name": name},
            "spec": {},
            "status": {
                "state": state,
                "generation": {"desired": generations.0, "sent": generations.0, "applied": generations.1},
                "agent": {"version": "0.1.0"}, "kernel": "6.18.5",
                "conditions": [{
                    "type": "Ready", "status": if ready { "True" } else { "False" }, "reason": "Because",
                    "message": "This is so.", "lastTransitionTime": "2026-01-01T00:00:00Z",
                }],
            },
        }))
        .unwrap()
    }

    fn now() -> Timestamp {
        "2026-01-01T00:06:12Z".parse().unwrap()
    }

    fn info() -> ControllerInfo {
        ControllerInfo {
            replica: "controller-0".into(),
            version: "0.1.0".into(),
            upstream_age_milliseconds: Some(340),
            revision: 12,
            nodes: 3,
            connected: 3,
        }
    }

    #[test]
    fn most_severe_problem_comes_first() {
        let rows = [
            row("alpha", "Synced", true, (7, 7)),
            row("beta", "Drifted", false, (7, 7)),
            row("gamma", "Stale", false, (9, 7)),
        ];
        let found = found(&rows, Ok(info()), now());
        let wanted = [
            "controller  controller-0 0.1.0, 3 of 3 nodes connected, last API server data 0.3 s ago",
            "nodes       3: 1 Drifted, 1 Stale, 1 Synced",
            "versions    agents 0.1.0; kernels 6.18.5",
            "",
            "NODE   STATE    BEHIND  SINCE  WHY",
            "gamma  Stale    2       6m12s  Because: This is so.",
            "beta   Drifted  -       6m12s  Because: This is so.",
            "",
            "! ST0102  the agent is not connected: 1 node (gamma)",
        ];
        let text = text(&found, false, Style::PLAIN);
        let lines: Vec<&str> = text.lines().take(wanted.len()).collect();
        assert_eq!(lines, wanted, "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= crate::output::WIDTH), "{text}");
        let codes: Vec<&str> = found.problems.iter().map(|problem| problem.code).collect();
        assert_eq!(codes, ["ST0102", "ST0106"]);
    }

    #[test]
    fn healthy_only_with_nodes_and_a_controller() {
        let rows = [row("alpha", "Synced", true, (7, 7))];
        assert_eq!(found(&rows, Ok(info()), now()).problems, []);
        let codes = |found: Found| found.problems.iter().map(|problem| problem.code).collect::<Vec<_>>();
        let lost = ControllerInfo { connected: 2, ..info() };
        assert_eq!(codes(found(&rows, Ok(lost), now())), ["ST0102"], "the row still says Synced");
        assert_eq!(codes(found(&[], Ok(info()), now())), ["ST0304"]);
        let away = CliError::coded(codes::CONTROLLER_UNREACHABLE, "refused");
        assert_eq!(codes(found(&rows, Err(away), now())), ["ST0301"]);
        let deaf = ControllerInfo { upstream_age_milliseconds: Some(31_000), ..info() };
        assert_eq!(codes(found(&rows, Ok(deaf), now())), ["ST0302"]);
    }
}
