//! `migrate`: replaces kube-proxy node by node, and returns to it.
//!
//! [`steps`] decides the next action from the observed state ([`observe`]); [`perform`] performs it by kubectl. All state
//! is in the cluster: the label of each Node, two ProxyProfiles, and the ConfigMap with kube-proxy's original DaemonSet.

mod daemon_set;
mod kubectl;
mod lease;
mod observe;
mod perform;
mod steps;

use serde::Serialize;
use switchtower_crds::ProxyMode;
use switchtower_crds::builtin::{self, Record};

use super::check;
use crate::args::{Global, MigrateAction, MigrateArgs, MigrateStartArgs};
use crate::cluster::Cluster;
use crate::error::CliError;
use crate::output::{Exit, Report, Style, count, names};
use kubectl::Kubectl;
use lease::Held;
use observe::Seen;
use perform::{Direction, Migration, Outcome};
use steps::{NodeView, Place, Presence};

/// The steps of a node, for `plan`.
const STEPS: &str = "
Steps of migrate start, for each node:
  1. label the node switchtower.dev/proxy=both: a rollout switches it to mode Active and probes Services; on a failure the
     node returns to mode Shadow, and kube-proxy serves it throughout
  2. label the node switchtower.dev/proxy=switchtower: kube-proxy's DaemonSet leaves it
  3. remove kube-proxy's rules with a Job that runs kube-proxy --cleanup
Connections that are open stay open. kubectl switchtower migrate back returns at any time.
";

pub(crate) async fn run(global: &Global, args: &MigrateArgs, style: Style) -> Result<Report, CliError> {
    let cluster = Cluster::new(global).await?;
    let kubectl = Kubectl::new(global);
    let migration = |timeout, batch: u32, only| Migration {
        cluster: &cluster,
        kubectl: &kubectl,
        timeout,
        batch: batch as usize,
        only,
    };
    match &args.action {
        MigrateAction::Plan => plan(&cluster, style).await,
        MigrateAction::Status => Ok(report(&Seen::look(&cluster).await?, Exit::Ok, "")?),
        MigrateAction::Start(args) => {
            let migration = migration(args.wait.timeout, args.batch, &args.nodes);
            start(&cluster, &migration, args, style).await
        }
        MigrateAction::Finish(args) => finish(&cluster, &migration(args.timeout, 1, &[])).await,
        MigrateAction::Back(args) => back(&cluster, &migration(args.wait.timeout, args.batch, &[])).await,
    }
}

/// Profiles of the migration.
const PROFILES: [&str; 2] = [steps::ACTIVE_PROFILE, steps::SHADOW_PROFILE];

async fn plan(cluster: &Cluster, style: Style) -> Result<Report, CliError> {
    let checks = check::migration(cluster, &PROFILES).await?;
    let exit = if check::any_failed(&checks) { Exit::Wrong } else { Exit::Ok };
    Report::new(check::text(&checks, style) + STEPS, &checks, exit)
}

async fn start(
    cluster: &Cluster,
    migration: &Migration<'_>,
    args: &MigrateStartArgs,
    style: Style,
) -> Result<Report, CliError> {
    let seen = Seen::look(cluster).await?;
    if let Some(unknown) = args.nodes.iter().find(|name| seen.nodes.iter().all(|node| node.name != **name)) {
        return Err(CliError::new(format!(
            "Linux node {unknown} not found; list nodes with kubectl get nodes"
        )));
    }
    if seen.daemon_set.is_none() {
        return Err(CliError::new(
            "the DaemonSet of kube-proxy was not found, or there are several; see docs/migration.md for other installations",
        ));
    }
    let checks = check::migration(cluster, &PROFILES).await?;
    if check::any_failed(&checks) && !args.force {
        let text =
            check::text(&checks, style) + "Nothing was changed. Resolve the failed checks, or use --force.\n";
        return Report::new(text, &checks, Exit::Wrong);
    }
    let mut lease = Held::take(cluster).await?;
    let outcome = async {
        migration.prepare(&seen).await?;
        migration.run(Direction::ToSwitchtower, &mut lease).await
    };
    let outcome = outcome.await;
    lease.release().await;
    concluded(cluster, outcome?, "run kubectl switchtower migrate finish after all nodes have moved").await
}

