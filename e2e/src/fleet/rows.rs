//! Waits for the rows that users read.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use kube::api::ListParams;
use kube::{Api, Client};
use switchtower_crds::ProxyStatus;

/// Waits until every row is Synced and names what the agent holds; returns the time from `began`, or `None` if
/// that takes longer than `patience`.
pub(super) async fn wait_until_current(
    client: &Client,
    nodes: usize,
    began: Instant,
    patience: Duration,
) -> Result<Option<Duration>> {
    let api: Api<ProxyStatus> = Api::all(client.clone());
    // Reading thousands of rows is work for the API server, which shares the machine.
    let pause = Duration::from_millis(200 + nodes as u64 / 2);
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        let rows = api.list(&ListParams::default().match_any()).await.context("listing ProxyStatus")?;
        if rows.items.iter().filter(|row| is_current(row)).count() >= nodes {
            return Ok(Some(began.elapsed()));
        }
        tokio::time::sleep(pause).await;
    }
    Ok(None)
}

fn is_current(row: &ProxyStatus) -> bool {
    let Some(status) = &row.status else { return false };
    status.state == "Synced"
        && status.generation.applied > 0
        && status.generation.applied == status.generation.desired
        && status.digest.is_some()
}
