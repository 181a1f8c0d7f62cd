//! `trace`: duration of the stages of a change, measured with the controller's clock.

use switchtower_admin_api::VIEWER;
use switchtower_admin_api::codes;
use switchtower_admin_api::{ChangeReport, NodeReport};

use crate::args::{Global, ServiceName, TraceArgs};
use crate::cluster::Cluster;
use crate::controller::Controller;
use crate::error::CliError;
use crate::output::{Exit, Report, Style, count, names, table, wrapped};

/// Maximum number of nodes to list.
const NODES: usize = 5;

pub(crate) async fn run(global: &Global, args: &TraceArgs, style: Style) -> Result<Report, CliError> {
    let subject = ServiceName::parse(&args.service).map_err(CliError::new)?;
    let cluster = Cluster::new(global).await?;
    let namespace = subject.namespace.as_deref().unwrap_or(cluster.namespace());
    let mut controller = Controller::connect(global, &cluster, VIEWER).await?;
    let path = format!("/v1/services/{namespace}/{}/changes?limit={}", subject.name, args.last);
    let changes: Vec<ChangeReport> = controller.get(&path).await?;
    if changes.is_empty() {
        return Err(CliError::new(format!(
            "the controller has no record of a change of {namespace}/{}: none occurred since it started, the record \
             has expired, or the change did not affect any node",
            subject.name
        )));
    }
    let unreached =
        |change: &ChangeReport| change.outstanding + change.given_up > 0 || !change.refusals.is_empty();
    let exit = if changes.iter().any(unreached) { Exit::Wrong } else { Exit::Ok };
    // Each replica reports its own nodes.
    let several = changes.iter().any(|change| change.replica != changes[0].replica);
    let heading = |change: &ChangeReport| {
        if several { format!("Nodes of replica {}:\n", change.replica) } else { String::new() }
    };
    let texts: Vec<String> =
        changes.iter().map(|change| format!("{}{}", heading(change), text(change, style))).collect();
    Report::new(texts.join("\n"), &changes, exit)
}

/// Formats a duration in microseconds.
fn span(microseconds: u64) -> String {
    match microseconds {
        0..1_000 => format!("{microseconds} us"),
        1_000..1_000_000 => format!("{}.{} ms", microseconds / 1_000, microseconds % 1_000 / 100),
        _ => format!("{}.{:02} s", microseconds / 1_000_000, microseconds % 1_000_000 / 10_000),
    }
}

fn text(change: &ChangeReport, style: Style) -> String {
    let mut text = format!("{}  revision {}  trace {}\n", change.object, change.revision, change.trace_id);
    let mut line = |after: Option<u64>, what: String| {
        let after = after.map_or_else(|| "not yet".to_owned(), |after| format!("+{}", span(after)));
        text += &format!("  {after:>10}  {}\n", wrapped(&what, 14));
    };
    if let Some(triggered) = change.triggered_unix_nanoseconds {
        let before = change.received_unix_nanoseconds.saturating_sub(triggered) / 1_000;
        let what = format!("received, {} after the trigger time in the object (precision 1 s)", span(before));
        line(Some(0), what);
    } else {
        line(Some(0), "received from the API server".to_owned());
    }
    let together = match change.compiled_together {
        0 | 1 => String::new(),
        number => format!(", {number} changes in one batch"),
    };
    line(Some(change.compiling), format!("compilation started{together}"));
    line(Some(change.published), "compiled, sessions notified".to_owned());
    if change.eligible == 0 {
        line(None, "no connected node is affected".to_owned());
    } else {
        line(change.half, format!("half of {} hold it", count(change.eligible as usize, "node")));
        line(change.most, "99 % hold it".to_owned());
        line(change.all, "all hold it".to_owned());
    }
    text += &nodes(&change.slowest);
    text += &troubles(change, style);
    text
}

