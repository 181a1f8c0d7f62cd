//! `make demo`: a real control plane, three nodes in two zones, real packets, and what an operator sees of it.
//! Ends with exit code 1 if anything shown is not what it should be.

#![allow(clippy::print_stdout, reason = "printing is what a demonstration does")]

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use k8s_openapi::api::core::v1::{Pod, Service};
use serde_json::{Value, json};
use switchtower_e2e::lab::{NodeNet, PodNet};
use switchtower_e2e::probe::{self, Outcome, Transport};
use switchtower_e2e::switchtower::{Fleet, FleetNode, NodeSpec};
use switchtower_e2e::{cleanup, objects, programs, wait};

/// Runs the main job end to end and shows it.
#[derive(Parser)]
struct Arguments {
    /// Leave everything running until Ctrl-C, and say how to look around.
    #[arg(long)]
    keep: bool,
    /// Only remove what killed runs left behind.
    #[arg(long)]
    sweep: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.sweep {
        println!("{} leftovers removed", cleanup::sweep());
        return ExitCode::SUCCESS;
    }
    match run(arguments.keep) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            cleanup::check_interrupted();
            println!("\nThe demonstration failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(keep: bool) -> Result<()> {
    let start = Instant::now();
    println!("Starting etcd, kube-apiserver, kube-controller-manager, the controller, three nodes ...");
    let fleet = Fleet::start(&[
        NodeSpec::new("alpha", "east", &["web-a1", "web-a2"]),
        NodeSpec::new("beta", "east", &["web-b1"]),
        NodeSpec::new("gamma", "west", &["web-c1"]),
    ])?;
    for node in fleet.nodes() {
        for pod in &node.pods {
            create_pod(&fleet, pod, &node.net)?;
        }
    }
    println!("Ready after {:.1} s.\n", start.elapsed().as_secs_f64());
    show_nodes(&fleet);
    let shown = (|| {
        cluster_ip(&fleet)?;
        node_port(&fleet)?;
        load_balancer(&fleet)?;
        zones(&fleet)?;
        proxy_status(&fleet)
    })();
    if let Err(error) = &shown {
        cleanup::check_interrupted();
        println!("\n{error:#}\n\nThe controller's log ends:");
        let log = fleet.controller_log();
        let lines: Vec<_> = log.lines().collect();
        println!("{}", lines[lines.len().saturating_sub(15)..].join("\n"));
    }
    println!("\nAll of this took {:.1} s.", start.elapsed().as_secs_f64());
    if keep {
        look_around(&fleet)?;
        loop {
            std::thread::park();
        }
    }
    shown
}

fn title(text: &str) {
    println!("\n--- {text} {}", "-".repeat(94_usize.saturating_sub(text.chars().count())));
}

fn show_nodes(fleet: &Fleet) {
    println!("{:<8} {:<6} {:<15} {:<26} PODS", "NODE", "ZONE", "ADDRESS", "OFF-CLUSTER CLIENT");
    for node in fleet.nodes() {
        let pods: Vec<_> = node.pods.iter().map(|pod| format!("{} {}", pod.name, pod.ipv4)).collect();
        println!(
            "{:<8} {:<6} {:<15} {:<26} {}",
            node.net.name,
            node.zone,
            node.net.address(false).to_string(),
            format!("{} (via {})", node.net.client_address(false), node.net.name),
            pods.join(", ")
        );
    }
}

fn create_pod(fleet: &Fleet, pod: &PodNet, node: &NodeNet) -> Result<()> {
    let mut object = objects::pod("default", &pod.name, &node.name, "default");
    object["metadata"]["labels"] = json!({"app": "web"});
    object["status"] = objects::running(pod, node);
    fleet.kube().apply(&object).map(drop)
}

/// Creates a Service that selects the pods; the EndpointSlices are made by kube-controller-manager.
fn create_service(fleet: &Fleet, name: &str, spec: &Value) -> Result<Service> {
    let mut full = json!({
        "selector": {"app": "web"},
        "ipFamilyPolicy": "RequireDualStack",
        "ports": [
            {"name": "tcp", "protocol": "TCP", "port": 80, "targetPort": 8080},
            {"name": "udp", "protocol": "UDP", "port": 80, "targetPort": 8080},
        ],
    });
    for (key, value) in spec.as_object().into_iter().flatten() {
        full[key] = value.clone();
    }
    fleet.kube().apply(&objects::service("default", name, &full))?;
    fleet.kube().get("default", name)?.context("the Service was made and is not there")
}

fn address_of(service: &Service, ipv6: bool) -> Result<IpAddr> {
    let spec = service.spec.as_ref().context("a Service without spec")?;
    let addresses = spec.cluster_ips.iter().flatten().filter_map(|text| text.parse().ok());
    let mut addresses = addresses.filter(|address: &IpAddr| address.is_ipv6() == ipv6);
    addresses.next().context("a Service without an address of the family")
}

fn wait_for_backends(from: &PodNet, to: SocketAddr, wanted: usize) -> Result<()> {
    wait::until(&format!("{to} answers from {wanted} pods"), Duration::from_secs(10), || {
        let spread = probe::spread(&from.namespace, Transport::Tcp, to, 12)?;
        ensure!(spread.len() == wanted && spread.keys().all(|name| name.starts_with("web")), "{spread:?}");
        Ok(())
    })
}

fn show_spread(label: &str, spread: &BTreeMap<String, usize>) {
    let counts: Vec<_> = spread.iter().map(|(name, count)| format!("{name} {count:>3}")).collect();
    println!("  {label:<46} {}", counts.join("   "));
}

fn cluster_ip(fleet: &Fleet) -> Result<()> {
    title("A ClusterIP spreads connections over all pods");
    let service = create_service(fleet, "web", &json!({}))?;
    let (from, _) = fleet.pod("web-a1")?;
    let mut backends = 0;
    for (ipv6, transport) in
        [(false, Transport::Tcp), (false, Transport::Udp), (true, Transport::Tcp), (true, Transport::Udp)]
    {
        let to = SocketAddr::new(address_of(&service, ipv6)?, 80);
        wait_for_backends(from, to, 4)?;
        let spread = probe::spread(&from.namespace, transport, to, 200)?;
        show_spread(&format!("200 x {transport:?} from web-a1 to {to}"), &spread);
        backends = backends.max(spread.len());
        ensure!(spread.len() == 4, "200 connections reached {} of 4 pods", spread.len());
    }
    println!("  {backends} pods on 3 nodes answer; a pod that reaches itself is answered too.");
    Ok(())
}

fn node_port(fleet: &Fleet) -> Result<()> {
    title("A NodePort answers on every node");
    let service = create_service(fleet, "web-port", &json!({"type": "NodePort"}))?;
    let ports = service.spec.and_then(|spec| spec.ports).context("a Service without ports")?;
    let port = ports.first().and_then(|port| port.node_port).context("no NodePort was given")?;
    let port = u16::try_from(port)?;
    for node in fleet.nodes() {
        let to = SocketAddr::new(node.net.address(false), port);
        let outcome = eventually(node, to, |outcome| outcome.backend().is_some())?;
        println!("  off-cluster client {} -> {to:<22} {outcome}", node.net.client_address(false));
    }
    println!("  The pod sees the node's address: it is masqueraded, so that answers come back this way.");
    Ok(())
}

fn eventually(node: &FleetNode, to: SocketAddr, wanted: impl Fn(&Outcome) -> bool) -> Result<Outcome> {
    wait::until(&format!("{to} by {}", node.net.name), Duration::from_secs(10), || {
        let outcome = probe::send(&node.net.client, Transport::Tcp, to)?;
        ensure!(wanted(&outcome), "{outcome}");
        Ok(outcome)
    })
}

fn load_balancer(fleet: &Fleet) -> Result<()> {
    title("A load balancer's address with externalTrafficPolicy: Local keeps the client's address");
    let spec = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local"});
    create_service(fleet, "web-lb", &spec)?;
    let vip = "203.0.113.10";
    let mut object = objects::service("default", "web-lb", &json!({}));
    object["status"] = objects::load_balancer_status(&[vip]);
    object["spec"] = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local",
        "ports": [{"name": "tcp", "protocol": "TCP", "port": 80, "targetPort": 8080},
                  {"name": "udp", "protocol": "UDP", "port": 80, "targetPort": 8080}],
        "selector": {"app": "web", "tier": "front"}, "ipFamilyPolicy": "RequireDualStack"});
    // Only web-a1 and web-b1 serve it: gamma has no endpoint.
    for name in ["web-a1", "web-b1"] {
        let mut labelled = objects::pod("default", name, &fleet.pod(name)?.1.net.name, "default");
        labelled["metadata"]["labels"] = json!({"app": "web", "tier": "front"});
        fleet.kube().apply(&labelled)?;
    }
    fleet.kube().apply(&object)?;
    let to = SocketAddr::new(vip.parse()?, 80);
    for node in fleet.nodes() {
        let client = node.net.client_address(false);
        let has_endpoint = node.net.name != "gamma";
        let outcome = eventually(node, to, |outcome| match has_endpoint {
            true => outcome.source() == Some(client),
            false => *outcome == Outcome::Silence,
        })?;
        let remark = if has_endpoint { "the client's" } else { "dropped: no endpoint here" };
        println!("  {client:<14} via {:<6} -> {to}  {outcome} ({remark})", node.net.name);
    }
    Ok(())
}

