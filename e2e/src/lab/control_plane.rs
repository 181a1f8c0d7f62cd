//! A Kubernetes control plane on loopback: the real etcd, kube-apiserver and kube-controller-manager, on free ports,
//! with their own certificates and directory.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use kube::config::{KubeConfigOptions, Kubeconfig};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

use crate::lab::api::Kube;
use crate::lab::cleanup::{self, PREFIX, Registered, Resource};
use crate::lab::process::Process;
use crate::lab::programs;
use crate::lab::wait;

/// ClusterIP ranges of both families.
pub const SERVICE_CIDRS: &str = "10.96.0.0/16,fd96::/112";
/// Issuer of ServiceAccount tokens, and audience of the API server.
pub const ISSUER: &str = "https://kubernetes.default.svc";

/// A running control plane, which ends on drop.
#[derive(Debug)]
pub struct ControlPlane {
    kube: Kube,
    directory: PathBuf,
    // Drop order: the API server before etcd, the directory last.
    controller_manager: Process,
    api_server: Mutex<Arc<Process>>,
    etcd: Process,
    ports: Ports,
    address: SocketAddr,
    _registered: Registered,
}

#[derive(Debug)]
struct Ports {
    etcd_client: u16,
    etcd_peer: u16,
    api_server: u16,
    controller_manager: u16,
}

impl ControlPlane {
    /// Starts a control plane and waits until the API server is ready and the namespace `default` has its
    /// ServiceAccount. Takes about five seconds.
    ///
    /// # Errors
    /// A program is missing or does not become ready; the message contains the end of its log.
    pub fn start() -> Result<Self> {
        drop(rustls::crypto::ring::default_provider().install_default());
        cleanup::sweep();
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("{PREFIX}{}-control-{count}", cleanup::run_id()));
        let registered = cleanup::register(Resource::Directory(directory.clone()));
        fs::create_dir_all(&directory).with_context(|| format!("creating {}", directory.display()))?;
        let [etcd_client, etcd_peer, api_server, controller_manager] = free_ports()?;
        let ports = Ports { etcd_client, etcd_peer, api_server, controller_manager };
        write_credentials(&directory, ports.api_server)?;

        let address = (Ipv4Addr::LOCALHOST, ports.api_server).into();
        let etcd = start_etcd(&directory, &ports)?;
        let api_server = start_api_server(&directory, &ports)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let runtime = Arc::new(runtime);
        let kubeconfig = Kubeconfig::read_from(directory.join("kubeconfig"))?;
        let options = KubeConfigOptions::default();
        let config = runtime.block_on(kube::Config::from_custom_kubeconfig(kubeconfig, &options))?;
        let kube = Kube::new(config, runtime)?;
        wait_for_api_server(&kube, &etcd, &api_server)?;
        // Not earlier: kube-controller-manager exits if the API server takes longer than its own start-up timeout.
        let controller_manager = start_controller_manager(&directory, &ports)?;
        let control_plane = Self {
            kube,
            directory,
            controller_manager,
            api_server: Mutex::new(Arc::new(api_server)),
            etcd,
            ports,
            address,
            _registered: registered,
        };
        control_plane.wait_until_ready()?;
        Ok(control_plane)
    }

    /// Client with administrator rights.
    pub fn kube(&self) -> &Kube {
        &self.kube
    }

    /// Loopback address of the API server.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Kubeconfig with administrator rights.
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.join("kubeconfig")
    }

    /// Directory of everything that belongs to this control plane, including logs.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Key that signs ServiceAccount tokens (PKCS #8, ECDSA P-256), for tokens that the API would not issue.
    pub fn service_account_key(&self) -> PathBuf {
        self.directory.join("service-account.key")
    }

    /// Process of the API server, for tests that stop and continue it.
    pub fn api_server(&self) -> Arc<Process> {
        self.api_server.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Kills the API server and starts it again, with an empty watch cache.
    ///
    /// # Errors
    /// It does not become ready.
    pub fn restart_api_server(&self) -> Result<()> {
        self.api_server().kill();
        let started = Arc::new(start_api_server(&self.directory, &self.ports)?);
        *self.api_server.lock().unwrap_or_else(PoisonError::into_inner) = started.clone();
        wait_for_api_server(&self.kube, &self.etcd, &started)
    }

    /// Runs kubectl and returns its output.
    ///
    /// # Errors
    /// It failed; the message contains its standard error.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(programs::control_plane("kubectl")?);
        command.arg("--kubeconfig").arg(self.kubeconfig()).args(arguments);
        command.env("HOME", &self.directory);
        let output = command.output().context("starting kubectl")?;
        let errors = String::from_utf8_lossy(&output.stderr);
        anyhow::ensure!(output.status.success(), "kubectl {}: {}", arguments.join(" "), errors.trim());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn wait_until_ready(&self) -> Result<()> {
        until_ready("the ServiceAccount default/default exists", &[&self.controller_manager], || {
            let account: Option<k8s_openapi::api::core::v1::ServiceAccount> =
                self.kube.get("default", "default")?;
            account.context("kube-controller-manager has not created it").map(drop)
        })
    }
}

fn wait_for_api_server(kube: &Kube, etcd: &Process, api_server: &Process) -> Result<()> {
    // The log of the last process explains a failure.
    until_ready("the API server is ready", &[etcd, api_server], || kube.ready())
}

/// Waits up to a minute for `ready`; fails immediately when one of `processes` exits.
fn until_ready(what: &str, processes: &[&Process], mut ready: impl FnMut() -> Result<()>) -> Result<()> {
    let result = wait::until(what, Duration::from_secs(60), || {
        match processes.iter().try_for_each(|process| process.check_running()) {
            Err(exited) => Ok(Err(exited)),
            Ok(()) => ready().map(Ok),
        }
    });
    result.and_then(|outcome| outcome).with_context(|| {
        let log =
            processes.last().map(|process| crate::lab::process::tail(process.log(), 10)).unwrap_or_default();
        format!("the control plane did not become ready; the last log ends:\n{log}")
    })
}

