//! Nodes, pods and off-cluster clients as network namespaces.
//!
//! ```text
//!   root namespace            switch namespace           node namespaces          pod namespaces
//!   stl<N> 198.18.N.1 ------- bridge lan .2 -+---------- eth0 .11 -- pod1 ------- eth0 10.244.1.11
//!   (control plane,                          |                       10.244.1.1
//!    controller)                             +---------- eth0 .12 ...
//!                                            +---------- client of node 1: eth0 .101, routes by node 1
//! ```
//!
//! Each pod is connected to its node by a point-to-point veth instead of a bridge, so that answers between pods of one
//! node pass the node's connection tracking regardless of br_netfilter. The default route of a node points to the
//! switch, which forwards nothing: unanswered packets are dropped there and never leave the laboratory. N is a free
//! number on this machine; every address has an IPv6 counterpart.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, bail};

use crate::lab::cleanup::{self, PREFIX};
use crate::lab::namespace::{Namespace, ip_batch};
use crate::lab::process::Process;
use crate::lab::programs;

/// Ports on which every pod serves TCP, UDP and SCTP.
pub const POD_PORTS: &[u16] = &[8080, 8081];

/// The network that joins nodes, clients and the control plane.
#[derive(Debug)]
pub struct Lab {
    id: String,
    number: u8,
    switch: Namespace,
    directory: std::path::PathBuf,
    members: AtomicU32,
    _registered: cleanup::Registered,
}

/// A node's namespaces: its own, and that of a client whose routes lead through it.
#[derive(Debug)]
pub struct NodeNet {
    pub name: String,
    /// Position from 1, part of the node's addresses.
    pub index: u8,
    pub namespace: Namespace,
    /// Off-cluster client that reaches virtual addresses through this node.
    pub client: Namespace,
    lab_number: u8,
}

/// A pod's namespace and server.
#[derive(Debug)]
pub struct PodNet {
    /// The pod's name, which its server sends as answer.
    pub name: String,
    pub namespace: Namespace,
    pub ipv4: Ipv4Addr,
    pub ipv6: Ipv6Addr,
    pub server: Process,
}

impl PodNet {
    pub fn address(&self, ipv6: bool) -> IpAddr {
        if ipv6 { self.ipv6.into() } else { self.ipv4.into() }
    }
}

impl NodeNet {
    /// Address on the laboratory's network.
    pub fn address(&self, ipv6: bool) -> IpAddr {
        lan_address(self.lab_number, 10 + self.index, ipv6)
    }

    /// Address of the node's client.
    pub fn client_address(&self, ipv6: bool) -> IpAddr {
        lan_address(self.lab_number, 100 + self.index, ipv6)
    }

    /// Pod CIDRs, IPv4 first.
    pub fn pod_cidrs(&self) -> [String; 2] {
        [format!("10.244.{}.0/24", self.index), format!("fd00:244:{:x}::/64", self.index)]
    }
}

fn lan_address(number: u8, host: u8, ipv6: bool) -> IpAddr {
    if ipv6 {
        Ipv6Addr::new(0xfd18, number.into(), 0, 0, 0, 0, 0, host.into()).into()
    } else {
        Ipv4Addr::new(198, 18, number, host).into()
    }
}

impl Lab {
    /// Creates the switch and connects this machine to it.
    ///
    /// # Errors
    /// Namespaces or devices cannot be created.
    pub fn create() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        cleanup::sweep();
        let id = format!("{PREFIX}{}-{}", cleanup::run_id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let directory = std::env::temp_dir().join(&id);
        let registered = cleanup::register(cleanup::Resource::Directory(directory.clone()));
        std::fs::create_dir_all(&directory).with_context(|| format!("creating {}", directory.display()))?;
        let switch = Namespace::create(&format!("{id}-switch"))?;
        switch.sysctl(&[("net.ipv4.ip_forward", "0"), ("net.ipv6.conf.all.forwarding", "0")])?;
        switch.ip("link add lan type bridge\nlink set lan up\n")?;
        let number = join_root(&switch)?;
        switch.ip(&format!(
            "addr add {}/24 dev lan\naddr add {}/64 dev lan nodad\n",
            lan_address(number, 2, false),
            lan_address(number, 2, true)
        ))?;
        Ok(Self { id, number, switch, directory, members: AtomicU32::new(0), _registered: registered })
    }

