//! The command line. Every flag has an environment twin, `SWITCHTOWER_` and its name in capitals.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

mod limits;

pub use limits::LimitArgs;

/// Programs Kubernetes Services on every node through thin agents, and shows in ProxyStatus what each
/// kernel holds.
#[derive(Debug, Parser)]
#[command(name = "switchtower-controller", version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// What to do instead of running the controller.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Settings of the controller.
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// Everything but running the controller.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Compile manifests offline, without a cluster, and print what one node would get.
    ///
    /// Exit codes: 0 printed, 1 something could not be read or the node is not among the manifests.
    Render(RenderArgs),
}

/// Flags of the controller. Exit codes: 0 ended by a signal, 1 could not start, 2 wrong usage.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// Kubeconfig file; without it the pod's ServiceAccount, or KUBECONFIG, or ~/.kube/config is used.
    #[arg(long, env = "SWITCHTOWER_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Where agents connect (TLS). IPv6 addresses need no brackets.
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
    /// Namespace of the agents' ServiceAccount, of the CA's Secret and of the bootstrap ConfigMap.
    #[arg(long, env = "SWITCHTOWER_NAMESPACE", default_value = "switchtower-system", value_name = "NAME")]
    pub namespace: String,
    /// Directory with ca.crt and ca.key, created if missing; instead of the Secret switchtower-ca.
    #[arg(long, env = "SWITCHTOWER_TLS_DIR", value_name = "DIR")]
    pub tls_dir: Option<PathBuf>,
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
    /// Label selector of the Nodes that are served and have a ProxyStatus. The default takes Nodes without
    /// the label too.
    #[arg(
        long,
        env = "SWITCHTOWER_NODE_SELECTOR",
        default_value = "kubernetes.io/os!=windows",
        value_name = "SELECTOR"
    )]
    pub node_selector: String,
    /// Where /metrics, /livez, /healthz and /readyz answer (plain HTTP).
    #[arg(
        long,
        env = "SWITCHTOWER_METRICS_LISTEN",
        default_value = "127.0.0.1:9445",
        value_parser = address_and_port,
        value_name = "ADDRESS"
    )]
    pub metrics_listen: SocketAddr,
    /// Where the admin API answers kubectl switchtower (TLS, with a token). Leave it on loopback: kubectl reaches
    /// it by port-forward.
    #[arg(
        long,
        env = "SWITCHTOWER_ADMIN_LISTEN",
        default_value = "127.0.0.1:9444",
        value_parser = address_and_port,
        value_name = "ADDRESS"
    )]
    pub admin_listen: SocketAddr,
    /// This replica's name in ProxyStatus; by default the host's name.
    #[arg(long, env = "SWITCHTOWER_REPLICA", value_name = "NAME")]
    pub replica: Option<String>,
    /// Level or filter of the log, for example `debug` or `info,switchtower_controller::rollout=debug`; RUST_LOG
    /// overrides it.
    #[arg(long, env = "SWITCHTOWER_LOG_LEVEL", default_value = "info", value_parser = log_filter)]
    pub log_level: String,
    /// Seconds without a renewal after which another controller takes over the Lease. Only the controller that holds the
    /// Lease serves agents and writes objects; the others stand by with a synced cache.
    #[arg(
        long,
        env = "SWITCHTOWER_LEASE_SECONDS",
        default_value_t = 10,
        value_parser = clap::value_parser!(u8).range(3..=60),
        value_name = "SECONDS"
    )]
    pub lease_seconds: u8,
    /// How logs are written.
    #[arg(long, env = "SWITCHTOWER_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Bounds of Services.
    #[command(flatten)]
    pub limits: LimitArgs,
}

/// `ADDRESS:PORT`. IPv6 needs no brackets: a manifest with `$(HOST_IP):9443` cannot know the family. What follows the last
/// colon is the port.
fn address_and_port(text: &str) -> Result<SocketAddr, String> {
    let without_brackets = || {
        let (address, port) = text.rsplit_once(':')?;
        Some(SocketAddr::new(address.parse().ok()?, port.parse().ok()?))
    };
    let parsed = text.parse().ok().or_else(without_brackets);
    parsed.ok_or_else(|| {
        "an IP address and a port are expected, such as 192.0.2.1:9443 or [2001:db8::1]:9443".to_owned()
    })
}

/// A filter that can be understood.
fn log_filter(text: &str) -> Result<String, String> {
    match tracing_subscriber::EnvFilter::try_new(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(format!("{error}; write a level such as debug, or TARGET=LEVEL,...")),
    }
}

/// Flags of `render`.
#[derive(Debug, Args)]
pub struct RenderArgs {
    /// Directory, file, or - for standard input, with Services, EndpointSlices, Nodes and ServiceCIDRs in
    /// YAML or JSON; Lists are understood, other kinds are passed over.
    #[arg(long, value_name = "DIR|FILE|-")]
    pub from: PathBuf,
    /// Name of the node to print.
    #[arg(long, value_name = "NAME")]
    pub node: String,
    /// How to print.
    #[arg(long, value_enum, default_value_t = RenderFormat::Text)]
    pub format: RenderFormat,
}

/// Output of `render`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RenderFormat {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// Format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser as _};

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_flag_has_an_environment_twin() {
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