fn free_ports<const N: usize>() -> Result<[u16; N]> {
    // All are bound at the same time, so that they differ.
    let mut listeners = Vec::new();
    let mut ports = [0; N];
    for port in &mut ports {
        let listener = TcpListener::bind(("127.0.0.1", 0)).context("finding a free port on 127.0.0.1")?;
        *port = listener.local_addr()?.port();
        listeners.push(listener);
    }
    Ok(ports)
}

fn write_credentials(directory: &Path, port: u16) -> Result<()> {
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.distinguished_name.push(DnType::CommonName, "laboratory");
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
    let key = KeyPair::generate()?;
    let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    let certificate = CertificateParams::new(names)?.signed_by(&key, &authority)?;
    let token: String = (0..4).map(|_| format!("{:016x}", rand::random::<u64>())).collect();
    let tokens_key = KeyPair::generate()?;
    let kubeconfig = serde_json::json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "laboratory",
        "clusters": [{"name": "laboratory", "cluster": {
            "server": format!("https://127.0.0.1:{port}"),
            "certificate-authority": directory.join("ca.crt"),
        }}],
        "users": [{"name": "admin", "user": {"token": token}}],
        "contexts": [{"name": "laboratory", "context": {"cluster": "laboratory", "user": "admin"}}],
    });
    let files = [
        ("ca.crt", authority.pem()),
        ("api-server.crt", certificate.pem()),
        ("api-server.key", key.serialize_pem()),
        ("service-account.key", tokens_key.serialize_pem()),
        ("service-account.pub", tokens_key.public_key_pem()),
        ("tokens.csv", format!("{token},admin,admin,\"system:masters\"\n")),
        ("kubeconfig", kubeconfig.to_string()),
    ];
    for (name, text) in files {
        fs::write(directory.join(name), text).with_context(|| format!("writing {name}"))?;
    }
    Ok(())
}

fn command(name: &str, flags: &[String]) -> Result<Command> {
    let mut command = Command::new(programs::control_plane(name)?);
    command.args(flags);
    Ok(command)
}

fn start_etcd(directory: &Path, ports: &Ports) -> Result<Process> {
    let (client, peer) = (ports.etcd_client, ports.etcd_peer);
    let flags = [
        format!("--data-dir={}", directory.join("etcd").display()),
        format!("--listen-client-urls=http://127.0.0.1:{client}"),
        format!("--advertise-client-urls=http://127.0.0.1:{client}"),
        format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
        format!("--initial-advertise-peer-urls=http://127.0.0.1:{peer}"),
        format!("--initial-cluster=default=http://127.0.0.1:{peer}"),
        // The data lives only as long as the test.
        "--unsafe-no-fsync".to_owned(),
        "--log-level=warn".to_owned(),
        "--quota-backend-bytes=4294967296".to_owned(),
    ];
    Process::start("etcd", command("etcd", &flags)?, &directory.join("etcd.log"))
}

fn start_api_server(directory: &Path, ports: &Ports) -> Result<Process> {
    let file = |name: &str| directory.join(name).display().to_string();
    let flags = [
        format!("--etcd-servers=http://127.0.0.1:{}", ports.etcd_client),
        "--bind-address=127.0.0.1".to_owned(),
        "--advertise-address=127.0.0.1".to_owned(),
        format!("--secure-port={}", ports.api_server),
        format!("--cert-dir={}", file("certificates")),
        format!("--tls-cert-file={}", file("api-server.crt")),
        format!("--tls-private-key-file={}", file("api-server.key")),
        format!("--service-account-key-file={}", file("service-account.pub")),
        format!("--service-account-signing-key-file={}", file("service-account.key")),
        format!("--service-account-issuer={ISSUER}"),
        format!("--service-cluster-ip-range={SERVICE_CIDRS}"),
        format!("--token-auth-file={}", file("tokens.csv")),
        "--authorization-mode=Node,RBAC".to_owned(),
        // As kubeadm sets it: the DaemonSet of the sysctls and the clean-up of kube-proxy need it.
        "--allow-privileged=true".to_owned(),
        "--endpoint-reconciler-type=none".to_owned(),
        // The laboratory writes thousands of objects in a row; API priority and fairness is not under test.
        "--max-requests-inflight=2000".to_owned(),
        "--max-mutating-requests-inflight=1000".to_owned(),
    ];
    Process::start(
        "kube-apiserver",
        command("kube-apiserver", &flags)?,
        &directory.join("kube-apiserver.log"),
    )
}

fn start_controller_manager(directory: &Path, ports: &Ports) -> Result<Process> {
    let file = |name: &str| directory.join(name).display().to_string();
    let flags = [
        format!("--kubeconfig={}", file("kubeconfig")),
        "--bind-address=127.0.0.1".to_owned(),
        format!("--secure-port={}", ports.controller_manager),
        format!("--cert-dir={}", file("certificates-controller-manager")),
        format!("--service-account-private-key-file={}", file("service-account.key")),
        format!("--root-ca-file={}", file("ca.crt")),
        "--leader-elect=false".to_owned(),
        // Nodes have no kubelet here: without heartbeats, their pods and bound tokens would be deleted after minutes.
        "--controllers=*,-node-lifecycle-controller,-taint-eviction-controller".to_owned(),
        "--kube-api-qps=200".to_owned(),
        "--kube-api-burst=400".to_owned(),
    ];
    let log = directory.join("kube-controller-manager.log");
    Process::start("kube-controller-manager", command("kube-controller-manager", &flags)?, &log)
}
