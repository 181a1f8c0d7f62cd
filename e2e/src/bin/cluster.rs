//! `cluster`: a real Kubernetes cluster on this machine, with kubelets and containers.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};
use switchtower_e2e::cluster::interrupt::{self, Then};
use switchtower_e2e::cluster::{
    Layout, Tools, conformance, demo, down, faults, helm, install, installed, machine, migrate, plugin,
    rolling_update, shell, uninstall, up,
};

#[derive(Parser)]
#[command(about, version)]
struct Arguments {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Starts the cluster and prints its KUBECONFIG
    Up {
        #[command(flatten)]
        place: Place,
        /// Number of nodes with a kubelet; upstream's topology tests require three
        #[arg(long, default_value_t = 3, env = "SWITCHTOWER_CLUSTER_NODES", value_parser = clap::value_parser!(u8).range(1..=99))]
        nodes: u8,
        #[command(flatten)]
        programs: Programs,
        /// The service proxy to start with
        #[arg(long, value_enum, default_value = "none")]
        proxy: ProxyName,
    },
    /// Installs Switchtower from the manifests, or this build over an installed one
    Install {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        programs: Programs,
    },
    /// Runs a Deployment behind a Service: scales it, empties it, kills an agent
    Demo {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        programs: Programs,
    },
    /// Breaks agents in several ways; each fault must show on its node's ProxyStatus and on no other
    Faults {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        programs: Programs,
    },
    /// Updates a Deployment under load without and with the drain gate, with one agent slow
    Drain {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        programs: Programs,
    },
    /// Checks that the installation matches the manifests
    Installed {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        programs: Programs,
    },
    /// Runs every read-only command of `kubectl switchtower` with only a kubeconfig
    Plugin {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        programs: Programs,
    },
    /// Runs the documented uninstall, checks that nothing remains, and installs again
    Uninstall {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        programs: Programs,
    },
    /// Installs, upgrades, rolls back and uninstalls the Helm charts on a cluster without Switchtower
    Helm {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        programs: Programs,
    },
    /// Migrates from kube-proxy and back under traffic, on a cluster without Switchtower
    Migrate {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        programs: Programs,
        /// Modes of kube-proxy
        #[arg(long, value_enum, value_delimiter = ',', default_value = "nftables,iptables")]
        modes: Vec<KubeProxyMode>,
    },
    /// Runs upstream's e2e tests of Services and prints the report
    Conformance {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        programs: Programs,
        /// Service proxy under test; names the report
        #[arg(long, default_value = "switchtower")]
        label: String,
        /// Part of the suite to run
        #[arg(long, value_enum, default_value = "all")]
        part: conformance::Part,
        /// Regular expression of the tests' names
        #[arg(long)]
        focus: Option<String>,
        /// Number of parallel tests
        #[arg(long, default_value_t = 6)]
        processes: u8,
        /// Folder for the reports
        #[arg(long, default_value = "target/conformance")]
        out: PathBuf,
    },
    /// Removes the cluster, including incomplete ones
    Down {
        #[command(flatten)]
        place: Place,
        /// Exits with the code of an interrupted start
        #[arg(long, hide = true)]
        interrupted: bool,
    },
    /// First process of a machine (started by `up`)
    #[command(hide = true)]
    MachineInit {
        #[arg(long)]
        host_name: String,
        #[arg(long)]
        var: PathBuf,
    },
}

#[derive(Args)]
struct Place {
    /// Prefix of everything the cluster creates
    #[arg(long, default_value = "st", env = "SWITCHTOWER_CLUSTER_NAME", value_parser = short_name)]
    name: String,
    /// Folder for the cluster's state, removed with the cluster
    #[arg(long, default_value = "/var/lib/switchtower-cluster", env = "SWITCHTOWER_CLUSTER_DIR")]
    dir: PathBuf,
}

