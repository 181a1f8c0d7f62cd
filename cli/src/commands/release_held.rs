//! `release-held`: releases removals that delete budgets hold, by `spec.releaseHeldBefore` of the rows.

use serde::Serialize;
use serde_json::json;
use switchtower_crds::ProxyStatus;

use crate::args::{Global, ReleaseHeldArgs};
use crate::cluster::Cluster;
use crate::error::CliError;
use crate::output::{Exit, Report};

/// Release of one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Release {
    node: String,
    /// Number of held removals in the row.
    held: i64,
    /// The value of `spec.releaseHeldBefore`.
    release_held_before: i64,
}

pub(crate) async fn run(global: &Global, args: &ReleaseHeldArgs) -> Result<Report, CliError> {
    let cluster = Cluster::new(global).await?;
    let rows = cluster.rows().await?;
    if let Some(unknown) = args.nodes.iter().find(|name| !rows.iter().any(|row| name_of(row) == **name)) {
        return Err(CliError::new(format!(
            "ProxyStatus {unknown} not found; list all with kubectl switchtower status --all"
        )));
    }
    let named = |row: &&ProxyStatus| args.all || args.nodes.iter().any(|name| name_of(row) == *name);
    let releases: Vec<Release> = rows.iter().filter(named).filter_map(release).collect();
    for release in &releases {
        cluster.patch_row(&release.node, &json!({"releaseHeldBefore": release.release_held_before})).await?;
    }
    Report::new(text(&releases), &releases, Exit::Ok)
}

fn name_of(row: &ProxyStatus) -> &str {
    row.metadata.name.as_deref().unwrap_or_default()
}

/// Returns the release of what the row shows as held; `None` if nothing is held.
///
/// Removals that arrive after the row was written belong to later generations and are not released.
fn release(row: &ProxyStatus) -> Option<Release> {
    let status = row.status.as_ref()?;
    let held = status.deviations.as_ref().map(|deviations| deviations.held).filter(|held| *held > 0)?;
    let before = status.generation.applied.saturating_add(1);
    Some(Release { node: name_of(row).to_owned(), held, release_held_before: before })
}

fn text(releases: &[Release]) -> String {
    if releases.is_empty() {
        return "No removals are held.\n".to_owned();
    }
    let line = |release: &Release| {
        format!(
            "{}: {} removals released (generations below {})\n",
            release.node, release.held, release.release_held_before
        )
    };
    releases.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use switchtower_crds::{DeviationCounts, Generations, ProxyStatusSpec, ProxyStatusStatus};

    fn row(held: i64) -> ProxyStatus {
        let mut row = ProxyStatus::new("alpha", ProxyStatusSpec::default());
        row.status = Some(ProxyStatusStatus {
            generation: Generations { desired: 9, sent: 8, applied: 7 },
            deviations: Some(DeviationCounts { held, ..DeviationCounts::default() }),
            ..ProxyStatusStatus::default()
        });
        row
    }

    #[test]
    fn only_acknowledged_removals_released() {
        let wanted = Release { node: "alpha".into(), held: 202, release_held_before: 8 };
        assert_eq!(release(&row(202)), Some(wanted.clone()));
        assert_eq!(release(&row(0)), None);
        assert_eq!(text(&[wanted]), "alpha: 202 removals released (generations below 8)\n");
        assert_eq!(text(&[]), "No removals are held.\n");
    }
}
