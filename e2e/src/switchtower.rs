//! Runs the product in a laboratory: the real controller with the RBAC of the manifests, and real agents in their
//! nodes' namespaces, with pod-bound tokens from the real TokenRequest API.

pub mod metrics;
pub mod plugin;
mod settled;

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{ConfigMap, Pod, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::PostParams;
use serde_json::json;
use switchtower_crds::{ProxyStatus, ProxyStatusStatus};

use crate::lab::api::Kube;
use crate::lab::control_plane::ControlPlane;
use crate::lab::objects;
use crate::lab::process::Process;
use crate::lab::programs;
use crate::lab::wait;
use crate::lab::{Lab, NodeNet, PodNet};

/// Namespace of the product.
pub const NAMESPACE: &str = "switchtower-system";
/// ServiceAccount of the agents.
pub const AGENT_ACCOUNT: &str = "switchtower-node-agent";
/// Audience of the agents' tokens.
pub const AUDIENCE: &str = "switchtower";
/// Lifetime of a laboratory's tokens in seconds, longer than any laboratory runs.
const TOKEN_SECONDS: i64 = 24 * 3600;
const CONTROLLER_PORT: u16 = 9443;

mod controllers;
mod links;

/// Specification of one node of a fleet.
#[derive(Debug, Clone)]
pub struct NodeSpec {
    pub name: String,
    pub zone: String,
    /// Names of the node's pods.
    pub pods: Vec<String>,
}

impl NodeSpec {
    pub fn new(name: &str, zone: &str, pods: &[&str]) -> Self {
        let pods = pods.iter().map(|&pod| pod.to_owned()).collect();
        Self { name: name.to_owned(), zone: zone.to_owned(), pods }
    }
}

#[derive(Debug)]
pub struct FleetNode {
    pub net: NodeNet,
    pub zone: String,
    pub pods: Vec<PodNet>,
    agent: Mutex<Option<Process>>,
    directory: PathBuf,
}

type Environment = Mutex<Vec<(String, String)>>;

fn owned(variables: &[(&str, &str)]) -> Vec<(String, String)> {
    variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// A control plane, a controller, nodes with agents, and pods.
#[derive(Debug)]
pub struct Fleet {
    // Drop order: the agents and the controller end first, the control plane last.
    nodes: Vec<FleetNode>,
    controller: Mutex<Option<Process>>,
    second: Mutex<Option<Process>>,
    second_metrics: SocketAddr,
    second_admin: SocketAddr,
    metrics: SocketAddr,
    admin: SocketAddr,
    environment: Environment,
    agent_environment: Environment,
    links: Option<links::LinkedReplicas>,
    /// URL under which controllers started from now on reach the API server, if not the usual one.
    api_server: Mutex<Option<String>>,
    lab: Lab,
    control_plane: ControlPlane,
}

impl Fleet {
    /// Builds the fleet, starts the controller and the agents, and returns when every agent has applied its first
    /// view.
    ///
    /// # Errors
    /// A part does not start; the message names it and quotes the end of its log.
    pub fn start(specs: &[NodeSpec]) -> Result<Self> {
        let fleet = Self::build(specs)?;
        fleet.start_all()?;
        Ok(fleet)
    }

    /// Installs the product, starts the controller and the agents, and returns when every agent has applied its first view.
    ///
    /// # Errors
    /// As [`Fleet::start`].
    pub fn start_all(&self) -> Result<()> {
        self.install()?;
        self.start_controller()?;
        self.start_agents()
    }

    /// Starts all agents and waits until each has applied its first view.
    fn start_agents(&self) -> Result<()> {
        self.nodes.iter().try_for_each(|node| self.start_agent(node))?;
        self.settled(Duration::from_secs(20)).map(drop)
    }

    /// Builds the control plane, nodes and pods. Starts and installs nothing of the product.
    ///
    /// # Errors
    /// As [`Fleet::start`].
    pub fn build(specs: &[NodeSpec]) -> Result<Self> {
        let (control_plane, network) = std::thread::scope(|scope| {
            let control_plane = scope.spawn(ControlPlane::start);
            let network = build_network(specs);
            (control_plane.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), network)
        });
        let (control_plane, (lab, nodes)) = (control_plane?, network?);
        let (metrics, admin) = (free_address()?, free_address()?);
        let fleet = Self {
            nodes,
            controller: Mutex::new(None),
            second: Mutex::new(None),
            second_metrics: free_address()?,
            second_admin: free_address()?,
            metrics,
            admin,
            environment: Environment::default(),
            agent_environment: Environment::default(),
            links: None,
            api_server: Mutex::default(),
            lab,
            control_plane,
        };
        for node in &fleet.nodes {
            fleet.register(node)?;
        }
        Ok(fleet)
    }

    /// Installs the CRDs, the namespace, ServiceAccounts and RBAC from the manifests that users apply.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn install(&self) -> Result<()> {
        self.install_rights()?;
        self.install_crds()
    }

    /// Installs everything except the CRDs.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn install_rights(&self) -> Result<()> {
        let directory = self.lab.directory();
        let files = [
            ("namespace.yaml", include_str!("../../manifests/namespace.yaml")),
            ("rbac.yaml", include_str!("../../manifests/rbac.yaml")),
        ];
        for (name, text) in files {
            let path = directory.join(name);
            fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
            self.control_plane.kubectl(&["-n", NAMESPACE, "apply", "-f", &path.to_string_lossy()])?;
        }
        Ok(())
    }

    /// Installs the CRDs and waits until the API server serves them.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn install_crds(&self) -> Result<()> {
        let path = self.lab.directory().join("crds.yaml");
        let definitions = [
            include_str!("../../crds/yaml/proxystatuses.yaml"),
            include_str!("../../crds/yaml/proxyprofiles.yaml"),
            include_str!("../../crds/yaml/proxyrollouts.yaml"),
        ];
        fs::write(&path, definitions.join("---\n"))?;
        self.control_plane.kubectl(&["apply", "-f", &path.to_string_lossy()])?;
        wait::until("the API server serves switchtower.dev", Duration::from_secs(10), || {
            self.control_plane.kubectl(&["get", "proxystatuses,proxyprofiles,proxyrollouts"])
        })?;
        Ok(())
    }

    /// The API client, with administrator rights.
    pub fn kube(&self) -> &Kube {
        self.control_plane.kube()
    }

    pub fn control_plane(&self) -> &ControlPlane {
        &self.control_plane
    }

    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    pub fn nodes(&self) -> &[FleetNode] {
        &self.nodes
    }

    /// Returns a pod and its node.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn pod(&self, name: &str) -> Result<(&PodNet, &FleetNode)> {
        let all = self.nodes.iter().flat_map(|node| node.pods.iter().map(move |pod| (pod, node)));
        all.into_iter().find(|(pod, _)| pod.name == name).with_context(|| format!("no pod {name}"))
    }

    /// Address that agents connect to.
    pub fn controller_address(&self) -> SocketAddr {
        (self.lab.root_address(), CONTROLLER_PORT).into()
    }

    /// Address of the metrics of the first controller, or of the second if only that runs.
    pub fn metrics_address(&self) -> SocketAddr {
        if self.only_second_runs() { self.second_metrics } else { self.metrics }
    }

    /// Address of the admin API of the first controller, or of the second if only that runs.
    pub fn admin_address(&self) -> SocketAddr {
        if self.only_second_runs() { self.second_admin } else { self.admin }
    }

    /// Starts the controller as its ServiceAccount.
    ///
    /// # Errors
    /// The program does not start.
    pub fn start_controller(&self) -> Result<()> {
        let process = self.controller_process(0, self.controller_address(), self.metrics, self.admin)?;
        *lock(&self.controller) = Some(process);
        Ok(())
    }

    /// Sets environment variables for controllers started from now on.
    pub fn set_controller_environment(&self, variables: &[(&str, &str)]) {
        *lock(&self.environment) = owned(variables);
    }

    /// Sets the URL of the API server for controllers started from now on.
    pub fn set_api_server(&self, url: String) {
        *lock(&self.api_server) = Some(url);
    }

    /// Sets environment variables for agents started from now on.
    pub fn set_agent_environment(&self, variables: &[(&str, &str)]) {
        *lock(&self.agent_environment) = owned(variables);
    }

    /// Waits until the controller publishes its address and accepts connections.
    ///
    /// # Errors
    /// It exits, or does not do so in time.
    pub fn controller_listens(&self, deadline: Duration) -> Result<()> {
        wait::until("the controller listens", deadline, || {
            self.check_controllers()?;
            std::net::TcpStream::connect_timeout(&self.controller_address(), Duration::from_millis(200))
                .context("connecting to the controller")
        })
        .map(drop)
    }

    /// Checks that the controller is running.
    ///
    /// # Errors
    /// It has exited, or was never started.
    pub fn check_controller(&self) -> Result<()> {
        lock(&self.controller).as_ref().context("the controller is not started")?.check_running()
    }

    /// Checks that a controller runs, the first or the second.
    ///
    /// # Errors
    /// Neither runs.
    pub fn check_controllers(&self) -> Result<()> {
        let second = lock(&self.second).as_ref().is_some_and(|process| process.check_running().is_ok());
        if second { Ok(()) } else { self.check_controller() }
    }

    /// Everything the controller has logged.
    pub fn controller_log(&self) -> String {
        fs::read_to_string(self.lab.directory().join("controller.log")).unwrap_or_default()
    }

    pub fn controller_id(&self) -> Option<u32> {
        lock(&self.controller).as_ref().map(Process::id)
    }

    /// Signals the controller and waits until it exits.
    ///
    /// # Errors
    /// It does not exit.
    pub fn stop_controller(&self, signal: i32) -> Result<()> {
        let Some(process) = lock(&self.controller).take() else { return Ok(()) };
        process.signal(signal);
        process.wait(Duration::from_secs(10)).map(drop)
    }

    /// Starts a node's agent: creates its Pod and a token bound to the Pod, and runs the program in the node's
    /// namespace.
    ///
    /// # Errors
    /// The API server refuses, or the program does not start.
    pub fn start_agent(&self, node: &FleetNode) -> Result<()> {
        let pod = self.agent_pod(&node.net.name)?;
        let token = self.token(AGENT_ACCOUNT, Some(&pod), &[AUDIENCE], TOKEN_SECONDS)?;
        self.kube().apply(&self.running_agent_pod(node))?;
        fs::create_dir_all(&node.directory)?;
        fs::write(self.token_file(node), token)?;
        self.write_bootstrap(node)?;
        self.run_agent(node)
    }

    /// Restarts a node's agent with its existing files.
    ///
    /// # Errors
    /// The program does not start.
    pub fn run_agent(&self, node: &FleetNode) -> Result<()> {
        let process = self.agent_process(node, &node.net.name, &self.token_file(node))?;
        *lock(&node.agent) = Some(process);
        Ok(())
    }

    /// Starts a second agent in a node's namespace, which claims to be `name` and uses the given token file. It has
    /// its own state and ports, and ends when the returned process is dropped.
    ///
    /// # Errors
    /// The program does not start.
    pub fn stranger(&self, node: &FleetNode, name: &str, token: &str) -> Result<Process> {
        let id = rand::random::<u32>();
        let directory = self.lab.directory().join(format!("stranger-{id:08x}"));
        fs::create_dir_all(&directory)?;
        fs::write(directory.join("token"), token)?;
        let mut command = Command::new(programs::workspace("switchtower-node-agent")?);
        command.args(["--node-name", name]);
        command.arg("--bootstrap-dir").arg(node.directory.join("bootstrap"));
        command.arg("--token-file").arg(directory.join("token"));
        command.arg("--state-dir").arg(directory.join("state"));
        command.args(["--metrics-bind-address", "127.0.0.1:0", "--healthz-bind-address", "127.0.0.1:0"]);
        node.net.namespace.wrap(&mut command);
        Process::start("a second switchtower-node-agent", command, &directory.join("agent.log"))
    }

    fn agent_process(&self, node: &FleetNode, name: &str, token: &std::path::Path) -> Result<Process> {
        let mut command = Command::new(programs::workspace("switchtower-node-agent")?);
        command.args(["--node-name", name]);
        command.arg("--bootstrap-dir").arg(node.directory.join("bootstrap"));
        command.arg("--token-file").arg(token);
        command.arg("--state-dir").arg(node.directory.join("state"));
        command.envs(lock(&self.agent_environment).iter().cloned());
        node.net.namespace.wrap(&mut command);
        let log = self.lab.directory().join(format!("agent-{}.log", node.net.name));
        Process::start(&format!("switchtower-node-agent of {}", node.net.name), command, &log)
    }

    /// Creates the Pod of a node's agent unless it exists.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn agent_pod(&self, node: &str) -> Result<Pod> {
        let name = format!("{AGENT_ACCOUNT}-{node}");
        self.kube().apply(&objects::pod(NAMESPACE, &name, node, AGENT_ACCOUNT))?;
        self.kube().get(NAMESPACE, &name)?.context("the agent's Pod disappeared after its creation")
    }

    /// Reports the Pod of a node's agent as running, as a kubelet would.
    fn running_agent_pod(&self, node: &FleetNode) -> serde_json::Value {
        let name = format!("{AGENT_ACCOUNT}-{}", node.net.name);
        let mut pod = objects::pod(NAMESPACE, &name, &node.net.name, AGENT_ACCOUNT);
        pod["status"] = objects::running_on_host(&node.net);
        pod
    }

    /// Requests a token from the TokenRequest API, optionally bound to a Pod.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn token(
        &self,
        account: &str,
        pod: Option<&Pod>,
        audiences: &[&str],
        seconds: i64,
    ) -> Result<String> {
        self.bound_token(account, pod.map(|pod| ("Pod", &pod.metadata)), audiences, seconds)
    }

    /// Requests a token that is bound to an object of this kind.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn bound_token(
        &self,
        account: &str,
        to: Option<(&str, &ObjectMeta)>,
        audiences: &[&str],
        seconds: i64,
    ) -> Result<String> {
        let bound = to.map(|(kind, metadata)| BoundObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some(kind.to_owned()),
            name: metadata.name.clone(),
            uid: metadata.uid.clone(),
        });
        let request = TokenRequest {
            spec: TokenRequestSpec {
                audiences: audiences.iter().map(|&audience| audience.to_owned()).collect(),
                bound_object_ref: bound,
                expiration_seconds: Some(seconds),
            },
            ..TokenRequest::default()
        };
        let api: Api<ServiceAccount> = Api::namespaced(self.kube().client(), NAMESPACE);
        let parameters = PostParams::default();
        let answer = api.create_token_request(account, &parameters, &request);
        let answer = self.kube().block_on(answer).with_context(|| format!("a token for {account}"))?;
        Ok(answer.status.context("a TokenRequest without status")?.token)
    }

    /// Signals a node's agent and waits until it exits.
    ///
    /// # Errors
    /// It does not exit.
    pub fn stop_agent(&self, node: &FleetNode, signal: i32) -> Result<()> {
        let Some(process) = lock(&node.agent).take() else { return Ok(()) };
        process.signal(signal);
        process.wait(Duration::from_secs(10)).map(drop)
    }

    /// Sends a signal to a node's agent and leaves it alone. Returns `None` if it was never started.
    pub fn signal_agent(&self, node: &FleetNode, signal: i32) -> Option<()> {
        lock(&node.agent).as_ref().map(|process| process.signal(signal))
    }

    pub fn agent_id(&self, node: &FleetNode) -> Option<u32> {
        lock(&node.agent).as_ref().map(Process::id)
    }

    /// Everything a node's agent has logged.
    pub fn agent_log(&self, node: &FleetNode) -> String {
        let path = self.lab.directory().join(format!("agent-{}.log", node.net.name));
        fs::read_to_string(path).unwrap_or_default()
    }

    /// Status of a node's ProxyStatus object.
    ///
    /// # Errors
    /// The object or its status is missing.
    pub fn row(&self, node: &str) -> Result<ProxyStatusStatus> {
        let row: Option<ProxyStatus> = self.kube().get_cluster(node)?;
        row.with_context(|| format!("no ProxyStatus {node}"))?.status.context("the ProxyStatus has no status")
    }

    /// File of the token of a node's agent.
    pub fn token_file(&self, node: &FleetNode) -> PathBuf {
        node.directory.join("token")
    }

    /// Directory in which a node's agent finds `ca.crt` and `controllers`.
    pub fn bootstrap_directory(&self, node: &FleetNode) -> PathBuf {
        node.directory.join("bootstrap")
    }

    /// Applies the Node object of a node.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn register(&self, node: &FleetNode) -> Result<()> {
        self.kube().apply(&objects::node(&node.net, &node.zone)).map(drop)
    }

    /// Writes the controller's ConfigMap to files, as a kubelet mounts it.
    ///
    /// # Errors
    /// The controller does not write it, or a file cannot be written.
    pub fn write_bootstrap(&self, node: &FleetNode) -> Result<()> {
        let directory = node.directory.join("bootstrap");
        fs::create_dir_all(&directory)?;
        self.write_bootstrap_to(&directory)
    }

    /// The same, to a directory.
    ///
    /// # Errors
    /// As [`Fleet::write_bootstrap`].
    pub fn write_bootstrap_to(&self, directory: &std::path::Path) -> Result<()> {
        let data = wait::until("the controller writes its ConfigMap", Duration::from_secs(20), || {
            self.check_controllers()?;
            let map: Option<ConfigMap> = self.kube().get(NAMESPACE, "switchtower-bootstrap")?;
            map.context("the ConfigMap switchtower-bootstrap does not exist")?.data.context("it is empty")
        })?;
        for (name, text) in data {
            fs::write(directory.join(name), text)?;
        }
        Ok(())
    }

    fn controller_kubeconfig(&self, replica: usize) -> Result<PathBuf> {
        let token = self.token("switchtower-controller", None, &[], TOKEN_SECONDS)?;
        let admin: serde_json::Value = serde_json::from_slice(&fs::read(self.control_plane.kubeconfig())?)?;
        let mut config = admin;
        config["users"] = json!([{"name": "admin", "user": {"token": token}}]);
        let linked = self.links.as_ref().map(|links| format!("https://{}", links.api_server(replica)));
        if let Some(server) = lock(&self.api_server).clone().or(linked) {
            config["clusters"][0]["cluster"]["server"] = json!(server);
        }
        let path = self.lab.directory().join(format!("controller-{replica}.kubeconfig"));
        fs::write(&path, config.to_string())?;
        Ok(path)
    }
}

fn build_network(specs: &[NodeSpec]) -> Result<(Lab, Vec<FleetNode>)> {
    let lab = Lab::create()?;
    let mut nodes: Vec<FleetNode> = Vec::new();
    for (index, spec) in (1..).zip(specs) {
        let others: Vec<_> = nodes.iter().map(|node| &node.net).collect();
        let net = lab.add_node(&spec.name, index, &others)?;
        let pods: Result<Vec<_>> =
            (1..).zip(&spec.pods).map(|(index, name)| lab.add_pod(&net, name, index)).collect();
        let directory = lab.directory().join(format!("node-{}", spec.name));
        let zone = spec.zone.clone();
        nodes.push(FleetNode { net, zone, pods: pods?, agent: Mutex::new(None), directory });
    }
    Ok((lab, nodes))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn free_address() -> Result<SocketAddr> {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).context("finding a free port")?;
    Ok(listener.local_addr()?)
}