fn zones(fleet: &Fleet) -> Result<()> {
    title("A Service with zone hints stays in the client's zone");
    // Hints are written by whoever makes the slices; here by hand, so that all three pods carry one.
    let spec = json!({"ports": [{"name": "tcp", "protocol": "TCP", "port": 80}]});
    fleet.kube().apply(&objects::service("default", "web-near", &spec))?;
    let mut endpoints = Vec::new();
    for name in ["web-a2", "web-b1", "web-c1"] {
        let (pod, node) = fleet.pod(name)?;
        endpoints.push(objects::hinted(objects::endpoint(pod, &node.net, false), &[&node.zone]));
    }
    let ports = [("tcp", "TCP", 8080)];
    let slice = objects::slice("default", "web-near-1", "web-near", false, &ports, &endpoints);
    fleet.kube().apply(&slice)?;
    let service: Service = fleet.kube().get("default", "web-near")?.context("no Service web-near")?;
    let to = SocketAddr::new(address_of(&service, false)?, 80);
    for (client, zone, wanted) in [("web-a1", "east", 2), ("web-c1", "west", 1)] {
        let (from, _) = fleet.pod(client)?;
        wait_for_backends(from, to, wanted)?;
        let spread = probe::spread(&from.namespace, Transport::Tcp, to, 100)?;
        show_spread(&format!("100 x Tcp from {client} in zone {zone}"), &spread);
        ensure!(spread.len() == wanted, "connections from {zone} reached {} pods", spread.len());
    }
    Ok(())
}

