//! `compare`: Services that kube-proxy and Switchtower treat differently on a node, from kube-proxy's rules and the
//! controller's view of the node.
//!
//! Compared for each frontend: endpoints, refusals and drops, for clients on the node and for others, whether there is session
//! affinity, and the permitted sources. Addresses of node ports are not compared.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use switchtower_admin_api::{Destination, FrontendTreatment, NodeFrontends, OPERATOR, codes};
use switchtower_crds::kube_proxy::NAMESPACE;
use tokio::process::Command;

use crate::args::{CompareArgs, Global};
use crate::cluster::{Cluster, KUBE_PROXY_LABELS, is_ready};
use crate::controller::{Controller, escaped};
use crate::error::CliError;
use crate::output::{Exit, Report, Style, count, wrapped};

mod iptables;
mod nftables;

/// Maximum number of nested chains.
const DEPTH: usize = 8;

/// Frontends by name, such as `10.96.0.1:443/TCP`, and `0.0.0.0:30080/TCP` for a node port.
type Frontends = BTreeMap<String, FrontendTreatment>;

/// Attempts until both sides agree: a change may have reached one of them only.
const ATTEMPTS: usize = 3;
const PAUSE: Duration = Duration::from_secs(2);

/// Commands that print kube-proxy's rules of all modes.
const COMMANDS: [&[&str]; 4] = [
    &["nft", "--json", "list", "table", "ip", "kube-proxy"],
    &["nft", "--json", "list", "table", "ip6", "kube-proxy"],
    &["iptables-save"],
    &["ip6tables-save"],
];

/// A frontend that the proxies treat differently.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Difference {
    frontend: String,
    service: String,
    /// Aspect: `frontend`, `inside`, `outside`, `affinity` or `sources`.
    aspect: &'static str,
    kube_proxy: String,
    switchtower: String,
}

/// Value of `-o json`.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Comparison<'a> {
    node: &'a str,
    frontends: usize,
    differences: Vec<Difference>,
}

