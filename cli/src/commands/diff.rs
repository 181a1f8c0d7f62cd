//! `diff`: desired, acknowledged and programmed state of a node.

use switchtower_admin_api::codes;
use switchtower_admin_api::{NodeDiff, OPERATOR, Stage};

use crate::args::{DiffArgs, Global};
use crate::cluster::Cluster;
use crate::controller::{Controller, escaped};
use crate::error::CliError;
use crate::output::{Exit, Report, Style, count, wrapped};

pub(crate) async fn run(global: &Global, args: &DiffArgs, style: Style) -> Result<Report, CliError> {
    let cluster = Cluster::new(global).await?;
    let mut controller = Controller::connect(global, &cluster, OPERATOR).await?;
    let diff: NodeDiff = controller.get(&format!("/v1/nodes/{}/diff", escaped(&args.node))).await?;
    let exit = if is_same(&diff) { Exit::Ok } else { Exit::Wrong };
    Report::new(text(&diff, style), &diff, exit)
}

/// Compares digests rather than generations: generations differ while changes are in progress.
fn is_same(diff: &NodeDiff) -> bool {
    let kernel = diff.kernel.as_ref().map(|stage| &stage.digest);
    diff.differences_total == 0
        && diff.deviations.is_empty()
        && diff.desired.digest == diff.acknowledged.digest
        && kernel == Some(&diff.desired.digest)
}

fn text(diff: &NodeDiff, style: Style) -> String {
    let stage = |name: &str, stage: Option<&Stage>| match stage {
        None => format!("{name:13} -             no table, or a table of another layout\n"),
        Some(stage) => {
            format!("{name:13} generation {:<10} digest {}\n", stage.generation, short(&stage.digest))
        }
    };
    let mut text = stage("desired", Some(&diff.desired));
    text += &stage("acknowledged", Some(&diff.acknowledged));
    text += &stage("kernel", diff.kernel.as_ref());
    text.push('\n');
    for line in &diff.differences {
        text += &format!("{} {}\n", style.bad("-+"), wrapped(line, 3));
    }
    let more = diff.differences_total - diff.differences.len();
    if more > 0 {
        text += &format!("... and {more} more\n");
    }
    for line in &diff.deviations {
        text += &format!("{} omitted on purpose: {}\n", style.warn("!"), wrapped(line, 24));
    }
    if is_same(diff) {
        let frontends = count(diff.frontends, "frontend");
        text += &format!("{} the kernel matches the desired state: {frontends}\n", style.good("ok"));
    } else {
        let code = codes::KERNEL_DIFFERS;
        let what = match diff.differences_total {
            0 => "the frontends are equal; generations or digests differ".to_owned(),
            number => format!("{} of {}", count(number, "difference"), count(diff.frontends, "frontend")),
        };
        text += &format!("{} {}  {}: {what}\n", style.bad("!"), code.code, code.title);
        text += &format!(
            "  {}\n",
            wrapped("Changes in progress cause temporary differences: run the command again.", 2)
        );
    }
    text
}

fn short(digest: &str) -> &str {
    match digest {
        "" => "unknown",
        digest => digest.get(..12).unwrap_or(digest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(generation: u64, digest: &str) -> Stage {
        Stage { generation, digest: digest.to_owned() }
    }

    fn diff() -> NodeDiff {
        NodeDiff {
            node: "alpha".into(),
            desired: stage(7, "0123456789abcdef"),
            acknowledged: stage(7, "0123456789abcdef"),
            kernel: Some(stage(7, "0123456789abcdef")),
            frontends: 12,
            differences: vec![],
            differences_total: 0,
            deviations: vec![],
        }
    }

    #[test]
    fn differences_are_listed() {
        let same = text(&diff(), Style::PLAIN);
        assert!(is_same(&diff()));
        assert!(same.starts_with("desired       generation 7          digest 0123456789ab\n"), "{same}");
        assert!(same.ends_with("ok the kernel matches the desired state: 12 frontends\n"), "{same}");
        let differences = vec!["10.96.0.1:80/TCP: missing in the kernel".to_owned()];
        let other = NodeDiff { differences, differences_total: 3, kernel: None, ..diff() };
        assert!(!is_same(&other));
        let text = text(&other, Style::PLAIN);
        assert!(text.contains("-+ 10.96.0.1:80/TCP: missing in the kernel\n... and 2 more\n"), "{text}");
        assert!(
            text.contains("! ST0108  the kernel does not match the desired state: 3 differences of 12"),
            "{text}"
        );
    }

    #[test]
    fn older_digest_is_a_difference() {
        assert!(!is_same(&NodeDiff { kernel: Some(stage(6, "00")), ..diff() }));
        assert!(!is_same(&NodeDiff { deviations: vec!["frontend x: EINVAL".into()], ..diff() }));
    }
}