fn show_rows(fleet: &Fleet, when: &str) -> Result<()> {
    println!("\n  $ kubectl get proxystatus                     # {when}");
    for line in fleet.control_plane().kubectl(&["get", "proxystatus"])?.lines() {
        println!("  {}", line.trim_end());
    }
    Ok(())
}

fn proxy_status(fleet: &Fleet) -> Result<()> {
    title("What the operator sees while an endpoint goes away");
    fleet.settled(Duration::from_secs(5))?;
    show_rows(fleet, "before")?;
    // A node whose agent stands still shows what "behind" looks like.
    let gamma = fleet.nodes().last().context("no nodes")?;
    if let Some(agent) = fleet.agent_id(gamma).and_then(|id| i32::try_from(id).ok()) {
        // SAFETY: a signal to a child of this process.
        unsafe { libc::kill(agent, libc::SIGSTOP) };
    }
    let deleted = Instant::now();
    fleet.kube().delete::<Pod>("default", "web-a2")?;
    let service: Service = fleet.kube().get("default", "web")?.context("no Service web")?;
    let to = SocketAddr::new(address_of(&service, false)?, 80);
    wait_for_backends(fleet.pod("web-b1")?.0, to, 3)?;
    let seconds = deleted.elapsed().as_secs_f64();
    println!(
        "\n  Pod web-a2 is deleted while gamma's agent is stopped; {seconds:.1} s later beta sends it nothing."
    );
    wait::until("gamma's row says that it is behind", Duration::from_secs(5), || {
        let generation = fleet.row("gamma")?.generation;
        ensure!(generation.desired > generation.applied, "desired = applied = {}", generation.applied);
        Ok(())
    })?;
    std::thread::sleep(Duration::from_millis(200));
    show_rows(fleet, "during")?;
    println!("  gamma's kernel lags behind what it should hold; after 5 s READY and STATE say so too.");
    if let Some(agent) = fleet.agent_id(gamma).and_then(|id| i32::try_from(id).ok()) {
        // SAFETY: as above.
        unsafe { libc::kill(agent, libc::SIGCONT) };
    }
    fleet.settled(Duration::from_secs(10))?;
    show_rows(fleet, "after; nft reads the same from each kernel")
}

fn look_around(fleet: &Fleet) -> Result<()> {
    title("Look around");
    let kubectl = programs::control_plane("kubectl")?;
    let folder = kubectl.parent().context("kubectl has no folder")?;
    let near = fleet.nodes().first().context("no nodes")?;
    let pod = near.pods.first().context("no pods")?;
    println!("  export KUBECONFIG={}", fleet.control_plane().kubeconfig().display());
    println!("  export PATH={}:$PATH", folder.display());
    println!("  kubectl get proxystatus,nodes,services,pods -A");
    println!("  ip netns exec {} nft list table ip switchtower", near.net.namespace.name());
    let web: Service = fleet.kube().get("default", "web")?.context("no Service web")?;
    let (name, address) = (pod.namespace.name(), address_of(&web, false)?);
    println!("  ip netns exec {name} bash -c 'head -1 </dev/tcp/{address}/80'");
    println!("  tail -f {}/*.log", fleet.lab().directory().display());
    println!("\nIt runs until Ctrl-C (or: kill {}), and then removes everything.", std::process::id());
    Ok(())
}
