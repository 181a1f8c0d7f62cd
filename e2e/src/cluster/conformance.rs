//! Runs upstream's e2e suite on the cluster and compares the results with kube-proxy's.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::layout::{Layout, Tools};
use super::load_balancer::LoadBalancer;
use super::machine::Machine;
use super::shell::{print, say};

/// All of sig-network; [`SKIP`] excludes some.
const FOCUS: &str = r"\[sig-network\]";
/// For `make test`: fast tests of every kind of Service.
const SMALL: &str = concat!(
    r"\[sig-network\] (Services should (serve a basic endpoint|serve multiport endpoints|serve endpoints on same port|",
    r"be able to (change the type|create a functioning NodePort|switch session affinity for service)|",
    r"have session affinity work for|be rejected when no|respect internalTrafficPolicy)|EndpointSlice should)",
);
/// A part of the suite that takes minutes and covers each kind of Service.
const QUICK: &str = concat!(
    r"\[sig-network\] (Services should (serve a basic|serve multiport|serve endpoints on same port|be able to ",
    r"(change the type|create a functioning|switch session)|have session affinity work|be rejected when no|allow pods ",
    r"to hairpin|respect internalTrafficPolicy|preserve source)|EndpointSlice should|Networking Granular Checks: ",
    r"Services should function for (pod|node)-Service|Conntrack should be able to preserve UDP traffic when server pod ",
    r"cycles for a NodePort)",
);
/// Excluded: tests unrelated to a service proxy (network policies, ingress, performance of DNS), tests of what this
/// laboratory lacks (a cloud that cleans up load balancers, the Internet, a resolver outside the cluster), and
/// features that are off by default.
const SKIP: &str = concat!(
    r"\[(Alpha|Provider:GCE)\]|Netpol|NetworkPolic|Ingress|load balancer cleanup finalizer|",
    r"\[Feature:(PerformanceDNS|Networking-|KubeProxy|SCTP)|DNS configMap nameserver",
);

/// Load balancer tests: slow, so they are a separate run.
const LOAD_BALANCERS: &str = "LoadBalancer";
/// Tests that cannot run in parallel: a separate run.
const SERIAL: &str = r"\[sig-network\].*\[(Serial|Disruptive)\]";
/// Tests with SCTP sockets, which kernels without the module lack.
const SCTP: &str = "SCTP|sctp";

/// Selection of upstream's tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// All tests that can run in parallel.
    All,
    /// Some tests of each kind of Service, within minutes.
    Quick,
    /// The fast tests.
    Small,
    /// The load balancer tests.
    LoadBalancers,
    /// The tests that run serially.
    Serial,
}

impl Part {
    /// Regular expressions of the test names to run and to skip.
    fn filters(self) -> (&'static str, String) {
        let alone = r"\[(Serial|Disruptive)\]";
        match self {
            Self::All => (FOCUS, format!("{SKIP}|{alone}|{LOAD_BALANCERS}|{SCTP}")),
            Self::Quick => (QUICK, format!("{SKIP}|{alone}|{LOAD_BALANCERS}|{SCTP}")),
            Self::Small => (SMALL, format!("{SKIP}|{alone}|{LOAD_BALANCERS}|{SCTP}")),
            Self::LoadBalancers => (LOAD_BALANCERS, format!("{SKIP}|{alone}|{SCTP}")),
            Self::Serial => (SERIAL, SKIP.to_owned()),
        }
    }

    /// Name of the report for a proxy.
    fn report(self, label: &str) -> String {
        match self {
            Self::All => label.to_owned(),
            Self::Quick => format!("{label}-quick"),
            Self::Small => format!("{label}-small"),
            Self::LoadBalancers => format!("{label}-load-balancers"),
            Self::Serial => format!("{label}-serial"),
        }
    }
}

/// Parameters of a run.
#[derive(Debug, Clone)]
pub struct Run {
    /// Service proxy under test, which names the report.
    pub label: String,
    pub part: Part,
    /// Additional regular expression for test names.
    pub focus: Option<String>,
    /// Number of parallel processes.
    pub processes: u8,
    pub out: PathBuf,
}

/// Outcome of a test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SpecOutcome {
    Passed,
    /// Failure with the first line of the reason.
    Failed(String),
    /// Skipped by the test itself, with its reason.
    Skipped(String),
}

/// Outcomes by test name.
pub type Outcomes = BTreeMap<String, SpecOutcome>;

/// Result of a run.
#[derive(Debug, Default)]
pub struct Report {
    pub outcomes: Outcomes,
    /// Duration of the whole run.
    pub duration: Duration,
}

