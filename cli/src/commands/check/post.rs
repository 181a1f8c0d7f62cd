//! Does everything work together after the installation?

use switchtower_core::admin::{ControllerInfo, OPERATOR, VIEWER};
use switchtower_core::codes;
use switchtower_crds::ProxyStatus;

use super::{Check, builtin};
use crate::args::Global;
use crate::cluster::Cluster;
use crate::controller::Controller;
use crate::error::CliError;
use crate::output::{count, names};

pub(super) async fn run(global: &Global, cluster: &Cluster) -> Result<Vec<Check>, CliError> {
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
    checks.extend(builtin::after(cluster).await);
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
    let outside = with("LocalDetection", "False");
    if !outside.is_empty() {
        let what = format!("local detection misses pods on {}", names(&outside, outside.len(), 5));
        checks.push(Check::failed(codes::PODS_NOT_LOCAL, what));
    }
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{codes_of, text};
    use super::*;
    use crate::output::Style;

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
