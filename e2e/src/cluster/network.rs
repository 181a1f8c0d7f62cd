//! The network between the machines: a bridge in the hub, a link per node, a link for the host.

use anyhow::Result;

use super::layout::Layout;
use super::machine::Machine;
use super::shell::run_line;

/// Sysctls of every machine: it forwards, its ICMP errors are not rate-limited (missing ones would look like
/// timeouts), and it neither sends nor accepts redirects (a client would learn a route past the proxy).
const SYSCTLS: [&str; 13] = [
    "net.ipv4.ip_forward=1",
    "net.ipv6.conf.all.forwarding=1",
    "net.ipv6.conf.default.forwarding=1",
    "net.ipv4.icmp_ratelimit=0",
    "net.ipv6.icmp.ratelimit=0",
    "net.ipv4.conf.all.send_redirects=0",
    "net.ipv4.conf.default.send_redirects=0",
    "net.ipv4.conf.all.accept_redirects=0",
    "net.ipv4.conf.default.accept_redirects=0",
    "net.ipv6.conf.all.accept_redirects=0",
    "net.ipv6.conf.default.accept_redirects=0",
    "net.ipv6.conf.default.accept_dad=0",
    // Spreads a client's connections over the nodes to which a VIP is routed.
    "net.ipv4.fib_multipath_hash_policy=1",
];

/// Creates the bridge in the hub, and the host's link to it.
pub fn prepare_hub(layout: &Layout, hub: &Machine) -> Result<()> {
    settings(hub)?;
    let name = &hub.name;
    run_line(&format!("ip -n {name} link add br0 type bridge"))?;
    run_line(&format!("ip -n {name} address add {}/24 dev br0", layout.hub_ip()))?;
    run_line(&format!("ip -n {name} address add {}/64 dev br0 nodad", layout.hub_ip6()))?;
    run_line(&format!("ip -n {name} link set br0 up"))?;
    let host = layout.host_link();
    run_line(&format!("ip link add {host} type veth peer name host netns {name}"))?;
    run_line(&format!("ip -n {name} link set host master br0 up"))?;
    run_line(&format!("ip address add {}/24 dev {host}", layout.host_ip()))?;
    run_line(&format!("ip link set {host} up"))?;
    Ok(())
}

/// Creates a node's link to the hub, with its addresses and default routes.
pub fn prepare_node(layout: &Layout, hub: &Machine, node: &Machine, number: u8) -> Result<()> {
    settings(node)?;
    let (ip, ip6) = layout.node_ips(number);
    let name = &node.name;
    run_line(&format!("ip -n {} link add node{number} type veth peer name eth0 netns {name}", hub.name))?;
    run_line(&format!("ip -n {} link set node{number} master br0 up", hub.name))?;
    run_line(&format!("ip -n {name} address add {ip}/24 dev eth0"))?;
    run_line(&format!("ip -n {name} address add {ip6}/64 dev eth0 nodad"))?;
    run_line(&format!("ip -n {name} link set eth0 up"))?;
    run_line(&format!("ip -n {name} route add default via {}", layout.hub_ip()))?;
    run_line(&format!("ip -n {name} -6 route add default via {}", layout.hub_ip6()))?;
    Ok(())
}

/// Adds routes to the pods of one node on every other machine.
pub fn route_pods(
    layout: &Layout,
    machines: &[Machine],
    node: &str,
    number: u8,
    cidrs: &[String],
) -> Result<()> {
    let (ip, ip6) = layout.node_ips(number);
    for machine in machines.iter().filter(|machine| machine.name != node) {
        for cidr in cidrs {
            let via = if cidr.contains(':') { ip6.to_string() } else { ip.to_string() };
            run_line(&format!("ip -n {} route replace {cidr} via {via}", machine.name))?;
        }
    }
    Ok(())
}

fn settings(machine: &Machine) -> Result<()> {
    machine.net(&format!("sysctl -q -w {}", SYSCTLS.join(" "))).map(drop)
}