/// Runs the tests and prints the report.
///
/// # Errors
/// A test failed that passes with kube-proxy.
pub fn conformance(layout: &Layout, tools: &Tools, run: &Run) -> Result<()> {
    fs::create_dir_all(&run.out).with_context(|| format!("making {}", run.out.display()))?;
    let out = fs::canonicalize(&run.out).context("resolving the report's folder")?;
    let name = run.part.report(&run.label);
    let json = format!("{name}.json");
    let _ = fs::remove_file(out.join(&json));
    let log = out.join(format!("{name}.log"));
    say(&format!("running upstream's tests; log: {}", log.display()));
    let (focus, skip) = run.part.filters();
    let focus = run.focus.as_deref().unwrap_or(focus);
    let files = Files { out: &out, json: &json, log: &log };
    let status =
        run_suite(layout, tools, run, &[format!("--focus={focus}"), format!("--skip={skip}")], &files)?;
    let report = read(&out.join(&json))
        .with_context(|| format!("the tests left no report ({status}), see {}", log.display()))?;
    let baseline = format!("{}.json", run.part.report("kube-proxy"));
    let baseline = read(&out.join(baseline)).unwrap_or_default();
    let text = render(&run.label, &report, &baseline);
    fs::write(out.join(format!("{name}.md")), &text).context("writing the report")?;
    print(&text)?;
    let worse = worse_than(&report.outcomes, &baseline.outcomes);
    if !worse.is_empty() {
        bail!("{} tests failed that pass with kube-proxy or have no result there", worse.len());
    }
    Ok(())
}

/// Files that a run of the suite writes.
struct Files<'a> {
    /// Folder of the report.
    out: &'a Path,
    /// Name of the report.
    json: &'a str,
    log: &'a Path,
}

/// Starts ginkgo in the hub's network, from which pods, nodes and VIPs are reachable, but with the host's files. A
/// load balancer assigns addresses during the run. The suite has its own PID namespace, so that all its processes end
/// with this one.
fn run_suite(
    layout: &Layout,
    tools: &Tools,
    run: &Run,
    filters: &[String; 2],
    files: &Files<'_>,
) -> Result<ExitStatus> {
    let Files { out, json, log } = files;
    let output = fs::File::create(log).context("making the log")?;
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net=/run/netns/{}", Machine::find(layout, &layout.hub())?.name))
        .args(["unshare", "--pid", "--fork", "--kill-child"])
        .arg(tools.cluster("ginkgo"))
        .arg(format!("--procs={}", if run.part == Part::Serial { 1 } else { run.processes }))
        .args(filters)
        .args(["--no-color", "--timeout=60m", &format!("--json-report={json}")])
        .arg(format!("--output-dir={}", out.display()))
        .arg(tools.cluster("e2e.test"))
        .args(["--", "--provider=skeleton", "--disable-log-dump"])
        .args([
            format!("--kubeconfig={}", layout.kubeconfig().display()),
            format!("--num-nodes={}", layout.nodes),
        ])
        .stdin(Stdio::null())
        .stderr(output.try_clone().context("duplicating the log's descriptor")?)
        .stdout(output);
    let stop = AtomicBool::new(false);
    // SAFETY: prctl is async-signal-safe and touches only the new process.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    let balancer = LoadBalancer::new(layout)?;
    std::thread::scope(|scope| {
        scope.spawn(|| balancer.run(&stop));
        let status = command.status().context("failed to start ginkgo");
        stop.store(true, Ordering::Relaxed);
        status
    })
}

fn worse_than<'a>(outcomes: &'a Outcomes, baseline: &Outcomes) -> Vec<&'a String> {
    let failed = |outcome: &SpecOutcome| matches!(outcome, SpecOutcome::Failed(_));
    let mine = outcomes.iter().filter(|(_, outcome)| failed(outcome));
    mine.map(|(name, _)| name).filter(|name| !baseline.get(*name).is_some_and(failed)).collect()
}