pub(crate) async fn run(global: &Global, args: &CompareArgs, style: Style) -> Result<Report, CliError> {
    let cluster = Cluster::new(global).await?;
    let mut controller = Controller::connect(global, &cluster, OPERATOR).await?;
    let path = format!("/v1/nodes/{}/frontends", escaped(&args.node));
    let mut attempt = 0;
    loop {
        attempt += 1;
        let theirs = if args.rules.is_empty() {
            kube_proxy(global, &cluster, &args.node).await?
        } else {
            let texts = args.rules.iter().map(|path| read(path)).collect::<Result<Vec<_>, _>>()?;
            parse(&texts)?
        };
        let ours: NodeFrontends = controller.get(&path).await?;
        let ours: Frontends =
            ours.frontends.into_iter().map(|frontend| (frontend.frontend.clone(), frontend)).collect();
        let differences = compare(&theirs, &ours);
        // Rules from a file do not change.
        if differences.is_empty() || !args.rules.is_empty() || attempt == ATTEMPTS {
            let exit = if differences.is_empty() { Exit::Ok } else { Exit::Wrong };
            let comparison = Comparison { node: &args.node, frontends: ours.len(), differences };
            return Report::new(text(&comparison, style), &comparison, exit);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Reads the rules from kube-proxy's Pod on the node, whose image contains the commands.
async fn kube_proxy(global: &Global, cluster: &Cluster, node: &str) -> Result<Frontends, CliError> {
    let mut pods = Vec::new();
    for label in KUBE_PROXY_LABELS {
        pods.extend(cluster.pods_labelled(NAMESPACE, label).await?);
    }
    let on_node = |pod: &&k8s_openapi::api::core::v1::Pod| {
        pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(node)
    };
    let pod = pods.iter().find(on_node).filter(|pod| is_ready(pod)).and_then(|pod| pod.metadata.name.clone());
    let pod = pod.ok_or_else(|| {
        CliError::new(format!(
            "no ready Pod of kube-proxy on node {node} in namespace {NAMESPACE}; pass the output of `nft --json list table ip \
             kube-proxy` or `iptables-save` on the node with --rules"
        ))
    })?;
    let mut texts = Vec::new();
    let mut failures = Vec::new();
    for words in COMMANDS {
        match execute(global, &pod, words).await {
            Ok(text) => texts.push(text),
            // The other mode has no table, or its command is missing.
            Err(reason) => failures.push(format!("{}: {reason}", words.join(" "))),
        }
    }
    parse(&texts).map_err(|error| match failures.as_slice() {
        [] => error,
        failures => CliError::new(format!("{error} ({})", failures.join("; "))),
    })
}

async fn execute(global: &Global, pod: &str, words: &[&str]) -> Result<String, String> {
    let mut command = Command::new("kubectl");
    command.args(global.kubectl_flags()).args(["--namespace", NAMESPACE, "exec", pod, "--"]).args(words);
    let output = command.output().await.map_err(|error| format!("cannot start kubectl: {error}"))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        return Err(errors.lines().next().unwrap_or("failed without a message").to_owned());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn read(path: &Path) -> Result<String, CliError> {
    let mut text = String::new();
    let read = if path == Path::new("-") {
        std::io::stdin().read_to_string(&mut text).map(drop)
    } else {
        fs::read_to_string(path).map(|read| text = read)
    };
    read.map(|()| text).map_err(|error| CliError::new(format!("cannot read {}: {error}", path.display())))
}

/// Parses rulesets in any of the formats.
fn parse(texts: &[String]) -> Result<Frontends, CliError> {
    let mut frontends = Frontends::new();
    for text in texts {
        let found = if text.trim_start().starts_with('{') {
            nftables::parse(text)
                .map_err(|error| CliError::new(format!("the output of nft cannot be parsed: {error}")))?
        } else {
            iptables::parse(text)
        };
        frontends.extend(found);
    }
    if frontends.is_empty() {
        return Err(CliError::new("the rules contain no Service of kube-proxy"));
    }
    Ok(frontends)
}

/// Returns the differences, by frontend.
fn compare(theirs: &Frontends, ours: &Frontends) -> Vec<Difference> {
    let mut differences = Vec::new();
    let names: BTreeSet<&String> = theirs.keys().chain(ours.keys()).collect();
    for name in names {
        let (kube_proxy, switchtower) = (theirs.get(name), ours.get(name));
        let service = switchtower.or(kube_proxy).map(|known| known.service_port.clone()).unwrap_or_default();
        let difference = |aspect, kube_proxy: String, switchtower: String| Difference {
            frontend: name.clone(),
            service: service.clone(),
            aspect,
            kube_proxy,
            switchtower,
        };
        let (Some(one), Some(other)) = (kube_proxy, switchtower) else {
            let word = |known: Option<&FrontendTreatment>| {
                if known.is_some() { "served" } else { "absent" }.to_owned()
            };
            differences.push(difference("frontend", word(kube_proxy), word(switchtower)));
            continue;
        };
        let aspects = [
            ("inside", one.inside.to_string(), other.inside.to_string()),
            ("outside", one.outside.to_string(), other.outside.to_string()),
            ("affinity", yes(one.affinity), yes(other.affinity)),
            ("sources", one.sources.join(" "), other.sources.join(" ")),
        ];
        // Without an endpoint there is nothing to be affine to.
        let unserved = |aspect: &str| aspect == "affinity" && !one.has_endpoints();
        differences.extend(
            aspects
                .into_iter()
                .filter(|(aspect, one, other)| one != other && !unserved(aspect))
                .map(|(aspect, one, other)| difference(aspect, one, other)),
        );
    }
    differences
}

fn yes(affinity: bool) -> String {
    if affinity { "ClientIP" } else { "None" }.to_owned()
}

fn text(comparison: &Comparison<'_>, style: Style) -> String {
    let mut text = String::new();
    for difference in &comparison.differences {
        let Difference { frontend, service, aspect, kube_proxy, switchtower } = difference;
        text += &format!("{} {frontend}  {service}  {aspect}\n", style.warn("!"));
        text += &format!("    kube-proxy   {}\n", wrapped(kube_proxy, 17));
        text += &format!("    Switchtower  {}\n", wrapped(switchtower, 17));
    }
    let frontends = count(comparison.frontends, "frontend");
    if comparison.differences.is_empty() {
        text += &format!("{} kube-proxy and Switchtower treat {frontends} equally\n", style.good("ok"));
    } else {
        let code = codes::PROXIES_DIFFER;
        let number = count(comparison.differences.len(), "difference");
        text += &format!("{} {}  {}: {number}, {frontends}\n", style.bad("!"), code.code, code.title);
    }
    text
}

/// Adds a frontend with endpoints; `of` evaluates the rules for a client.
fn serve(
    frontends: &mut Frontends,
    name: String,
    service_port: String,
    affinity: bool,
    of: impl Fn(Client) -> Option<Destination>,
) {
    let find = |client| of(client).unwrap_or(Destination::Dropped);
    let (inside, outside) = (find(Client::Inside), find(Client::Outside));
    let frontend = name.clone();
    let served = FrontendTreatment { frontend, service_port, inside, outside, affinity, sources: Vec::new() };
    frontends.insert(name, served);
}

/// Adds the verdict of a frontend without endpoints: for all clients, or only for those outside if others have endpoints.
fn refuse(frontends: &mut Frontends, name: String, service_port: String, verdict: Destination) {
    let of = |_| Some(verdict.clone());
    match frontends.get_mut(&name) {
        Some(known) => known.outside = verdict,
        None => serve(frontends, name, service_port, false, of),
    }
}

/// Adds what two rules of one frontend reach.
fn joined(one: Option<Destination>, other: Option<Destination>) -> Option<Destination> {
    match (one, other) {
        (Some(Destination::Endpoints(mut one)), Some(Destination::Endpoints(other))) => {
            one.extend(other);
            Some(Destination::Endpoints(one))
        }
        (one @ Some(Destination::Endpoints(_)), _) | (one, None) => one,
        (_, other) => other,
    }
}

/// A client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Client {
    /// On the node: a pod or a process.
    Inside,
    Outside,
}

#[cfg(test)]
mod tests;
