//! kube-proxy's rules in nftables mode, as `nft --json list table` prints them (libnftables-json(5)).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use serde_json::Value;
use switchtower_admin_api::Destination;

use super::{Client, DEPTH, Frontends, joined, refuse, serve};

struct Table<'a> {
    /// Expressions of the rules, by chain.
    chains: BTreeMap<&'a str, Vec<&'a Value>>,
    /// Elements, by map.
    maps: BTreeMap<&'a str, Vec<(&'a Value, &'a Value)>>,
    is_ipv6: bool,
}

/// Parses a table.
///
/// # Errors
/// The text is not JSON.
pub(super) fn parse(text: &str) -> Result<Frontends, serde_json::Error> {
    let json: Value = serde_json::from_str(text)?;
    let objects = json["nftables"].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut table = Table { chains: BTreeMap::new(), maps: BTreeMap::new(), is_ipv6: false };
    for object in objects {
        if let Some(rule) = object.get("rule") {
            table.chains.entry(rule["chain"].as_str().unwrap_or_default()).or_default().push(&rule["expr"]);
        }
        if let Some(map) = object.get("map") {
            table.is_ipv6 = map["family"] == "ip6";
            let elements = map["elem"].as_array().into_iter().flatten();
            let pairs = elements.filter_map(|element| Some((element.get(0)?, element.get(1)?)));
            table.maps.insert(map["name"].as_str().unwrap_or_default(), pairs.collect());
        }
    }
    Ok(table.frontends())
}

impl Table<'_> {
    fn frontends(&self) -> Frontends {
        let mut frontends = Frontends::new();
        for (map, key) in
            [("service-ips", address as fn(&Self, &[Value]) -> _), ("service-nodeports", node_port)]
        {
            for (name, value) in self.elements(map, key) {
                let Some(chain) = target(value) else { continue };
                let affinity = self.has_affinity(chain, DEPTH);
                serve(&mut frontends, name, service(chain), affinity, |client| {
                    self.destination(chain, client, DEPTH)
                });
            }
        }
        for (map, key) in [
            ("no-endpoint-services", address as fn(&Self, &[Value]) -> _),
            ("no-endpoint-nodeports", node_port),
        ] {
            for (name, value) in self.elements(map, key) {
                let verdict =
                    if value.get("drop").is_some() { Destination::Dropped } else { Destination::Refused };
                refuse(&mut frontends, name, String::new(), verdict);
            }
        }
        for (name, value) in self.elements("firewall-ips", address) {
            if let (Some(known), Some(chain)) = (frontends.get_mut(&name), target(value)) {
                known.sources = self.sources(chain);
            }
        }
        frontends
    }

    fn elements<'b>(
        &'b self,
        map: &str,
        key: impl Fn(&Self, &[Value]) -> Option<String>,
    ) -> Vec<(String, &'b Value)> {
        let elements = self.maps.get(map).into_iter().flatten();
        let named = elements.filter_map(|(element, value)| {
            let element = element.pointer("/elem/val").unwrap_or(element);
            Some((key(self, element["concat"].as_array()?)?, *value))
        });
        named.collect()
    }

    /// Destination of a client's connection that reaches the chain; `None`: the chain decides nothing.
    fn destination(&self, chain: &str, client: Client, depth: usize) -> Option<Destination> {
        let mut found = None;
        for rule in self.chains.get(chain).filter(|_| depth > 0)?.iter() {
            let targets = targets(rule);
            if is_for_local_clients(rule) {
                match targets.first().filter(|_| client == Client::Inside) {
                    Some(target) => return self.destination(target, client, depth - 1),
                    None => continue,
                }
            }
            let mut endpoints = BTreeSet::new();
            collect_endpoints(rule, &mut endpoints);
            if !endpoints.is_empty() {
                found = joined(found, Some(Destination::Endpoints(endpoints)));
            }
            for target in targets {
                found = joined(found, self.destination(target, client, depth - 1));
            }
            if found.is_none() && has(rule, "drop") {
                return Some(Destination::Dropped);
            }
            if found.is_none() && has(rule, "reject") {
                return Some(Destination::Refused);
            }
        }
        found
    }

    /// Returns whether a chain remembers clients: it looks them up in sets named `affinity-…`.
    fn has_affinity(&self, chain: &str, depth: usize) -> bool {
        let rules = self.chains.get(chain).filter(|_| depth > 0).into_iter().flatten();
        rules.into_iter().any(|rule| {
            rule.to_string().contains("@affinity-")
                || targets(rule).iter().any(|target| self.has_affinity(target, depth - 1))
        })
    }

    /// Ranges in a firewall chain: sources other than these are dropped.
    fn sources(&self, chain: &str) -> Vec<String> {
        let mut ranges = BTreeSet::new();
        for rule in self.chains.get(chain).into_iter().flatten() {
            for expression in rule.as_array().into_iter().flatten() {
                let matched = &expression["match"];
                if matched.pointer("/left/payload/field") == Some(&Value::from("saddr")) {
                    let right = &matched["right"];
                    let all = right["set"].as_array().cloned().unwrap_or_else(|| vec![right.clone()]);
                    ranges.extend(all.iter().filter_map(range));
                }
            }
        }
        ranges.into_iter().collect()
    }
}

