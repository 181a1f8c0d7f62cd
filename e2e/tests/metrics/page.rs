//! docs/metrics.md lists every metric of the controller and the agents.
//!
//! `SWITCHTOWER_UPDATE=1` writes the rows of all exported metrics again. A metric without a series in the laboratory keeps
//! its row, which has to be written by hand.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use super::*;

const HEAD: &str = "# Metrics

The controller serves its metrics on port 9445, an agent on port 10249, both at `/metrics`. The agents use kube-proxy's names
where kube-proxy has the metric. Both also export `process_*`. Alerts: [runbooks](runbooks).

The test `page_lists_every_metric` generates this page.

| Metric | Type | Labels | Meaning |
|---|---|---|---|
";
const PREFIXES: [&str; 2] = ["switchtower_", "kubeproxy_"];

/// Rows of the page, by metric.
fn documented(page: &Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(page).unwrap_or_default();
    let rows = text.lines().filter_map(|line| Some((line.strip_prefix("| `")?.split_once('`')?.0, line)));
    rows.map(|(name, row)| (name.to_owned(), row.to_owned())).collect()
}

/// Rows of exported metrics.
fn exported(printed: &str) -> BTreeMap<String, String> {
    let types: BTreeMap<_, _> =
        printed.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' ')).collect();
    let labels = |metric: &str| -> String {
        let series = printed.lines().filter_map(|line| line.split_once('{'));
        let of_metric = series.filter(|(name, _)| metrics_in(name).contains(metric));
        let names: BTreeSet<&str> = of_metric
            .flat_map(|(_, rest)| {
                rest.split("=\"").filter_map(|part| part.rsplit(['{', ',', ' ', '"']).next())
            })
            .filter(|name| {
                *name != "le"
                    && !name.is_empty()
                    && name.chars().all(|letter| letter.is_ascii_lowercase() || letter == '_')
            })
            .collect();
        names.into_iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
    };
    let helps = printed.lines().filter_map(|line| line.strip_prefix("# HELP ")?.split_once(' '));
    let ours = helps.filter(|(name, _)| PREFIXES.iter().any(|prefix| name.starts_with(prefix)));
    ours.map(|(name, help)| {
        (name.to_owned(), format!("| `{name}` | {} | {} | {help} |", types[name], labels(name)))
    })
    .collect()
}

/// Names of metrics in the source files of the programs.
fn in_sources(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            in_sources(&path, found);
        } else if name.ends_with(".rs")
            && name != "tests.rs"
            && !path.components().any(|part| part.as_os_str() == "tests")
        {
            let text = fs::read_to_string(&path).unwrap();
            let literals = text.split('"').skip(1).step_by(2);
            let is_name = |text: &&str| {
                PREFIXES.iter().any(|prefix| text.strip_prefix(prefix).is_some_and(|rest| !rest.is_empty()))
                    && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
            };
            // The names of crates, in log filters.
            let crates = ["switchtower_controller", "switchtower_node_agent", "switchtower_proto"];
            found.extend(literals.filter(is_name).filter(|name| !crates.contains(name)).map(str::to_owned));
        }
    }
}

#[test]
fn page_lists_every_metric() {
    let _alone = alone();
    let page = root().join("docs/metrics.md");
    let printed = fleet().metrics().unwrap();
    let mut rows = documented(&page);
    let exported = exported(&printed);
    if std::env::var_os("SWITCHTOWER_UPDATE").is_some() {
        rows.extend(exported.clone());
        rows.retain(|name, _| PREFIXES.iter().any(|prefix| name.starts_with(prefix)));
        let table: String = rows.values().map(|row| format!("{row}\n")).collect();
        fs::write(&page, format!("{HEAD}{table}")).unwrap();
    }
    let cells = |row: &String| row.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
    for (name, row) in &exported {
        let (listed, row) = (rows.get(name).map(cells).unwrap_or_default(), cells(row));
        // The labels of a series that does not exist at the moment are not known.
        let is_same = listed.len() == row.len()
            && (1..row.len()).filter(|cell| *cell != 3).all(|cell| listed[cell] == row[cell])
            && row[3].split(", ").all(|label| listed[3].contains(label));
        assert!(
            is_same,
            "docs/metrics.md: run this test with SWITCHTOWER_UPDATE=1: {row:?}, listed {listed:?}"
        );
    }
    let mut sources = BTreeSet::new();
    for folder in ["controller/src", "node-agent/src", "telemetry/src"] {
        in_sources(&root().join(folder), &mut sources);
    }
    let listed: BTreeSet<String> = rows.keys().cloned().collect();
    let missing: Vec<_> = sources.difference(&listed).collect();
    let removed: Vec<_> = listed.difference(&sources).collect();
    assert!(missing.is_empty(), "docs/metrics.md lacks {missing:?}");
    assert!(removed.is_empty(), "docs/metrics.md lists {removed:?}, which no program exports");
    assert!(sources.len() > 60, "{}", sources.len());
}