    /// Prefix of the names of the laboratory's namespaces.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Directory for logs and the state of agents, removed with the laboratory.
    pub fn directory(&self) -> &std::path::Path {
        &self.directory
    }

    /// This machine's address on the laboratory's network, on which the controller listens. IPv4 only: the machine
    /// (for example a container) may lack IPv6 although its namespaces have it.
    pub fn root_address(&self) -> IpAddr {
        lan_address(self.number, 1, false)
    }

    /// Creates a node with a client behind it, and routes between its pods and those of `others`.
    ///
    /// # Errors
    /// Namespaces or devices cannot be created.
    pub fn add_node(&self, name: &str, index: u8, others: &[&NodeNet]) -> Result<NodeNet> {
        let namespace = Namespace::create(&format!("{}-{name}", self.id))?;
        harden(&namespace)?;
        namespace.sysctl(&[("net.ipv4.ip_forward", "1"), ("net.ipv6.conf.all.forwarding", "1")])?;
        self.plug(&namespace, 10 + index, 2)?;
        let client = Namespace::create(&format!("{}-client-of-{name}", self.id))?;
        harden(&client)?;
        self.plug(&client, 100 + index, 10 + index)?;
        let node = NodeNet { name: name.to_owned(), index, namespace, client, lab_number: self.number };
        for other in others {
            node.namespace.ip(&pod_routes(other))?;
            other.namespace.ip(&pod_routes(&node))?;
        }
        Ok(node)
    }

    /// Creates the `index`th pod (from 1) of a node and starts its server.
    ///
    /// # Errors
    /// Namespaces or devices cannot be created, or the server does not start.
    pub fn add_pod(&self, node: &NodeNet, name: &str, index: u8) -> Result<PodNet> {
        let namespace = Namespace::create(&format!("{}-pod-{name}", self.id))?;
        harden(&namespace)?;
        let n = node.index;
        let (ipv4, gateway) = (Ipv4Addr::new(10, 244, n, 10 + index), Ipv4Addr::new(10, 244, n, 1));
        let v6 = |host: u8| Ipv6Addr::new(0xfd00, 0x244, n.into(), 0, 0, 0, 0, host.into());
        let (ipv6, gateway6) = (v6(10 + index), v6(1));
        let device = format!("pod{index}");
        node.namespace.ip(&format!(
            "link add {device} type veth peer name eth0 netns {}\n\
             link set {device} up\n\
             addr add {gateway}/32 dev {device}\n\
             addr add {gateway6}/128 dev {device} nodad\n\
             route add {ipv4}/32 dev {device}\n\
             route add {ipv6}/128 dev {device}\n",
            namespace.name()
        ))?;
        namespace.ip(&format!(
            "link set eth0 up\n\
             addr add {ipv4}/32 dev eth0\n\
             addr add {ipv6}/128 dev eth0 nodad\n\
             route add {gateway}/32 dev eth0\n\
             route add default via {gateway} dev eth0 src {ipv4}\n\
             route add {gateway6}/128 dev eth0\n\
             route add default via {gateway6} dev eth0 src {ipv6}\n"
        ))?;
        let server = self.start_server(&namespace, name)?;
        Ok(PodNet { name: name.to_owned(), namespace, ipv4, ipv6, server })
    }