fn range(value: &Value) -> Option<String> {
    match value["prefix"]["addr"].as_str() {
        Some(address) => Some(format!("{address}/{}", value["prefix"]["len"])),
        None => {
            let address: IpAddr = value.as_str()?.parse().ok()?;
            Some(format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 }))
        }
    }
}

/// Returns the name of a protocol. Without `/etc/protocols` nft prints its number (IANA).
fn protocol(value: &Value) -> Option<String> {
    let name = match value.as_u64() {
        Some(6) => "tcp",
        Some(17) => "udp",
        Some(132) => "sctp",
        Some(_) => return None,
        None => value.as_str()?,
    };
    Some(name.to_uppercase())
}

fn port(value: &Value) -> Option<u16> {
    u16::try_from(value.as_u64()?).ok()
}

fn address(_: &Table<'_>, key: &[Value]) -> Option<String> {
    let [address, protocol_name, number] = key else { return None };
    let address: IpAddr = address.as_str()?.parse().ok()?;
    Some(format!("{}/{}", SocketAddr::new(address, port(number)?), protocol(protocol_name)?))
}

fn node_port(table: &Table<'_>, key: &[Value]) -> Option<String> {
    let [protocol_name, number] = key else { return None };
    let any: IpAddr = if table.is_ipv6 { [0; 16].into() } else { [0; 4].into() };
    Some(format!("{}/{}", SocketAddr::new(any, port(number)?), protocol(protocol_name)?))
}

fn target(verdict: &Value) -> Option<&str> {
    verdict.pointer("/goto/target").or_else(|| verdict.pointer("/jump/target"))?.as_str()
}

/// Chains that a rule continues in.
fn targets(rule: &Value) -> Vec<&str> {
    fn collect<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
        match value {
            Value::Object(fields) => {
                if let Some(target) = fields.get("goto").and_then(|goto| goto["target"].as_str()) {
                    found.push(target);
                }
                fields.values().for_each(|value| collect(value, found));
            }
            Value::Array(values) => values.iter().for_each(|value| collect(value, found)),
            _ => {}
        }
    }
    let mut found = Vec::new();
    collect(rule, &mut found);
    found
}

/// Returns whether a rule is for pods and processes of the node: it compares the source address with the pods' range, or
/// asks for its type. Lookups in sets are for affinity.
fn is_for_local_clients(rule: &Value) -> bool {
    let expressions = rule.as_array().into_iter().flatten();
    expressions.into_iter().any(|expression| {
        let matched = &expression["match"];
        let is_source = matched.pointer("/left/payload/field") == Some(&Value::from("saddr"))
            || matched.pointer("/left/fib/flags").is_some_and(|flags| flags.to_string().contains("saddr"));
        let is_set = matched["right"].as_str().is_some_and(|right| right.starts_with('@'));
        is_source && matched["op"] == "==" && !is_set
    })
}

fn has(rule: &Value, verdict: &str) -> bool {
    rule.as_array().into_iter().flatten().any(|expression| expression.get(verdict).is_some())
}

/// Adds the endpoints of a rule's dnat statements.
fn collect_endpoints(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            if let Some(dnat) = fields.get("dnat") {
                pairs(dnat, found);
            }
            fields.values().for_each(|value| collect_endpoints(value, found));
        }
        Value::Array(values) => values.iter().for_each(|value| collect_endpoints(value, found)),
        _ => {}
    }
}

/// Adds every address with a port below a dnat statement.
fn pairs(value: &Value, found: &mut BTreeSet<String>) {
    let pair = |address: &Value, number: &Value| -> Option<String> {
        let address: IpAddr = address.as_str()?.parse().ok()?;
        Some(SocketAddr::new(address, port(number)?).to_string())
    };
    match value {
        Value::Object(fields) => {
            if let Some([address, number]) =
                fields.get("concat").and_then(|concat| concat.as_array()).map(Vec::as_slice)
            {
                found.extend(pair(address, number));
            }
            if let (Some(address), Some(number)) = (fields.get("addr"), fields.get("port")) {
                found.extend(pair(address, number));
            }
            fields.values().for_each(|value| pairs(value, found));
        }
        Value::Array(values) => values.iter().for_each(|value| pairs(value, found)),
        _ => {}
    }
}

/// `namespace/name:port` from the name of a chain: `service-HASH-NAMESPACE/NAME/PROTOCOL/PORT`.
fn service(chain: &str) -> String {
    let name = chain.splitn(3, '-').nth(2).unwrap_or(chain);
    let mut parts = name.split('/');
    let (namespace, name, port) = (parts.next(), parts.next(), parts.nth(1));
    let (namespace, name) = (namespace.unwrap_or_default(), name.unwrap_or_default());
    match port.filter(|port| !port.is_empty()) {
        Some(port) => format!("{namespace}/{name}:{port}"),
        None => format!("{namespace}/{name}"),
    }
}
