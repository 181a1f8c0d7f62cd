//! kube-proxy's rules in iptables mode, as `iptables-save` and `ip6tables-save` print them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use switchtower_admin_api::Destination;

use super::{Client, DEPTH, Frontends, joined, refuse, serve};

/// A rule.
#[derive(Debug, Default)]
struct Rule {
    destination: Option<IpAddr>,
    destination_port: Option<u16>,
    protocol: String,
    /// Range of sources, unless it is negated.
    source: Option<String>,
    /// The source is an address of the node.
    from_host: bool,
    /// The destination is an address of the node.
    to_host: bool,
    /// Looks the client up in the list of recent ones.
    recent: bool,
    comment: String,
    target: String,
    endpoint: Option<SocketAddr>,
}

/// Rules by table and chain.
type Chains = BTreeMap<(String, String), Vec<Rule>>;

/// Parses all tables.
pub(super) fn parse(text: &str) -> Frontends {
    let (mut chains, mut table) = (Chains::new(), String::new());
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            name.clone_into(&mut table);
        } else if let Some((chain, rule)) = line.strip_prefix("-A ").and_then(|rest| rest.split_once(' ')) {
            chains.entry((table.clone(), chain.to_owned())).or_default().push(parse_rule(rule));
        }
    }
    // The address of iptables-save's family, for node ports.
    let is_ipv6 =
        chains.values().flatten().filter_map(|rule| rule.destination).any(|address| address.is_ipv6());
    frontends(&chains, is_ipv6)
}

/// Splits a line at blanks outside of double quotes.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted) = (Vec::new(), String::new(), false);
    for letter in line.chars() {
        match letter {
            '"' => quoted = !quoted,
            ' ' if !quoted => words.push(std::mem::take(&mut word)),
            other => word.push(other),
        }
    }
    words.push(word);
    words
}

fn parse_rule(line: &str) -> Rule {
    let (mut rule, words) = (Rule::default(), words(line));
    for (number, word) in words.iter().enumerate() {
        let Some(value) = words.get(number + 1) else { break };
        let negated = number > 0 && words[number - 1] == "!";
        match word.as_str() {
            "-d" => rule.destination = value.split('/').next().and_then(|address| address.parse().ok()),
            "-s" if !negated => rule.source = Some(value.clone()),
            "-p" => rule.protocol = value.to_uppercase(),
            "--dport" => rule.destination_port = value.parse().ok(),
            "--src-type" if !negated => rule.from_host = value == "LOCAL",
            "--dst-type" if !negated => rule.to_host = value == "LOCAL",
            "--rcheck" => rule.recent = true,
            "--comment" => rule.comment.clone_from(value),
            "-j" => rule.target.clone_from(value),
            "--to-destination" => rule.endpoint = value.parse().ok(),
            _ => {}
        }
    }
    rule
}

fn rules<'a>(chains: &'a Chains, table: &str, chain: &str) -> &'a [Rule] {
    chains.get(&(table.to_owned(), chain.to_owned())).map(Vec::as_slice).unwrap_or_default()
}

fn frontends(chains: &Chains, is_ipv6: bool) -> Frontends {
    let any: IpAddr = if is_ipv6 { [0; 16].into() } else { [0; 4].into() };
    let name = |rule: &Rule, node_port: bool| {
        let address = if node_port { any } else { rule.destination? };
        Some(format!("{}/{}", SocketAddr::new(address, rule.destination_port?), rule.protocol))
    };
    let service = |rule: &Rule| rule.comment.split(' ').next().unwrap_or_default().to_owned();
    let mut frontends = Frontends::new();
    for (chain, node_port) in [("KUBE-SERVICES", false), ("KUBE-NODEPORTS", true)] {
        for rule in rules(chains, "nat", chain) {
            let Some(name) = name(rule, node_port) else { continue };
            let affinity = has_affinity(chains, &rule.target, DEPTH);
            serve(&mut frontends, name, service(rule), affinity, |client| {
                destination(chains, &rule.target, client, DEPTH)
            });
        }
    }
    for chain in ["KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES"] {
        for rule in rules(chains, "filter", chain) {
            let verdict = match rule.target.as_str() {
                "DROP" => Destination::Dropped,
                "REJECT" => Destination::Refused,
                _ => continue,
            };
            let Some(name) = name(rule, rule.to_host && rule.destination.is_none()) else { continue };
            refuse(&mut frontends, name, service(rule), verdict);
        }
    }
    for rule in rules(chains, "filter", "KUBE-PROXY-FIREWALL") {
        let Some(known) = name(rule, false).and_then(|name| frontends.get_mut(&name)) else { continue };
        let ranges: BTreeSet<String> =
            rules(chains, "filter", &rule.target).iter().filter_map(|rule| rule.source.clone()).collect();
        known.sources = ranges.into_iter().collect();
    }
    frontends
}

/// Destination of a client's connection that reaches the chain of the table nat; `None`: the chain decides nothing.
fn destination(chains: &Chains, chain: &str, client: Client, depth: usize) -> Option<Destination> {
    let mut found = None;
    for rule in rules(chains, "nat", chain).iter().filter(|_| depth > 0) {
        let endpoint = rule.endpoint.map(|endpoint| Destination::Endpoints([endpoint.to_string()].into()));
        let next = || destination(chains, &rule.target, client, depth - 1);
        if rule.target == "KUBE-MARK-MASQ" {
            continue;
        }
        if rule.from_host || rule.source.is_some() {
            if client == Client::Inside {
                return next();
            }
            continue;
        }
        found = joined(found, endpoint.or_else(next));
    }
    found
}

fn has_affinity(chains: &Chains, chain: &str, depth: usize) -> bool {
    depth > 0
        && rules(chains, "nat", chain)
            .iter()
            .any(|rule| rule.recent || has_affinity(chains, &rule.target, depth - 1))
}