/// Parses ginkgo's JSON report without the tests that the filters excluded.
pub fn read(path: &Path) -> Result<Report> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let suites: Vec<Suite> =
        serde_json::from_str(&text).with_context(|| format!("{} is not a ginkgo report", path.display()))?;
    let duration = Duration::from_nanos(suites.iter().map(|suite| suite.run_time).sum());
    let specs = suites.into_iter().flat_map(|suite| suite.spec_reports.unwrap_or_default());
    let outcomes = specs.filter(|spec| spec.leaf_node_type == "It").filter_map(Spec::outcome).collect();
    Ok(Report { outcomes, duration })
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Suite {
    #[serde(default)]
    run_time: u64,
    spec_reports: Option<Vec<Spec>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Spec {
    #[serde(default)]
    container_hierarchy_texts: Option<Vec<String>>,
    #[serde(default)]
    leaf_node_type: String,
    #[serde(default)]
    leaf_node_text: String,
    #[serde(default)]
    state: String,
    #[serde(default)]
    failure: Option<SpecFailure>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SpecFailure {
    #[serde(default)]
    message: String,
}

impl Spec {
    fn outcome(self) -> Option<(String, SpecOutcome)> {
        let reason = self.failure.map(|failure| failure.message).unwrap_or_default();
        let reason = reason.lines().next().unwrap_or_default().chars().take(160).collect::<String>();
        let outcome = match self.state.as_str() {
            "passed" => SpecOutcome::Passed,
            // Without a reason, the filter excluded the test.
            "skipped" | "pending" if reason.is_empty() => return None,
            "skipped" | "pending" => SpecOutcome::Skipped(reason),
            _ => SpecOutcome::Failed(reason),
        };
        let mut name = self.container_hierarchy_texts.unwrap_or_default();
        name.push(self.leaf_node_text);
        Some((name.join(" "), outcome))
    }
}

/// Formats a table of counts, then every test that did not pass, in Markdown.
pub fn render(label: &str, report: &Report, baseline: &Report) -> String {
    let head = "| proxy | passed | failed | skipped | duration |\n|---|---|---|---|---|\n";
    let mut text = format!("{head}{}", row(label, report));
    if label != "kube-proxy" && !baseline.outcomes.is_empty() {
        text.push_str(&row("kube-proxy", baseline));
    }
    text.push_str("\n| test | outcome |\n|---|---|\n");
    for (name, outcome) in &report.outcomes {
        let line = match outcome {
            SpecOutcome::Passed => continue,
            SpecOutcome::Failed(reason) => format!("failed: {reason}"),
            SpecOutcome::Skipped(reason) => format!("skipped: {reason}"),
        };
        let with_kube_proxy = match baseline.outcomes.get(name) {
            Some(SpecOutcome::Failed(_)) if label != "kube-proxy" => " (fails with kube-proxy too)",
            _ => "",
        };
        text.push_str(&format!("| {name} | {}{with_kube_proxy} |\n", line.replace('|', "\\|")));
    }
    text
}

fn row(label: &str, report: &Report) -> String {
    let (mut passed, mut failed, mut skipped) = (0_u32, 0_u32, 0_u32);
    for outcome in report.outcomes.values() {
        match outcome {
            SpecOutcome::Passed => passed += 1,
            SpecOutcome::Failed(_) => failed += 1,
            SpecOutcome::Skipped(_) => skipped += 1,
        }
    }
    let seconds = report.duration.as_secs();
    format!("| {label} | {passed} | {failed} | {skipped} | {seconds} s |\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"[{"RunTime": 2500000000, "SpecReports": [
        {"ContainerHierarchyTexts": null, "LeafNodeType": "SynchronizedBeforeSuite", "State": "passed"},
        {"ContainerHierarchyTexts": ["[sig-network] Services"], "LeafNodeType": "It", "LeafNodeText": "a", "State": "passed"},
        {"ContainerHierarchyTexts": ["[sig-network] Services"], "LeafNodeType": "It", "LeafNodeText": "b", "State": "failed",
         "Failure": {"Message": "no answer\nmore"}},
        {"ContainerHierarchyTexts": ["[sig-network] Services"], "LeafNodeType": "It", "LeafNodeText": "c", "State": "skipped",
         "Failure": {"Message": "needs 3 nodes"}},
        {"ContainerHierarchyTexts": ["[sig-storage] X"], "LeafNodeType": "It", "LeafNodeText": "d", "State": "skipped"}
    ]}]"#;

    fn report() -> Report {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), REPORT).unwrap();
        read(file.path()).unwrap()
    }

    #[test]
    fn filtered_tests_are_not_in_the_report() {
        assert_eq!(
            render("switchtower", &report(), &Report::default()),
            "| proxy | passed | failed | skipped | duration |\n|---|---|---|---|---|\n\
             | switchtower | 1 | 1 | 1 | 2 s |\n\n\
             | test | outcome |\n|---|---|\n| [sig-network] Services b | failed: no answer |\n\
             | [sig-network] Services c | skipped: needs 3 nodes |\n"
        );
    }

    #[test]
    fn only_tests_passed_by_kube_proxy_count() {
        let mut baseline = report().outcomes;
        assert!(worse_than(&report().outcomes, &baseline).is_empty());
        baseline.insert("[sig-network] Services b".into(), SpecOutcome::Passed);
        assert_eq!(worse_than(&report().outcomes, &baseline), ["[sig-network] Services b"]);
    }
}
