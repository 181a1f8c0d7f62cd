//! `wait`: returns when the kernels of all connected nodes hold a change, or when none has an endpoint any more.

use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use switchtower_admin_api::codes::{self, Code};
use switchtower_admin_api::{Progress, VIEWER};

use crate::args::{Global, ServiceName, WaitArgs, WaitFor};
use crate::cluster::{Cluster, version};
use crate::controller::Controller;
use crate::error::CliError;
use crate::output::{Exit, Report, count, names, wrapped};

mod endpoint;

/// Interval between two requests.
const INTERVAL: Duration = Duration::from_millis(100);

/// Delay before a reconnection.
const RETRY: Duration = Duration::from_secs(1);
/// Maximum age of a connection. Its token is valid for ten minutes.
const RENEWAL: Duration = Duration::from_secs(300);

/// Value of the report.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Found {
    subject: String,
    reached: bool,
    seconds: f64,
    #[serde(flatten)]
    progress: Progress,
}

pub(crate) async fn run(global: &Global, args: &WaitArgs) -> Result<Report, CliError> {
    let WaitFor::Change = args.wait_for;
    if let Some(address) = args.endpoint {
        return endpoint::run(global, address, args.timeout).await;
    }
    let mut poll = Poll::new(global, args.timeout);
    let cluster = Cluster::new(global).await?;
    let (subject, services, slices) = target(&cluster, args.service.as_deref()).await?;
    let first = format!("/v1/progress?services={services}&endpointSlices={slices}");
    let mut path = first.clone();
    let found = loop {
        let progress: Progress = poll.ask(&cluster, &path).await?;
        path = match progress.revision {
            Some(revision) => format!("{first}&revision={revision}&instance={}", progress.instance),
            None => first.clone(),
        };
        let reached = is_reached(&progress, args.percent);
        if reached || poll.is_over() {
            break Found { subject, reached, seconds: poll.seconds(), progress };
        }
        tokio::time::sleep(INTERVAL).await;
    };
    let exit = if found.reached { Exit::Ok } else { Exit::Wrong };
    Report::new(text(&found), &found, exit)
}

/// Repeated requests until a timeout.
struct Poll<'a> {
    global: &'a Global,
    connection: Option<(Controller, Instant)>,
    started: Instant,
    timeout: Duration,
}

impl<'a> Poll<'a> {
    fn new(global: &'a Global, timeout: Duration) -> Self {
        Self { global, connection: None, started: Instant::now(), timeout }
    }

    fn is_over(&self) -> bool {
        self.started.elapsed() >= self.timeout
    }

    fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// Sends a request. The controller may have been replaced: reconnects with a new token until the timeout.
    async fn ask<T: DeserializeOwned>(&mut self, cluster: &Cluster, path: &str) -> Result<T, CliError> {
        loop {
            match self.ask_once(cluster, path).await {
                Err(error) if error.is_unreachable() && !self.is_over() => {
                    tokio::time::sleep(RETRY.min(self.timeout)).await;
                }
                answer => return answer,
            }
        }
    }

    /// Sends a request over the existing connection or a new one.
    async fn ask_once<T: DeserializeOwned>(&mut self, cluster: &Cluster, path: &str) -> Result<T, CliError> {
        let known = self.connection.take().filter(|(_, since)| since.elapsed() < RENEWAL);
        let (mut controller, since) = match known {
            Some(connection) => connection,
            None => (Controller::connect(self.global, cluster, VIEWER).await?, Instant::now()),
        };
        let answer = controller.get(path).await?;
        self.connection = Some((controller, since));
        Ok(answer)
    }
}

