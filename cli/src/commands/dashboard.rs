//! `dashboard`: a page on loopback that shows the fleet, rollouts and paths of Services, live, with the rights of the
//! user; or the same page as a file.

use std::path::Path;
use std::sync::Arc;

use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use kube::runtime::watcher::Event;
use serde_json::json;
use switchtower_crds::{ProxyRollout, ProxyStatus};
use tokio::net::TcpListener;

use crate::args::{DashboardArgs, Global};
use crate::cluster::Cluster;
use crate::error::CliError;
use crate::output::{self, Exit, Report};

mod guard;
mod model;
mod page;
mod server;

use model::Model;
use server::{Server, Shared};

/// Interval between checks for rows that are out of date, in seconds.
const EXPIRY_SECONDS: u64 = 5;

pub(crate) async fn run(global: &Global, args: &DashboardArgs) -> Result<Report, CliError> {
    let cluster = Cluster::new(global).await?;
    match &args.file {
        Some(file) => write(&cluster, file).await,
        None => serve(global, cluster, args.port).await,
    }
}

/// Writes the current state as a page without a server.
async fn write(cluster: &Cluster, path: &Path) -> Result<Report, CliError> {
    let (rows, rollouts, now) = tokio::join!(cluster.rows(), cluster.rollouts(), cluster.now());
    let (rows, rollouts) = (rows?, rollouts?);
    let mut model = Model::default();
    rows.iter().for_each(|row| model.apply_row(row, now));
    rollouts.into_iter().for_each(|rollout| model.apply_rollout(rollout));
    let html = page::document(&page::nonce(), Some(&model.since(0)), now);
    let mut file = output::create_file(path, "--file")?;
    std::io::Write::write_all(&mut file, html.as_bytes())
        .map_err(|error| CliError::new(format!("cannot write {}: {error}", path.display())))?;
    let value = json!({"file": path, "nodes": rows.len()});
    Report::new(format!("{}: {} nodes\n", path.display(), rows.len()), &value, Exit::Ok)
}

/// Serves the page until Ctrl-C.
async fn serve(global: &Global, cluster: Cluster, port: u16) -> Result<Report, CliError> {
    // Fails early without permission; the watches retry.
    cluster.rows().await?;
    let listener = TcpListener::bind(("127.0.0.1", port)).await;
    let listener = listener.map_err(|error| {
        CliError::new(format!("cannot listen on 127.0.0.1:{port}: {error}; choose another port with --port"))
    })?;
    let address = listener.local_addr().map_err(|error| CliError::new(error.to_string()))?;
    let shared = Arc::new(Shared::new(global.clone(), cluster.clone(), &address.to_string()));
    output::announce(&format!(
        "{}\nPress Ctrl-C to stop. The address contains a password: do not share it.",
        shared.url()
    ));
    tokio::select! {
        () = Server::new(shared.clone()).run(listener) => {}
        () = follow_rows(&cluster, &shared) => {}
        () = follow_rollouts(&cluster, &shared) => {}
        () = expire(&shared) => {}
        _ = tokio::signal::ctrl_c() => {}
    }
    Ok(Report::text(String::new()))
}

/// Marks rows that no controller renews. Compares with the local clock, which may differ from the API server's by
/// seconds; a row is out of date after tens of seconds.
async fn expire(shared: &Shared) {
    loop {
        tokio::time::sleep(std::time::Duration::from_secs(EXPIRY_SECONDS)).await;
        shared.change(|model| model.expire(Timestamp::now()));
    }
}

async fn follow_rows(cluster: &Cluster, shared: &Shared) {
    let mut listed = std::collections::BTreeSet::new();
    let mut events = cluster.watch::<ProxyStatus>().boxed();
    loop {
        match events.try_next().await {
            Ok(Some(event)) => shared.change(|model| {
                model.set_problem(None);
                match event {
                    Event::Init => listed.clear(),
                    Event::InitApply(row) => {
                        listed.insert(row.name_any());
                        model.apply_row(&row, Timestamp::now());
                    }
                    Event::InitDone => model.retain_rows(&listed),
                    Event::Apply(row) => model.apply_row(&row, Timestamp::now()),
                    Event::Delete(row) => model.remove_row(&row.name_any()),
                }
            }),
            Ok(None) => return,
            // The stream continues with backoff.
            Err(error) => {
                shared.change(|model| model.set_problem(Some(format!("cannot watch ProxyStatus: {error}"))));
            }
        }
    }
}

async fn follow_rollouts(cluster: &Cluster, shared: &Shared) {
    let mut listed = std::collections::BTreeSet::new();
    let mut events = cluster.watch::<ProxyRollout>().boxed();
    loop {
        match events.try_next().await {
            Ok(Some(event)) => shared.change(|model| match event {
                Event::Init => listed.clear(),
                Event::InitApply(rollout) => {
                    listed.insert(rollout.name_any());
                    model.apply_rollout(rollout);
                }
                Event::InitDone => model.retain_rollouts(&listed),
                Event::Apply(rollout) => model.apply_rollout(rollout),
                Event::Delete(rollout) => model.remove_rollout(&rollout.name_any()),
            }),
            Ok(None) => return,
            Err(error) => {
                shared
                    .change(|model| model.set_problem(Some(format!("cannot watch ProxyRollouts: {error}"))));
            }
        }
    }
}