#[derive(Args)]
struct Programs {
    /// Folder with etcd, kube-apiserver, kube-controller-manager, kube-proxy and kubectl
    #[arg(long, env = "SWITCHTOWER_CONTROL_PLANE")]
    control_plane: PathBuf,
    /// Folder with kubelet, kube-scheduler, coredns, pause and the test image's files
    #[arg(long, env = "SWITCHTOWER_CLUSTER_TOOLS")]
    tools: PathBuf,
    /// Cache of assembled images
    #[arg(long, env = "SWITCHTOWER_CLUSTER_IMAGES")]
    images: PathBuf,
    /// Folder with the manifests that install Switchtower
    #[arg(long, env = "SWITCHTOWER_MANIFESTS", default_value = "manifests")]
    manifests: PathBuf,
    /// Folder with the kubectl plugin [default: folder of this program]
    #[arg(long, env = "SWITCHTOWER_PROGRAMS")]
    switchtower: Option<PathBuf>,
    /// Folder with the OCI archives that hack/images.sh builds
    #[arg(long, env = "SWITCHTOWER_IMAGES", default_value = "target/oci/images")]
    switchtower_images: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum KubeProxyMode {
    Nftables,
    Iptables,
}

impl From<KubeProxyMode> for migrate::Mode {
    fn from(mode: KubeProxyMode) -> Self {
        match mode {
            KubeProxyMode::Nftables => Self::Nftables,
            KubeProxyMode::Iptables => Self::Iptables,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum ProxyName {
    None,
    KubeProxy,
}

/// Validates a cluster name: device names hold 15 bytes, and `-node-99` is appended.
fn short_name(text: &str) -> Result<String, String> {
    let fits = (1..=9).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    if fits { Ok(text.to_owned()) } else { Err("use 1 to 9 lower-case letters and digits".to_owned()) }
}

impl Place {
    fn layout(&self, nodes: u8) -> Layout {
        Layout { dir: self.dir.join(&self.name), name: self.name.clone(), nodes }
    }

    /// Layout of a cluster that an earlier run started.
    fn existing(&self) -> Result<Layout> {
        let mut layout = self.layout(0);
        layout.nodes = up::recorded_nodes(&layout)?;
        Ok(layout)
    }
}

impl Programs {
    fn tools(self) -> Result<Tools> {
        let own = std::env::current_exe().context("finding this program's own path")?;
        let switchtower = self.switchtower.or_else(|| own.parent().map(PathBuf::from)).unwrap_or_default();
        Ok(Tools {
            control_plane: self.control_plane,
            cluster: self.tools,
            images: self.images,
            manifests: self.manifests,
            switchtower,
            switchtower_images: self.switchtower_images,
        })
    }
}

fn main() -> Result<()> {
    let action = Arguments::parse().command;
    match &action {
        // `up` installs the handler once there is something to remove; a removal must not be interrupted; and the
        // first process of a machine outlives its parent.
        Action::Up { .. } | Action::Down { .. } | Action::MachineInit { .. } => {}
        _ => interrupt::watch(Then::Leave)?,
    }
    match action {
        Action::Up { place, nodes, programs, proxy } => {
            let layout = place.layout(nodes);
            let proxy = match proxy {
                ProxyName::None => up::Proxy::None,
                ProxyName::KubeProxy => up::Proxy::KubeProxy,
            };
            up::up(&layout, &programs.tools()?, proxy).with_context(|| {
                format!("the cluster did not start (logs: {}; `down` removes it)", layout.logs().display())
            })?;
            shell::say("ready for kubectl:");
            shell::print(&format!("export KUBECONFIG={}", layout.kubeconfig().display()))
        }
        Action::Install { place, programs } => install::install(&place.existing()?, &programs.tools()?),
        Action::Demo { place, programs } => demo::demo(&place.existing()?, &programs.tools()?),
        Action::Faults { place, programs } => faults::check(&place.existing()?, &programs.tools()?),
        Action::Drain { place, programs } => rolling_update::check(&place.existing()?, &programs.tools()?),
        Action::Installed { place, programs } => installed::check(&place.existing()?, &programs.tools()?),
        Action::Plugin { place, programs } => plugin::check(&place.existing()?, &programs.tools()?),
        Action::Uninstall { place, programs } => uninstall::check(&place.existing()?, &programs.tools()?),
        Action::Helm { place, programs } => helm::check(&place.existing()?, &programs.tools()?),
        Action::Migrate { place, programs, modes } => {
            let modes: Vec<migrate::Mode> = modes.into_iter().map(Into::into).collect();
            migrate::check(&place.existing()?, &programs.tools()?, &modes)
        }
        Action::Conformance { place, programs, label, part, focus, processes, out } => {
            let run = conformance::Run { label, part, focus, processes, out };
            conformance::conformance(&place.existing()?, &programs.tools()?, &run)
        }
        Action::Down { place, interrupted } => {
            down::down(&place.layout(0))?;
            if interrupted {
                std::process::exit(interrupt::EXIT_CODE);
            }
            Ok(())
        }
        Action::MachineInit { host_name, var } => machine::machine_init(&host_name, &var),
    }
}
