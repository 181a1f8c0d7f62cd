//! The outcomes as a table in Markdown.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Duration;

use super::Outcome;
use super::fault::ALL;

/// One row for each fault that was injected.
#[must_use]
pub fn table(outcomes: &[Outcome]) -> String {
    let mut text = "| Fault | Injected | Connections | Lost | Longest staleness | Row ready while stale | States in rows |\n\
                    |---|---|---|---|---|---|---|\n"
        .to_owned();
    for fault in ALL {
        let of: Vec<_> = outcomes.iter().filter(|outcome| outcome.fault == *fault).collect();
        if of.is_empty() {
            continue;
        }
        let sum = |count: fn(&Outcome) -> u64| of.iter().map(|outcome| count(outcome)).sum::<u64>();
        let longest = |time: fn(&Outcome) -> Duration| of.iter().map(|outcome| time(outcome)).max();
        let seconds = |time: Option<Duration>| format!("{:.1} s", time.unwrap_or_default().as_secs_f64());
        let said: BTreeSet<_> = of.iter().flat_map(|outcome| &outcome.said).map(String::as_str).collect();
        let said = if said.is_empty() {
            "Synced".to_owned()
        } else {
            said.into_iter().collect::<Vec<_>>().join(", ")
        };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {said} |",
            fault.name(),
            of.len(),
            sum(|outcome| outcome.tried),
            sum(|outcome| outcome.lost),
            seconds(longest(|outcome| outcome.stale)),
            seconds(longest(|outcome| outcome.untrue)),
        );
    }
    text
}