fn nodes(slowest: &[NodeReport]) -> String {
    if slowest.is_empty() {
        return String::new();
    }
    let shown = |value: Option<u64>| value.map_or_else(|| "-".to_owned(), span);
    let rows: Vec<Vec<String>> = slowest
        .iter()
        .take(NODES)
        .map(|node| {
            let generation = node.generation.map_or_else(|| "-".to_owned(), |number| number.to_string());
            vec![
                node.node.clone(),
                format!("+{}", span(node.after)),
                shown(node.sending),
                shown(node.plan),
                shown(node.commit),
                shown(node.round_trip),
                generation,
            ]
        })
        .collect();
    let header = ["SLOWEST", "HELD", "SENT-AT", "PLAN", "KERNEL", "ROUND-TRIP", "GENERATION"];
    table(&header, &rows)
}

fn troubles(change: &ChangeReport, style: Style) -> String {
    let mut text = String::new();
    let outstanding = change.outstanding as usize;
    if outstanding > 0 {
        let code = codes::NODE_BEHIND.code;
        let waiting = names(&change.waiting, outstanding, NODES);
        text +=
            &format!("{} {code}  waiting for {}: {waiting}\n", style.bad("!"), count(outstanding, "node"));
    }
    if change.given_up > 0 {
        let nodes = count(change.given_up as usize, "node");
        text +=
            &format!("{} {}  {nodes} did not acknowledge in time\n", style.bad("!"), codes::NOT_REACHED.code);
    }
    for refusal in &change.refusals {
        let (node, reason, after) = (&refusal.node, &refusal.reason, span(refusal.after));
        let code = codes::APPLY_FAILED.code;
        text += &format!("{} {code}  {node} refused it after {after}: {reason}\n", style.bad("!"));
    }
    if change.excluded > 0 {
        let nodes = count(change.excluded as usize, "node");
        text += &format!("not counted: {nodes} whose agent disconnected\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use switchtower_admin_api::RefusalReport;

    use super::*;

    fn change() -> ChangeReport {
        ChangeReport {
            replica: "controller-0".into(),
            change: 3,
            trace_id: "4bf92f3577b34da6a3ce929d0e0e4736".into(),
            object: "EndpointSlice shop/cart-x7".into(),
            service: "shop/cart".into(),
            revision: 12,
            received_unix_nanoseconds: 5_000_000_000,
            triggered_unix_nanoseconds: None,
            compiled_together: 2,
            compiling: 90,
            published: 310,
            half: Some(2_250),
            most: Some(1_204_000),
            all: Some(1_204_000),
            eligible: 3,
            acknowledged: 3,
            excluded: 0,
            given_up: 0,
            outstanding: 0,
            waiting: vec![],
            slowest: vec![NodeReport {
                node: "gamma".into(),
                after: 1_204_000,
                sending: Some(400),
                round_trip: Some(1_200_000),
                plan: Some(60),
                commit: Some(1_190_000),
                generation: Some(41),
            }],
            refusals: vec![],
        }
    }

    #[test]
    fn stages_of_a_change_are_listed() {
        let wanted = "\
EndpointSlice shop/cart-x7  revision 12  trace 4bf92f3577b34da6a3ce929d0e0e4736
       +0 us  received from the API server
      +90 us  compilation started, 2 changes in one batch
     +310 us  compiled, sessions notified
     +2.2 ms  half of 3 nodes hold it
     +1.20 s  99 % hold it
     +1.20 s  all hold it
SLOWEST  HELD     SENT-AT  PLAN   KERNEL  ROUND-TRIP  GENERATION
gamma    +1.20 s  400 us   60 us  1.19 s  1.20 s      41
";
        assert_eq!(text(&change(), Style::PLAIN), wanted);
    }

    #[test]
    fn nodes_without_the_change_are_named() {
        let refusals =
            vec![RefusalReport { node: "beta".into(), after: 900, reason: "KernelRefused".into() }];
        let late = ChangeReport {
            all: None,
            most: None,
            outstanding: 1,
            excluded: 1,
            waiting: vec!["beta".into()],
            refusals,
            ..change()
        };
        let text = text(&late, Style::PLAIN);
        assert!(text.contains("     not yet  all hold it\n"), "{text}");
        assert!(text.contains("! ST0103  waiting for 1 node: beta\n"), "{text}");
        assert!(text.contains("! ST0104  beta refused it after 900 us: KernelRefused\n"), "{text}");
        assert!(text.ends_with("not counted: 1 node whose agent disconnected\n"), "{text}");
    }
}
