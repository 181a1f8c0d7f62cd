//! Checks after the installation.

use std::collections::BTreeSet;

use switchtower_admin_api::codes;
use switchtower_admin_api::{ConditionType, ControllerInfo, OPERATOR, VIEWER};
use switchtower_crds::ProxyProfile;

use super::{Check, builtin, drain_gate};
use crate::args::Global;
use crate::cluster::{Cluster, Kinds};
use crate::controller::Controller;
use crate::diagnosis::{self, Cause, Diagnosis};
use crate::error::CliError;
use crate::output::{age, count, names};

pub(super) async fn run(global: &Global, cluster: &Cluster) -> Result<Vec<Check>, CliError> {
    let kinds = cluster.kinds().await?;
    let mut checks = about_kinds(&kinds);
    if kinds.missing().contains(&"proxystatuses") {
        return Ok(checks);
    }
    let rows = match cluster.rows().await {
        Ok(rows) => rows,
        Err(error) => return Ok(vec![Check::error(error)]),
    };
    let asked = async {
        Controller::connect(global, cluster, VIEWER).await?.get::<ControllerInfo>("/v1/controller").await
    };
    let asked = asked.await;
    let now = cluster.now().await;
    let nodes: Vec<Diagnosis> = rows.iter().map(|row| Diagnosis::new(row, now)).collect();
    checks.extend(about_fleet(&nodes, &asked));
    if !kinds.missing().contains(&"proxyprofiles") {
        match cluster.profiles().await {
            Ok(profiles) => {
                checks.extend(about_profiles(&profiles));
                checks.extend(drain_gate::after(cluster, &profiles).await);
            }
            Err(error) => checks.push(Check::error(error)),
        }
    }
    if let Err(error) = cluster.token(OPERATOR).await {
        let what = format!("no permission for diff and rules: {}", error.message);
        checks.push(Check::warning(codes::NO_RIGHT, what));
    }
    checks.extend(builtin::after(cluster).await);
    Ok(checks)
}

fn about_kinds(kinds: &Kinds) -> Vec<Check> {
    let mut checks = Vec::new();
    let missing = kinds.missing();
    if !missing.is_empty() {
        let what = format!("the API server does not know {} of switchtower.dev", missing.join(", "));
        checks.push(Check::failed(codes::NOT_INSTALLED, what));
    }
    if !kinds.terminating.is_empty() {
        let what = format!("being deleted: {} of switchtower.dev", kinds.terminating.join(", "));
        checks.push(Check::failed(codes::CRD_TERMINATING, what));
    }
    if checks.is_empty() {
        checks.push(Check::passed(format!("the custom resources are installed: {}", Kinds::ALL.join(", "))));
    }
    checks
}

/// Checks the controller and the nodes. Each failure carries code and reason of the row.
fn about_fleet(nodes: &[Diagnosis], asked: &Result<ControllerInfo, CliError>) -> Vec<Check> {
    let mut checks = vec![match (diagnosis::controller(nodes, asked.as_ref()), asked) {
        (_, Err(error)) => Check::error(error.clone()),
        (Some(code), Ok(info)) => {
            let what = format!(
                "the controller {} has {} of {} connected; {}",
                info.replica,
                info.connected,
                count(info.nodes, "node"),
                code.title
            );
            Check::failed(code, what)
        }
        (None, Ok(info)) => Check::passed(format!(
            "the controller {} {} responds and receives data from the API server",
            info.replica, info.version
        )),
    }];
    if nodes.is_empty() {
        checks.push(Check::failed(codes::NO_NODE_CONNECTED, "no ProxyStatus objects"));
        return checks;
    }
    let causes = diagnosis::causes(nodes);
    checks.extend(causes.iter().map(|cause| about_cause(cause, nodes.len())));
    if causes.is_empty() {
        let oldest = nodes.iter().filter_map(|node| node.reported_seconds).max();
        let when = oldest.map(|seconds| format!(", as reported within the last {}", age(seconds)));
        let what = format!(
            "{} Ready: all kernels match the desired state{}",
            count(nodes.len(), "node"),
            when.unwrap_or_default()
        );
        checks.push(Check::passed(what));
    }
    checks.push(about_versions(nodes));
    checks
}

fn about_cause(cause: &Cause<'_>, total: usize) -> Check {
    let number = cause.nodes.len();
    let of = format!("{number} of {} ({})", count(total, "node"), names(&cause.nodes, number, 5));
    let reason = match (cause.reason, cause.nodes.first()) {
        ("", _) | (_, None) => String::new(),
        (reason, Some(_)) if number == 1 => format!("; {reason}: {}", cause.message),
        (reason, Some(first)) => format!("; {reason}, on {first}: {}", cause.message),
    };
    Check::failed(cause.code, format!("{} on {of}{reason}", cause.code.title))
}

/// Reports profiles whose settings are not in force, with their own conditions.
fn about_profiles(profiles: &[ProxyProfile]) -> Vec<Check> {
    let mut checks = Vec::new();
    for profile in profiles {
        let name = profile.metadata.name.as_deref().unwrap_or_default();
        let conditions = profile.status.iter().flat_map(|status| &status.conditions);
        for condition in conditions.filter(|condition| condition.status == "True") {
            let what = format!("ProxyProfile {name}; {}: {}", condition.reason, condition.message);
            match ConditionType::from_name(&condition.type_) {
                Some(ConditionType::Stalled) => checks.push(Check::failed(codes::PROFILE_STALLED, what)),
                Some(ConditionType::Overlapping) => {
                    checks.push(Check::warning(codes::PROFILES_OVERLAP, what));
                }
                _ => {}
            }
        }
    }
    if checks.is_empty() && !profiles.is_empty() {
        checks.push(Check::passed(format!("no rollout of {} is stuck", count(profiles.len(), "profile"))));
    }
    checks
}

fn about_versions(nodes: &[Diagnosis]) -> Check {
    let versions: BTreeSet<&str> =
        nodes.iter().map(|node| &*node.agent).filter(|version| !version.is_empty()).collect();
    if versions.len() <= 1 {
        return Check::passed("all agents have the same version");
    }
    let versions: Vec<&str> = versions.into_iter().collect();
    Check::warning(codes::VERSION_SKEW, format!("agents have versions {}", versions.join(", ")))
}

#[cfg(test)]
mod tests;
