//! The figures as a table in Markdown.

use std::fmt::Write as _;

use super::{Figures, Latency, Rate};

/// A table with one row for each fleet, and one for each of its rates.
#[must_use]
pub fn table(all: &[Figures]) -> String {
    let mut text = String::new();
    head(
        &mut text,
        &[
            "agents",
            "join",
            "CPU",
            "resident",
            "rows current",
            "CPU",
            "idle, core",
            "one change p50 / all",
            "CPU per node",
            "restart",
            "without snapshot",
        ],
    );
    for figures in all {
        line(&mut text, &summary(figures));
    }
    text.push('\n');
    head(
        &mut text,
        &[
            "agents",
            "changes/s",
            "written",
            "API write p50",
            "p50 to 99 %",
            "p99 to 99 %",
            "first quarter",
            "last quarter",
            "drain",
            "core",
            "agents, core",
            "CPU per change",
            "per node",
            "updates per node",
            "resident",
        ],
    );
    for figures in all {
        for rate in &figures.rates {
            line(&mut text, &of_rate(figures.nodes, rate));
        }
    }
    for Figures { nodes, memory, .. } in all.iter().filter(|figures| !figures.memory.is_empty()) {
        let samples: Vec<_> = memory
            .iter()
            .map(|sample| format!("{} after {}", mebibytes(sample.memory), sample.changes))
            .collect();
        // Writing to a String does not fail.
        let _ = writeln!(text, "\n{nodes} agents, memory over changes: {}", samples.join(", "));
    }
    for figures in all.iter().filter(|figures| !figures.extremes.is_empty()) {
        text.push('\n');
        extremes(&mut text, figures);
    }
    text
}

fn extremes(text: &mut String, figures: &Figures) {
    let columns = [
        "event",
        "duration",
        "settled after",
        "CPU time",
        "resident",
        "updates per node",
        "other changes to 99 %: p50",
        "worst",
    ];
    let _ = writeln!(text, "{} agents, {} Services:\n", figures.nodes, figures.services);
    head(text, &columns);
    for extreme in &figures.extremes {
        let probe = |value: fn(&Latency) -> f64| {
            extreme.probes.as_ref().map_or("-".to_owned(), |latency| milliseconds(value(latency)))
        };
        let cells = [
            extreme.event.to_string(),
            seconds(Some(extreme.event_seconds)),
            seconds(Some(extreme.settled_seconds)),
            seconds(Some(extreme.cpu)),
            mebibytes(extreme.memory),
            format!("{:.0}", extreme.updates_per_node),
            probe(|latency| latency.most_p50),
            probe(|latency| latency.most_p99),
        ];
        line(text, &cells);
    }
}

fn summary(figures: &Figures) -> [String; 11] {
    let Figures { nodes, join, idle, single, restart, .. } = figures;
    let single_latency = single.as_ref().map(|single| {
        format!("{} / {}", milliseconds(single.latency.half_p50), milliseconds(single.latency.all_p50))
    });
    let single_cpu = single.as_ref().map(|single| format!("{:.1} µs", single.cpu_microseconds_per_node));
    let restarted = restart.as_ref().map(|restart| seconds(restart.seconds));
    let resumed = restart.as_ref().map(|restart| format!("{} of {}", restart.resumed, restart.returned));
    [
        nodes.to_string(),
        seconds(Some(join.seconds)),
        seconds(Some(join.cpu)),
        mebibytes(join.memory),
        seconds(join.rows_seconds),
        seconds(Some(join.rows_cpu)),
        format!("{:.1} %", idle.core_percent),
        single_latency.unwrap_or_default(),
        single_cpu.unwrap_or_default(),
        restarted.unwrap_or_default(),
        resumed.unwrap_or_default(),
    ]
}

fn of_rate(nodes: usize, rate: &Rate) -> [String; 15] {
    [
        nodes.to_string(),
        rate.per_second.to_string(),
        format!("{:.0}", rate.written_per_second),
        milliseconds(rate.write_p50),
        milliseconds(rate.latency.most_p50),
        milliseconds(rate.latency.most_p99),
        milliseconds(rate.first_quarter),
        milliseconds(rate.last_quarter),
        seconds(rate.drain_seconds),
        format!("{:.0} %", rate.core_percent),
        format!("{:.0} %", rate.agents_core_percent),
        milliseconds(rate.cpu_milliseconds),
        format!("{:.1} µs", rate.cpu_microseconds_per_node),
        format!("{:.0}", rate.updates_per_node),
        mebibytes(rate.memory),
    ]
}

fn head(text: &mut String, columns: &[&str]) {
    let _ = writeln!(text, "| {} |\n|{}", columns.join(" | "), "---|".repeat(columns.len()));
}

fn line(text: &mut String, cells: &[String]) {
    let _ = writeln!(text, "| {} |", cells.join(" | "));
}

fn milliseconds(value: f64) -> String {
    if value < 10.0 { format!("{value:.1} ms") } else { format!("{value:.0} ms") }
}

fn seconds(value: Option<f64>) -> String {
    value.map_or("too long".to_owned(), |value| format!("{value:.1} s"))
}

fn mebibytes(value: f64) -> String {
    format!("{value:.0} MiB")
}
