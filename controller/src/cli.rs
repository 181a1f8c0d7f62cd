//! The command line. Every flag has an environment variable: `SWITCHTOWER_` and the name of the flag in capitals.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

mod limits;

pub use limits::LimitArgs;

/// Programs Kubernetes Services on every node through node agents and reports the state of each kernel in ProxyStatus.
#[derive(Debug, Parser)]
#[command(name = "switchtower-controller", version, args_conflicts_with_subcommands = true)]
pub struct CommandLine<C: Subcommand> {
    /// Subcommand; without one the controller runs.
    #[command(subcommand)]
    pub command: Option<C>,
    /// Settings of the controller.
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// The command line with the controller's own subcommands.
pub type Cli = CommandLine<Command>;

/// Subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Compile manifests offline, without a cluster, and print the view of one node.
    ///
    /// Exit codes: 0 success, 1 the manifests cannot be read or do not contain the node.
    Render(RenderArgs),
    /// Print the ProxyProfile that is equivalent to a configuration of kube-proxy, without a cluster.
    ///
    /// Comments in the output list the fields without counterpart. Exit codes: 0 success, 1 the configuration is invalid.
    ImportConfig(ImportConfigArgs),
}

/// Flags of `import-config`.
#[derive(Debug, Clone, Args)]
pub struct ImportConfigArgs {
    /// File with a KubeProxyConfiguration, or with the ConfigMap that contains it; - for standard input.
    #[arg(value_name = "FILE|-")]
    pub file: PathBuf,
    /// Name of the ProxyProfile.
    #[arg(long, value_name = "NAME", default_value = "kube-proxy")]
    pub name: String,
}

/// Mode of nodes without a ProxyProfile.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum BuiltinMode {
    /// The rules translate connections.
    #[default]
    Active,
    /// The rules are loaded without effect.
    Shadow,
}

/// Flags of the controller. Exit codes: 0 stopped by a signal, 1 startup failed, 2 invalid usage.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// Kubeconfig file. Default: the ServiceAccount of the Pod, KUBECONFIG, or ~/.kube/config.
    #[arg(long, env = "SWITCHTOWER_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Address and port for agents (TLS). IPv6 addresses need no brackets.
    #[arg(
        long,
        env = "SWITCHTOWER_LISTEN",
        default_value = "0.0.0.0:9443",
        value_parser = address_and_port,
        value_name = "ADDRESS"
    )]
    pub listen: SocketAddr,
    /// host:port under which agents reach this controller, once per address; by default the address from
    /// which it reaches the API server, and the port of --listen.
    #[arg(long, env = "SWITCHTOWER_ADVERTISE", value_delimiter = ',', value_name = "HOST:PORT")]
    pub advertise: Vec<String>,
    /// Namespace of the agents' ServiceAccount, the CA Secret and the bootstrap ConfigMap.
    #[arg(long, env = "SWITCHTOWER_NAMESPACE", default_value = "switchtower-system", value_name = "NAME")]
    pub namespace: String,
    /// Directory of ca.crt and ca.key, which are generated if missing, and read again every minute. Replaces the Secret
    /// switchtower-ca.
    #[arg(long, env = "SWITCHTOWER_TLS_DIR", value_name = "DIR")]
    pub tls_dir: Option<PathBuf>,
    /// Leave the ConfigMap switchtower-bootstrap as it is: for a controller whose agents get its address and CA by other
    /// means.
    #[arg(long, env = "SWITCHTOWER_NO_BOOTSTRAP")]
    pub no_bootstrap: bool,
    /// ServiceAccount whose tokens identify agents.
    #[arg(
        long,
        env = "SWITCHTOWER_AGENT_SERVICE_ACCOUNT",
        default_value = "switchtower-node-agent",
        value_name = "NAME"
    )]
    pub agent_service_account: String,
    /// Audience of the agents' tokens.
    #[arg(long, env = "SWITCHTOWER_AUDIENCE", default_value = "switchtower", value_name = "NAME")]
    pub audience: String,
    /// Mode in the built-in settings, if this start creates them. Shadow: nodes keep their service proxy until a
    /// ProxyProfile sets mode Active.
    #[arg(long, env = "SWITCHTOWER_BUILTIN_MODE", value_enum, default_value_t = BuiltinMode::Active)]
    pub builtin_mode: BuiltinMode,
    /// Label selector of the Nodes that are served and have a ProxyStatus. The default also selects Nodes without the
    /// label.
    #[arg(
        long,
        env = "SWITCHTOWER_NODE_SELECTOR",
        default_value = "kubernetes.io/os!=windows",
        value_name = "SELECTOR"
    )]
    pub node_selector: String,
    /// Address and port of /metrics, /livez, /healthz and /readyz (plain HTTP).
    #[arg(
        long,
        env = "SWITCHTOWER_METRICS_LISTEN",
        default_value = "127.0.0.1:9445",
        value_parser = address_and_port,
        value_name = "ADDRESS"
    )]
    pub metrics_listen: SocketAddr,
    /// Address and port of the admin API for kubectl switchtower (TLS, with a token). Keep it on loopback: kubectl uses
    /// port-forward.
    #[arg(
        long,
        env = "SWITCHTOWER_ADMIN_LISTEN",
        default_value = "127.0.0.1:9444",
        value_parser = address_and_port,
        value_name = "ADDRESS"
    )]
    pub admin_listen: SocketAddr,
    /// Name of this replica in ProxyStatus. Default: the name of the host.
    #[arg(long, env = "SWITCHTOWER_REPLICA", value_name = "NAME")]
    pub replica: Option<String>,
    /// Log level or filter, for example `debug` or `info,switchtower_controller::rollout=debug`. RUST_LOG overrides it.
    #[arg(long, env = "SWITCHTOWER_LOG_LEVEL", default_value = "info", value_parser = log_filter)]
    pub log_level: String,
    /// Seconds without a renewal after which a replica counts as gone, and another one becomes the leader. All replicas serve
    /// agents; the leader also writes what concerns the whole cluster.
    #[arg(
        long,
        env = "SWITCHTOWER_LEASE_SECONDS",
        default_value_t = 10,
        value_parser = clap::value_parser!(u8).range(3..=60),
        value_name = "SECONDS"
    )]
    pub lease_seconds: u8,
    /// Seconds for which a new CA is published before it signs, and for which the previous one is trusted afterwards. Longer
    /// than kubelets need to deliver a ConfigMap to all nodes.
    #[arg(
        long,
        env = "SWITCHTOWER_CA_ROTATION_SECONDS",
        default_value_t = 600,
        value_parser = clap::value_parser!(u32).range(5..=604_800),
        value_name = "SECONDS"
    )]
    pub ca_rotation_seconds: u32,
    /// Log format.
    #[arg(long, env = "SWITCHTOWER_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Bounds of Services.
    #[command(flatten)]
    pub limits: LimitArgs,
}

