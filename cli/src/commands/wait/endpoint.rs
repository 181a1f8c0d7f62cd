//! `wait --endpoint ADDRESS --gone`: returns when no connected node sends new connections to the address.

use std::net::IpAddr;
use std::time::Duration;

use serde::Serialize;
use switchtower_admin_api::{DrainReport, codes};

use super::{INTERVAL, Poll, not_counted, problem};
use crate::args::Global;
use crate::cluster::Cluster;
use crate::error::CliError;
use crate::output::{Exit, Report, names};

/// Value of the report.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Found {
    address: IpAddr,
    gone: bool,
    seconds: f64,
    #[serde(flatten)]
    drain: DrainReport,
}

pub(super) async fn run(global: &Global, address: IpAddr, timeout: Duration) -> Result<Report, CliError> {
    let mut poll = Poll::new(global, timeout);
    let cluster = Cluster::new(global).await?;
    let path = format!("/v1/drains/{address}");
    let found = loop {
        let drain: DrainReport = poll.ask(&cluster, &path).await?;
        let gone = is_gone(&drain);
        if gone || poll.is_over() {
            break Found { address, gone, seconds: poll.seconds(), drain };
        }
        tokio::time::sleep(INTERVAL).await;
    };
    let exit = if found.gone { Exit::Ok } else { Exit::Wrong };
    Report::new(text(&found), &found, exit)
}

fn is_gone(drain: &DrainReport) -> bool {
    ["Drained", "NotAnEndpoint"].contains(&drain.verdict.as_str())
}

fn text(found: &Found) -> String {
    let Found { address, gone, seconds, drain } = found;
    let mut text = if *gone {
        format!("{address}: no connected node sends new connections to it after {seconds:.1} s\n")
    } else if drain.verdict == "LastEndpoint" {
        format!("{address}: after {seconds:.1} s it is the last endpoint of a Service\n")
    } else if drain.endpoint {
        format!("{address}: after {seconds:.1} s it is still an endpoint of a Service\n")
    } else {
        format!("{address}: removed from all Services, not from all nodes after {seconds:.1} s\n")
    };
    if !gone && drain.waited_for_total > 0 {
        let waiting = format!(": {}", names(&drain.waited_for, drain.waited_for_total, 10));
        text += &problem(codes::NOT_REACHED, &waiting);
    }
    text + &not_counted(&drain.missing, drain.missing_total)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(verdict: &str, endpoint: bool, waited_for: &[&str]) -> Found {
        let waited_for: Vec<String> = waited_for.iter().map(|name| (*name).to_owned()).collect();
        let drain = DrainReport {
            verdict: verdict.into(),
            endpoint,
            waited_for_total: waited_for.len(),
            waited_for,
            missing: vec!["x0".into()],
            missing_total: 1,
        };
        let address = "10.244.1.7".parse().unwrap();
        Found { address, gone: is_gone(&drain), seconds: 0.25, drain }
    }

    #[test]
    fn every_verdict_is_explained() {
        for (verdict, endpoint, waited_for, gone, part) in [
            ("Drained", false, &["w0"][..], true, "no connected node sends"),
            ("NotAnEndpoint", false, &[], true, "no connected node sends"),
            ("LastEndpoint", true, &[], false, "the last endpoint"),
            ("TimedOut", true, &[], false, "still an endpoint"),
            ("TimedOut", false, &["w0", "w1"], false, "not from all nodes"),
        ] {
            let found = found(verdict, endpoint, waited_for);
            let text = text(&found);
            assert_eq!(found.gone, gone, "{verdict}");
            assert!(text.starts_with("10.244.1.7: ") && text.contains(part), "{text}");
            assert_eq!(text.contains("! ST0305") && text.contains("w0, w1"), waited_for.len() == 2, "{text}");
            assert!(text.ends_with("not counted: 1 node whose agent is not connected (x0)\n"), "{text}");
        }
    }
}