/// Returns the subject and the resourceVersions to wait for.
async fn target(cluster: &Cluster, service: Option<&str>) -> Result<(String, u64, u64), CliError> {
    let Some(text) = service else {
        let (services, slices) = cluster.newest().await?;
        return Ok(("all changes".to_owned(), services, slices));
    };
    let subject = ServiceName::parse(text).map_err(CliError::new)?;
    let namespace = subject.namespace.as_deref().unwrap_or(cluster.namespace());
    let full = format!("{namespace}/{}", subject.name);
    let service = cluster.service(namespace, &subject.name).await?;
    let service = service.ok_or_else(|| {
        let hint = "to wait for a deletion, omit the name";
        CliError::new(format!("Service {full} not found; {hint}"))
    })?;
    let slices = cluster.slices(namespace, &subject.name).await?;
    let newest = slices.into_iter().map(|slice| version(slice.metadata.resource_version)).max();
    Ok((full, version(service.metadata.resource_version), newest.unwrap_or_default()))
}

/// Returns true if enough connected nodes hold the change. Never true without connected nodes.
fn is_reached(progress: &Progress, percent: u8) -> bool {
    progress.revision.is_some()
        && progress.connected > 0
        && progress.reached * 100 >= progress.connected * usize::from(percent)
}

fn text(found: &Found) -> String {
    let Found { subject, progress, seconds, .. } = found;
    let Progress { connected, reached, .. } = progress;
    let mut text = if progress.revision.is_none() {
        format!("{subject}: after {seconds:.1} s the controller has not observed the change yet\n")
    } else {
        let nodes = count(*connected, "connected node");
        format!("{subject}: {reached} of {nodes} hold it after {seconds:.1} s\n")
    };
    if !found.reached {
        let code = if *connected == 0 { codes::NO_NODE_CONNECTED } else { codes::NOT_REACHED };
        let waiting = if *connected == 0 {
            String::new()
        } else {
            format!(": {}", names(&progress.waiting, connected - reached, 10))
        };
        text += &problem(code, &waiting);
    }
    text + &not_counted(&progress.excluded, progress.excluded_total)
}

/// Returns a message code with details and its action.
fn problem(code: Code, details: &str) -> String {
    let action = wrapped(code.action, 2);
    format!("! {}  {}{}\n  {action}\n", code.code, code.title, wrapped(details, 40))
}

/// Returns the line about nodes that do not count; empty if there are none.
fn not_counted(nodes: &[String], total: usize) -> String {
    if total == 0 {
        return String::new();
    }
    let listed = names(nodes, total, 10);
    let nodes = count(total, "node");
    format!("not counted: {nodes} whose agent is not connected ({})\n", wrapped(&listed, 13))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(connected: usize, reached: usize, excluded: usize) -> Progress {
        let nodes = |prefix: &str, number: usize| (0..number).map(|i| format!("{prefix}{i}")).collect();
        Progress {
            instance: "i".into(),
            revision: Some(3),
            connected,
            reached,
            waiting: nodes("w", connected - reached),
            excluded: nodes("x", excluded),
            excluded_total: excluded,
        }
    }

    #[test]
    fn no_connected_node_is_not_all_nodes() {
        assert!(is_reached(&progress(3, 3, 1), 100));
        assert!(!is_reached(&progress(3, 2, 0), 100));
        assert!(is_reached(&progress(3, 2, 0), 66));
        assert!(!is_reached(&progress(0, 0, 3), 1));
        assert!(!is_reached(&Progress { revision: None, ..progress(3, 3, 0) }, 100));
    }

    #[test]
    fn missing_and_excluded_nodes_are_named() {
        let found =
            |progress, reached| Found { subject: "shop/cart".into(), reached, seconds: 0.25, progress };
        let text = |progress, reached| super::text(&found(progress, reached));
        assert_eq!(text(progress(3, 3, 0), true), "shop/cart: 3 of 3 connected nodes hold it after 0.2 s\n");
        let late = text(progress(3, 1, 1), false);
        assert!(late.contains("! ST0305") && late.contains("w0, w1"), "{late}");
        assert!(late.ends_with("not counted: 1 node whose agent is not connected (x0)\n"), "{late}");
        let empty = text(progress(0, 0, 2), false);
        assert!(empty.contains("! ST0304  no node is connected"), "{empty}");
        let unseen = text(Progress { revision: None, ..progress(2, 0, 0) }, false);
        assert!(unseen.contains("has not observed the change yet"), "{unseen}");
    }
}
