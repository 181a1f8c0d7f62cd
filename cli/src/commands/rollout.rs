//! `rollout`: progress of rollouts, and commands that set `paused`, `approvedStep` and `abort`.

use serde_json::json;
use switchtower_admin_api::{ConditionType, RolloutState, WaitingOn};
use switchtower_crds::{ProxyRollout, ProxyRolloutStatus};

use crate::args::{Global, RolloutAction, RolloutArgs};
use crate::cluster::Cluster;
use crate::error::CliError;
use crate::output::{Exit, Report, Style, table, wrapped};

pub(crate) async fn run(global: &Global, args: &RolloutArgs, style: Style) -> Result<Report, CliError> {
    perform(&Cluster::new(global).await?, &args.action, style).await
}

/// Performs an action.
pub(crate) async fn perform(
    cluster: &Cluster,
    action: &RolloutAction,
    style: Style,
) -> Result<Report, CliError> {
    match action {
        RolloutAction::Status { name: None } => {
            let mut rollouts = cluster.rollouts().await?;
            // Latest last, as kubectl prints Events.
            rollouts.sort_by(|a, b| a.metadata.creation_timestamp.cmp(&b.metadata.creation_timestamp));
            Report::new(list(&rollouts), &rollouts, exit(&rollouts))
        }
        RolloutAction::Status { name: Some(name) } => {
            let rollout = existing(cluster, name).await?;
            let text = one(name, &rollout, style);
            Report::new(text, &rollout, exit(std::slice::from_ref(&rollout)))
        }
        RolloutAction::Pause { name } => {
            let rollout = running(cluster, name).await?;
            drop(rollout);
            change(cluster, name, json!({"paused": true}), "paused; no further node is updated").await
        }
        RolloutAction::Resume { name } => {
            running(cluster, name).await?;
            change(cluster, name, json!({"paused": false}), "resumed").await
        }
        RolloutAction::Approve { name } => {
            let step = step_to_approve(name, &running(cluster, name).await?)?;
            let what = format!("step {step} approved");
            change(cluster, name, json!({"approvedStep": step}), &what).await
        }
        RolloutAction::Abort { name } => {
            running(cluster, name).await?;
            change(cluster, name, json!({"abort": true}), "aborted; its nodes return to the stable revision")
                .await
        }
    }
}

async fn existing(cluster: &Cluster, name: &str) -> Result<ProxyRollout, CliError> {
    cluster.rollout(name).await?.ok_or_else(|| {
        CliError::new(format!(
            "ProxyRollout {name} not found; list all with kubectl switchtower rollout status"
        ))
    })
}

async fn running(cluster: &Cluster, name: &str) -> Result<ProxyRollout, CliError> {
    let rollout = existing(cluster, name).await?;
    let state = rollout.status.as_ref().map(|status| status.state.as_str()).unwrap_or_default();
    if RolloutState::from_name(state).is_some_and(RolloutState::is_final) {
        return Err(CliError::new(format!("ProxyRollout {name} has ended ({state}) and cannot be changed")));
    }
    Ok(rollout)
}

async fn change(
    cluster: &Cluster,
    name: &str,
    spec: serde_json::Value,
    what: &str,
) -> Result<Report, CliError> {
    let rollout = cluster.patch_rollout(name, &spec).await?;
    Report::new(format!("{name}: {what}\n"), &rollout, Exit::Ok)
}

/// Returns the step that waits for approval.
fn step_to_approve(name: &str, rollout: &ProxyRollout) -> Result<i32, CliError> {
    let status = rollout.status.clone().unwrap_or_default();
    if waiting_on(&status) != Some(WaitingOn::Approval) {
        let waiting = status.waiting_on.unwrap_or_else(|| "nothing".to_owned());
        let message = format!("ProxyRollout {name} is not waiting for approval, but for {waiting}");
        return Err(CliError::new(message));
    }
    Ok(status.progress.steps_done + 1)
}

fn waiting_on(status: &ProxyRolloutStatus) -> Option<WaitingOn> {
    WaitingOn::from_name(status.waiting_on.as_deref()?)
}

fn exit(rollouts: &[ProxyRollout]) -> Exit {
    use RolloutState::{Aborted, Failed, Frozen, RollingBack};
    let failed = rollouts
        .iter()
        .filter_map(|rollout| RolloutState::from_name(&rollout.status.as_ref()?.state))
        .any(|state| matches!(state, Failed | Aborted | RollingBack | Frozen));
    if failed { Exit::Wrong } else { Exit::Ok }
}

