//! The cloud's part of a Service of type LoadBalancer, as small as it can be: an address in the Service's
//! status, and a route for it in the hub to the nodes that may take its traffic.
//!
//! Nodes are chosen as a cloud does: all of them, or with externalTrafficPolicy Local those whose health
//! check port answers 200. Address family: IPv4.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;

use super::control_plane::Kubectl;
use super::layout::{Layout, Tools};
use super::shell::{run_line, say};

const INTERVAL: Duration = Duration::from_millis(500);
/// How long a node's health check may take; longer counts as unhealthy.
const HEALTH_LIMIT: Duration = Duration::from_millis(500);

/// Gives addresses to Services, until it is stopped.
#[derive(Debug)]
pub struct LoadBalancer {
    layout: Layout,
    kubectl: Kubectl,
    /// Address of each Service, by namespace and name.
    addresses: BTreeMap<(String, String), Ipv4Addr>,
    /// The nodes that each address is routed to.
    routes: BTreeMap<Ipv4Addr, Vec<Ipv4Addr>>,
}

#[derive(Deserialize)]
struct List {
    items: Vec<Value>,
}

impl LoadBalancer {
    /// For this cluster; nothing is changed yet.
    pub fn new(layout: &Layout, tools: &Tools) -> Self {
        Self {
            layout: layout.clone(),
            kubectl: Kubectl::new(layout, tools),
            addresses: BTreeMap::new(),
            routes: BTreeMap::new(),
        }
    }

    /// Works until told to stop. What fails is said once and tried again.
    pub fn run(mut self, stop: &AtomicBool) {
        let mut said = String::new();
        if let Err(error) = self.route_to_nowhere() {
            say(&format!("load balancer: {error:#}"));
        }
        while !stop.load(Ordering::Relaxed) {
            if let Err(error) = self.step() {
                let text = format!("load balancer: {error:#}");
                if text != said {
                    say(&text);
                    said = text;
                }
            }
            std::thread::sleep(INTERVAL);
        }
    }

    /// What is sent to an address that no Service has vanishes, as with a cloud's; an error would be another
    /// answer than the tests expect. The gateway is an address that no one has.
    fn route_to_nowhere(&self) -> Result<()> {
        let hub = self.layout.hub();
        run_line(&format!(
            "ip -n {hub} neighbour replace 10.203.0.250 lladdr 02:00:00:00:00:fa dev br0 nud permanent"
        ))?;
        run_line(&format!("ip -n {hub} route replace 10.203.1.0/24 via 10.203.0.250"))?;
        Ok(())
    }

    fn step(&mut self) -> Result<()> {
        let list: List =
            serde_json::from_str(&self.kubectl.run("get services --all-namespaces --output json")?)
                .context("reading the list of Services")?;
        let mut wanted = BTreeMap::new();
        for service in &list.items {
            let text = |pointer: &str| service.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
            let key = (text("/metadata/namespace").to_owned(), text("/metadata/name").to_owned());
            if text("/spec/type") != "LoadBalancer" || !text("/spec/loadBalancerClass").is_empty() {
                if service.pointer("/status/loadBalancer/ingress").is_some() {
                    self.write_status(&key, &Value::Null)?;
                }
                continue;
            }
            let address = self.address_of(&key)?;
            if text("/status/loadBalancer/ingress/0/ip") != address.to_string() {
                self.write_status(&key, &serde_json::json!([{"ip": address.to_string()}]))?;
            }
            let check_port = match text("/spec/externalTrafficPolicy") {
                "Local" => service.pointer("/spec/healthCheckNodePort").and_then(Value::as_u64),
                _ => None,
            };
            wanted.insert(key, (address, check_port.and_then(|port| u16::try_from(port).ok())));
        }
        self.addresses.retain(|key, _| wanted.contains_key(key));
        self.route(wanted.into_values().collect())
    }

    fn address_of(&mut self, key: &(String, String)) -> Result<Ipv4Addr> {
        if let Some(address) = self.addresses.get(key) {
            return Ok(*address);
        }
        let mut candidates = (1..=254).map(|host| Ipv4Addr::new(10, 203, 1, host));
        let free = candidates
            .find(|address| !self.addresses.values().any(|taken| taken == address))
            .context("all 254 addresses are taken")?;
        self.addresses.insert(key.clone(), free);
        Ok(free)
    }

    fn write_status(&self, key: &(String, String), ingress: &Value) -> Result<()> {
        let patch = serde_json::json!({"status": {"loadBalancer": {"ingress": ingress}}}).to_string();
        let words =
            ["patch", "service", "--namespace", &key.0, &key.1, "--subresource=status", "--type=merge"];
        let words: Vec<&str> = words.into_iter().chain(["--patch", &patch]).collect();
        self.kubectl.run_words(&words).map(|_| ())
    }

    fn route(&mut self, services: Vec<(Ipv4Addr, Option<u16>)>) -> Result<()> {
        let hub = self.layout.hub();
        let mut routes = BTreeMap::new();
        for (address, check_port) in services {
            let nodes: Vec<Ipv4Addr> = (1..=self.layout.nodes)
                .map(|number| self.layout.node_ips(number).0)
                .filter(|node| check_port.is_none_or(|port| is_healthy(*node, port)))
                .collect();
            let before = self.routes.get(&address).map_or(&[][..], Vec::as_slice);
            if before != nodes {
                let target: String = nodes.iter().map(|node| format!(" nexthop via {node}")).collect();
                let verb = if nodes.is_empty() { "delete" } else { "replace" };
                run_line(&format!("ip -n {hub} route {verb} {address}/32{target}"))?;
            }
            routes.insert(address, nodes);
        }
        for (gone, nodes) in self.routes.iter().filter(|(address, _)| !routes.contains_key(*address)) {
            if !nodes.is_empty() {
                run_line(&format!("ip -n {hub} route delete {gone}/32"))?;
            }
        }
        self.routes = routes;
        Ok(())
    }
}

fn is_healthy(node: Ipv4Addr, port: u16) -> bool {
    let ask = || -> std::io::Result<bool> {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::from((node, port)), HEALTH_LIMIT)?;
        stream.set_read_timeout(Some(HEALTH_LIMIT))?;
        write!(stream, "GET /healthz HTTP/1.1\r\nHost: {node}\r\nConnection: close\r\n\r\n")?;
        let mut start = [0_u8; 12];
        stream.read_exact(&mut start)?;
        Ok(start.ends_with(b" 200"))
    };
    ask().unwrap_or(false)
}