async fn finish(cluster: &Cluster, migration: &Migration<'_>) -> Result<Report, CliError> {
    let seen = Seen::look(cluster).await?;
    let left: Vec<String> =
        seen.nodes.iter().filter(|node| !node.has_moved()).map(|node| node.name.clone()).collect();
    if !left.is_empty() {
        let text = format!(
            "not moved: {}; kube-proxy is kept. Run kubectl switchtower migrate start",
            names(&left, left.len(), 5)
        );
        return report(&seen, Exit::Wrong, &text);
    }
    let mut lease = Held::take(cluster).await?;
    let outcome = migration.finish(&mut lease).await;
    lease.release().await;
    let next = "with kubeadm, set proxy.disabled in ConfigMap kube-system/kubeadm-config (ST0411)";
    concluded(cluster, outcome?, next).await
}

async fn back(cluster: &Cluster, migration: &Migration<'_>) -> Result<Report, CliError> {
    let seen = Seen::look(cluster).await?;
    if seen.original.is_none() && seen.nodes.iter().all(|node| node.place == Place::Untouched) {
        return report(&seen, Exit::Ok, "no migration to return from");
    }
    let shadow = builtin_is_shadow(cluster).await?;
    let mut lease = Held::take(cluster).await?;
    let outcome = async {
        let mut outcome = migration.restore_daemon_set(&mut lease).await?;
        if outcome.is_finished() {
            outcome = migration.run(Direction::ToKubeProxy, &mut lease).await?;
        }
        if outcome.is_finished() {
            outcome = migration.clear(shadow, &mut lease).await?;
        }
        Ok(outcome)
    };
    let outcome: Result<Outcome, CliError> = outcome.await;
    lease.release().await;
    let kept = "ProxyProfile kube-proxy-return keeps all nodes in mode Shadow; its deletion activates Switchtower again";
    concluded(cluster, outcome?, if shadow { "" } else { kept }).await
}

/// Returns whether nodes without a profile are in mode Shadow.
async fn builtin_is_shadow(cluster: &Cluster) -> Result<bool, CliError> {
    let map = cluster.find(cluster.system_namespace(), builtin::CONFIG_MAP).await?;
    let record = map.as_ref().and_then(|map| Record::read(map).ok());
    Ok(record.is_some_and(|record| record.settings.mode == Some(ProxyMode::Shadow)))
}

async fn concluded(cluster: &Cluster, outcome: Outcome, next: &str) -> Result<Report, CliError> {
    let seen = Seen::look(cluster).await?;
    match outcome {
        Outcome::Finished(away) if away.is_empty() => report(&seen, Exit::Ok, next),
        Outcome::Finished(away) => {
            let text = format!("unreachable and not moved: {}", names(&away, away.len(), 5));
            report(&seen, Exit::Wrong, &text)
        }
        Outcome::Stopped(reason) => {
            let text = format!(
                "stopped: {reason}. Continue with the same command, or return with kubectl switchtower migrate back"
            );
            report(&seen, Exit::Wrong, &text)
        }
    }
}

/// Value of `-o json`.
#[derive(Serialize)]
struct Status<'a> {
    nodes: &'a [NodeView],
    message: &'a str,
}

fn report(seen: &Seen, exit: Exit, message: &str) -> Result<Report, CliError> {
    Report::new(table(&seen.nodes, message), &Status { nodes: &seen.nodes, message }, exit)
}

/// Returns the proxies that serve a node.
fn served_by(node: &NodeView) -> &'static str {
    match (node.place, node.is_active(), node.kube_proxy != Presence::Absent || node.kube_proxy_rules) {
        (_, true, true) => "both",
        (_, true, false) => "Switchtower",
        (_, false, true) => "kube-proxy",
        (_, false, false) => "unknown",
    }
}

fn table(nodes: &[NodeView], message: &str) -> String {
    let width = nodes.iter().map(|node| node.name.len()).max().unwrap_or(0).max(4);
    let mut text = format!(
        "{:width$}  {:12}  {:12}  {:12}  {}\n",
        "NODE", "SERVED BY", "LABEL", "STATE", "KUBE-PROXY POD"
    );
    for node in nodes {
        let label = node.place.label().unwrap_or("<none>");
        let state = node.state.map_or("<none>", switchtower_admin_api::NodeState::as_str);
        let pod = match node.kube_proxy {
            Presence::Absent => "<none>",
            Presence::NotReady => "not ready",
            Presence::Ready => "ready",
        };
        text += &format!("{:width$}  {:12}  {label:12}  {state:12}  {pod}\n", node.name, served_by(node));
    }
    let moved = nodes.iter().filter(|node| node.has_moved()).count();
    text += &format!("\n{moved} of {} moved to Switchtower\n", count(nodes.len(), "node"));
    if !message.is_empty() {
        text += &format!("{message}\n");
    }
    text
}