fn list(rollouts: &[ProxyRollout]) -> String {
    if rollouts.is_empty() {
        return "No ProxyRollouts found; the controller creates one when a ProxyProfile changes.\n"
            .to_owned();
    }
    let rows: Vec<Vec<String>> = rollouts
        .iter()
        .map(|rollout| {
            let status = rollout.status.clone().unwrap_or_default();
            let name = rollout.metadata.name.clone().unwrap_or_default();
            let waiting = status.waiting_on.clone().unwrap_or_else(|| "-".to_owned());
            let ProxyRolloutStatus { state, target, progress, failed, .. } = status;
            vec![name, state, progress.step, target, progress.updated, failed.to_string(), waiting]
        })
        .collect();
    table(&["NAME", "STATE", "STEP", "TARGET", "UPDATED", "FAILED", "WAITING-ON"], &rows)
}

fn one(name: &str, rollout: &ProxyRollout, style: Style) -> String {
    let status = rollout.status.clone().unwrap_or_default();
    let state = match exit(std::slice::from_ref(rollout)) {
        Exit::Ok => style.good(&status.state),
        _ => style.bad(&status.state),
    };
    let mut text = format!("{name}  {state}  {} -> {}\n", status.stable, status.target);
    let mut line = |name: &str, value: &str| {
        text += &format!("  {name:9} {}\n", wrapped(value, 12));
    };
    line("step", &status.progress.step);
    line("nodes", &format!("{} updated, {} failed", status.progress.updated, status.failed));
    if let Some(took) = &status.acknowledgements {
        let switchtower_crds::RolloutAcknowledgements {
            nodes,
            median_milliseconds,
            slowest_milliseconds,
            ..
        } = took;
        let median = format!("median {median_milliseconds} ms of {nodes} nodes");
        line("acks", &format!("{median}, maximum {slowest_milliseconds} ms ({})", took.slowest_node));
    }
    if let Some(waiting) = &status.waiting_on {
        line("waiting", waiting);
        if waiting_on(&status) == Some(WaitingOn::Approval) {
            line("next", &format!("kubectl switchtower rollout approve {name}"));
        }
    }
    let ready = status.conditions.iter().find(|condition| condition.type_ == ConditionType::Ready.as_str());
    if let Some(message) = ready.map(|ready| ready.message.as_str()).filter(|message| !message.is_empty()) {
        line("why", message);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rollout(state: &str, waiting: Option<&str>) -> ProxyRollout {
        let mut rollout = ProxyRollout::new("raise-limits-2", switchtower_crds::ProxyRolloutSpec::default());
        rollout.status = Some(ProxyRolloutStatus {
            state: state.to_owned(),
            target: "default@2".to_owned(),
            stable: "default@1".to_owned(),
            waiting_on: waiting.map(str::to_owned),
            progress: switchtower_crds::RolloutProgress {
                steps_done: 1,
                current_step: 2,
                step: "2/4".to_owned(),
                updated: "12/400".to_owned(),
                ..Default::default()
            },
            acknowledgements: Some(switchtower_crds::RolloutAcknowledgements {
                nodes: 12,
                median_milliseconds: 21,
                slowest_milliseconds: 79,
                slowest_node: "n05".to_owned(),
            }),
            ..ProxyRolloutStatus::default()
        });
        rollout
    }

    #[test]
    fn only_waiting_steps_are_approved() {
        assert_eq!(step_to_approve("x", &rollout("Paused", Some("Approval"))).unwrap(), 2);
        let error = step_to_approve("x", &rollout("Soaking", Some("Soak"))).unwrap_err();
        assert!(error.message.ends_with("but for Soak"), "{error}");
    }

    #[test]
    fn rollouts_are_printed_as_text() {
        let waiting = rollout("Paused", Some("Approval"));
        let text = one("raise-limits-2", &waiting, Style::PLAIN);
        let wanted = "\
raise-limits-2  Paused  default@1 -> default@2
  step      2/4
  nodes     12/400 updated, 0 failed
  acks      median 21 ms of 12 nodes, maximum 79 ms (n05)
  waiting   Approval
  next      kubectl switchtower rollout approve raise-limits-2
";
        assert_eq!(text, wanted);
        assert_eq!(exit(&[waiting]), Exit::Ok);
        assert_eq!(exit(&[rollout("Failed", None)]), Exit::Wrong);
        assert_eq!(
            list(&[]),
            "No ProxyRollouts found; the controller creates one when a ProxyProfile changes.\n"
        );
        assert!(
            list(&[rollout("Soaking", Some("Soak"))]).contains("raise-limits-2  Soaking  2/4   default@2")
        );
    }
}
