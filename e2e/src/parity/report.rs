//! Formats a disagreement.

use std::fmt::{self, Write as _};

use super::compare::{Answers, Difference, Disagreement};
use super::manifests;

/// Lists the differences.
pub fn report(found: &Disagreement) -> String {
    let mut text = format!("{} disagrees after {} steps:\n", found.case.name, found.after);
    for difference in &found.differences {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{difference}");
    }
    text
}

impl fmt::Display for Difference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, kube_proxy, switchtower } = self;
        writeln!(formatter, "  {what}")?;
        writeln!(formatter, "    kube-proxy:  {}", join(kube_proxy))?;
        write!(formatter, "    switchtower: {}", join(switchtower))
    }
}

/// Lists the differences with everything needed to investigate them: the case for `--replay`, the objects of its
/// first state for `kubectl apply`, and both rulesets.
pub fn explain(found: &Disagreement) -> String {
    let mut text = report(found);
    let case = serde_json::to_string_pretty(&found.case).unwrap_or_default();
    let objects = serde_json::to_string_pretty(&manifests::list(found.case.services.iter()));
    let [kube_proxy, switchtower] = &found.rulesets;
    let _ = writeln!(text, "==> case, for --replay\n{case}");
    let _ = writeln!(text, "==> first state, for kubectl apply\n{}", objects.unwrap_or_default());
    let _ = writeln!(text, "==> kube-proxy's ruleset\n{kube_proxy}");
    let _ = writeln!(text, "==> Switchtower's ruleset\n{switchtower}");
    text
}

fn join(outcomes: &Answers) -> String {
    outcomes.iter().cloned().collect::<Vec<_>>().join(" | ")
}