    /// Starts a pod's server in a namespace; a node's namespace makes it a pod of the host network.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_server(&self, namespace: &Namespace, name: &str) -> Result<Process> {
        let ports: Vec<_> = POD_PORTS.iter().map(u16::to_string).collect();
        let ports = ports.join(",");
        let mut command = Command::new(programs::workspace("lab-pod")?);
        command.args(["--name", name, "--tcp", &ports, "--udp", &ports, "--sctp", &ports]);
        namespace.wrap(&mut command);
        Process::start(&format!("pod {name}"), command, &self.directory.join(format!("pod-{name}.log")))
    }

    /// Connects a namespace to the switch as `eth0`, with a host number and a default route through another.
    fn plug(&self, namespace: &Namespace, host: u8, gateway: u8) -> Result<()> {
        let port = format!("p{}", self.members.fetch_add(1, Ordering::Relaxed));
        self.switch.ip(&format!(
            "link add {port} type veth peer name eth0 netns {}\nlink set {port} master lan up\n",
            namespace.name()
        ))?;
        let address = |host, ipv6| lan_address(self.number, host, ipv6);
        namespace.ip(&format!(
            "link set eth0 up\n\
             addr add {}/24 dev eth0\n\
             addr add {}/64 dev eth0 nodad\n\
             route add default via {}\n\
             route add default via {} dev eth0\n",
            address(host, false),
            address(host, true),
            address(gateway, false),
            address(gateway, true)
        ))
    }
}

/// Finds a free number and connects the root namespace to the switch. The name of the device reserves the number: it
/// is unique on the machine.
fn join_root(switch: &Namespace) -> Result<u8> {
    let first: u8 = rand::random();
    let mut last = None;
    for step in 0..=u8::MAX {
        let number = first.wrapping_add(step);
        let made = ip_batch(
            None,
            &format!(
                "link add stl{number} type veth peer name root netns {}\n\
                 addr add {}/24 dev stl{number}\n\
                 link set stl{number} up\n",
                switch.name(),
                lan_address(number, 1, false)
            ),
        );
        match made {
            Ok(()) => {
                switch.ip("link set root master lan up\n")?;
                return Ok(number);
            }
            Err(error) if format!("{error:#}").contains("File exists") => last = Some(error),
            Err(error) => return Err(error),
        }
    }
    match last {
        Some(error) => Err(error.context("all 256 laboratory networks of this machine are taken")),
        None => bail!("failed to create a laboratory network"),
    }
}

fn pod_routes(to: &NodeNet) -> String {
    let [ipv4, ipv6] = to.pod_cidrs();
    format!(
        "route add {ipv4} via {}\nroute add {ipv6} via {} dev eth0\n",
        to.address(false),
        to.address(true)
    )
}

/// Disables parts of the host's network stack that would disturb tests: rate limits for ICMP errors, redirects,
/// reverse path filters and duplicate address detection.
fn harden(namespace: &Namespace) -> Result<()> {
    namespace.sysctl(&[
        ("net.ipv4.icmp_ratelimit", "0"),
        // Despite its name, this applies to both families together.
        ("net.ipv4.icmp_msgs_per_sec", "1000000"),
        ("net.ipv4.icmp_msgs_burst", "1000000"),
        ("net.ipv6.icmp.ratelimit", "0"),
        ("net.ipv4.conf.all.accept_redirects", "0"),
        ("net.ipv4.conf.default.accept_redirects", "0"),
        ("net.ipv4.conf.all.send_redirects", "0"),
        ("net.ipv4.conf.default.send_redirects", "0"),
        ("net.ipv6.conf.all.accept_redirects", "0"),
        ("net.ipv6.conf.default.accept_redirects", "0"),
        ("net.ipv4.conf.all.rp_filter", "0"),
        ("net.ipv4.conf.default.rp_filter", "0"),
        ("net.ipv6.conf.all.accept_dad", "0"),
        ("net.ipv6.conf.default.accept_dad", "0"),
        ("net.ipv6.conf.default.accept_ra", "0"),
    ])
}