impl ServeArgs {
    /// Time for which a new CA is published before it signs.
    #[must_use]
    pub fn ca_rotation_delay(&self) -> Duration {
        Duration::from_secs(self.ca_rotation_seconds.into())
    }

    /// Time without a renewal after which a Lease expires: that of the leader, and that of each replica.
    #[must_use]
    pub fn lease_duration(&self) -> Duration {
        Duration::from_secs(self.lease_seconds.into())
    }
}

/// Parses `ADDRESS:PORT`, with the port after the last colon. IPv6 needs no brackets: a manifest with `$(HOST_IP):9443`
/// cannot know the family.
fn address_and_port(text: &str) -> Result<SocketAddr, String> {
    let without_brackets = || {
        let (address, port) = text.rsplit_once(':')?;
        Some(SocketAddr::new(address.parse().ok()?, port.parse().ok()?))
    };
    let parsed = text.parse().ok().or_else(without_brackets);
    parsed.ok_or_else(|| {
        "expected an IP address and a port, such as 192.0.2.1:9443 or [2001:db8::1]:9443".to_owned()
    })
}

/// Validates a log filter.
fn log_filter(text: &str) -> Result<String, String> {
    match tracing_subscriber::EnvFilter::try_new(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(format!("{error}; use a level such as debug, or TARGET=LEVEL,...")),
    }
}

/// Flags of `render`.
#[derive(Debug, Args)]
pub struct RenderArgs {
    /// Directory, file, or - for standard input, with Services, EndpointSlices, Nodes and ServiceCIDRs in YAML or JSON.
    /// Lists are supported; other kinds are ignored.
    #[arg(long, value_name = "DIR|FILE|-")]
    pub from: PathBuf,
    /// Name of the node to print.
    #[arg(long, value_name = "NAME")]
    pub node: String,
    /// Output format.
    #[arg(long, value_enum, default_value_t = RenderFormat::Text)]
    pub format: RenderFormat,
}

/// Output of `render`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RenderFormat {
    /// Text.
    Text,
    /// JSON.
    Json,
}

/// Format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Text.
    Text,
    /// One JSON object per line.
    Json,
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser as _};

    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_flag_has_an_environment_variable() {
        for argument in Cli::command().get_arguments() {
            let Some(flag) = argument.get_long().filter(|flag| !matches!(*flag, "help" | "version")) else {
                continue;
            };
            let expected = format!("SWITCHTOWER_{}", flag.replace('-', "_").to_uppercase());
            let actual = argument.get_env().and_then(|name| name.to_str());
            assert_eq!(actual, Some(expected.as_str()), "--{flag}");
        }
    }

    #[test]
    fn listening_on_ipv6_needs_no_brackets() {
        for flag in ["--listen", "--metrics-listen", "--admin-listen"] {
            for text in ["fd18::66:9443", "[fd18::66]:9443"] {
                let cli = Cli::parse_from(["switchtower-controller", flag, text]);
                let serve = cli.serve;
                let parsed = [serve.listen, serve.metrics_listen, serve.admin_listen];
                assert!(parsed.contains(&"[fd18::66]:9443".parse().unwrap()), "{flag} {text}: {parsed:?}");
            }
            for bad in ["9443", "host:9443", "192.0.2.1:", "fd18::66"] {
                assert!(Cli::try_parse_from(["switchtower-controller", flag, bad]).is_err(), "{flag} {bad}");
            }
        }
    }

    #[test]
    fn render_needs_no_flag_of_the_controller() {
        let cli = Cli::parse_from(["switchtower-controller", "render", "--from", "-", "--node", "n1"]);
        assert!(matches!(cli.command, Some(Command::Render(_))));
    }
}
