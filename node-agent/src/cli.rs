//! Command line. Every flag of the agent has an environment variable.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use switchtower_proto::v1::ProxyMode;

/// Programs Services on this node: receives its view from a controller and commits it to nftables.
///
/// Exit codes: 0 after SIGTERM, 1 if the agent cannot start, 2 for an invalid command line.
#[derive(Debug, Parser)]
#[command(name = "switchtower-node-agent", version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// Command to run instead of the agent.
    #[command(subcommand)]
    pub(crate) command: Option<Action>,
    /// Settings of the agent.
    #[command(flatten)]
    pub(crate) agent: AgentArgs,
    /// Log format.
    #[arg(long, global = true, env = "SWITCHTOWER_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
    /// Log level or filter, for example `info` or `switchtower_node_agent=debug`.
    #[arg(long, global = true, env = "SWITCHTOWER_LOG_LEVEL", default_value = "info")]
    pub log_level: String,
}

/// Settings of the agent.
#[derive(Debug, Args)]
pub(crate) struct AgentArgs {
    /// Name of the Node; must match the token.
    #[arg(long, env = "SWITCHTOWER_NODE_NAME")]
    pub node_name: Option<String>,
    /// Name of the Node if it differs from --node-name, as in kube-proxy.
    #[arg(long, env = "SWITCHTOWER_HOSTNAME_OVERRIDE")]
    pub(crate) hostname_override: Option<String>,
    /// Comma-separated controllers as https://HOST:PORT.
    #[arg(long, env = "SWITCHTOWER_CONTROLLER", value_delimiter = ',')]
    pub controller: Vec<String>,
    /// Token file; read again for every connection.
    #[arg(long, env = "SWITCHTOWER_TOKEN_FILE", default_value = "/var/run/secrets/tokens/switchtower")]
    pub token_file: PathBuf,
    /// CA of the controller (PEM; one certificate, or two during a rotation). Default: ca.crt in --bootstrap-dir.
    #[arg(long, env = "SWITCHTOWER_CA_FILE")]
    pub(crate) ca_file: Option<PathBuf>,
    /// Directory with `ca.crt` and `controllers` (one host:port per line): the ConfigMap switchtower-bootstrap.
    #[arg(long, env = "SWITCHTOWER_BOOTSTRAP_DIR")]
    pub(crate) bootstrap_dir: Option<PathBuf>,
    /// Directory that keeps the view and the addresses of controllers across restarts.
    #[arg(long, env = "SWITCHTOWER_STATE_DIR", default_value = "/var/lib/switchtower")]
    pub(crate) state_dir: PathBuf,
    /// Maximum age in hours of a view on disk that is programmed at start, counted from the last time an agent held it;
    /// 0: no limit.
    #[arg(long, env = "SWITCHTOWER_SNAPSHOT_MAX_AGE_HOURS", default_value_t = 24)]
    pub(crate) snapshot_max_age_hours: u32,
    /// Comma-separated addresses of /metrics and /proxyMode; IPv6 with or without brackets.
    #[arg(
        long,
        env = "SWITCHTOWER_METRICS_BIND_ADDRESS",
        value_delimiter = ',',
        value_parser = address_and_port,
        default_value = "127.0.0.1:10249"
    )]
    pub(crate) metrics_bind_address: Vec<SocketAddr>,
    /// Address of /healthz and /livez; `[::]` listens on both families, or on IPv4 only on a node without IPv6.
    #[arg(
        long,
        env = "SWITCHTOWER_HEALTHZ_BIND_ADDRESS",
        value_parser = address_and_port,
        default_value = "[::]:10256"
    )]
    pub(crate) healthz_bind_address: SocketAddr,
    /// Address of /livez, /readyz and /connection for the kubelet, in every mode.
    #[arg(
        long,
        env = "SWITCHTOWER_PROBE_BIND_ADDRESS",
        value_parser = address_and_port,
        default_value = "127.0.0.1:9446"
    )]
    pub(crate) probe_bind_address: SocketAddr,
    /// Mode until settings are known, from a controller or the state directory. In mode Shadow, ports 10249 and 10256
    /// stay closed.
    #[arg(long, env = "SWITCHTOWER_INITIAL_MODE", value_enum, default_value_t = Mode::Active)]
    pub(crate) initial_mode: Mode,
}

impl Cli {
    /// Returns whether this is a command other than the agent itself.
    #[must_use]
    pub fn is_subcommand(&self) -> bool {
        self.command.is_some()
    }
}

impl AgentArgs {
    /// Maximum age of a view on disk that is programmed at start; `None`: no limit.
    #[must_use]
    pub(crate) fn snapshot_limit(&self) -> Option<Duration> {
        let hours = u64::from(self.snapshot_max_age_hours);
        (hours > 0).then(|| Duration::from_secs(hours * 3600))
    }
}

/// Parses `ADDRESS:PORT`; the port follows the last colon. IPv6 needs no brackets, because a manifest that is the same
/// on all nodes cannot know the family.
fn address_and_port(text: &str) -> Result<SocketAddr, String> {
    let without_brackets = || {
        let (address, port) = text.rsplit_once(':')?;
        Some(SocketAddr::new(address.parse().ok()?, port.parse().ok()?))
    };
    let parsed = text.parse().ok().or_else(without_brackets);
    parsed.ok_or_else(|| {
        "expected an IP address and a port, for example 192.0.2.1:10249 or [2001:db8::1]:10249".to_owned()
    })
}

/// Commands other than the agent itself.
#[derive(Debug, Subcommand)]
pub(crate) enum Action {
    /// Delete the agent's nftables tables in this network namespace, and its state files. Services stop working on this
    /// node. Fails while an agent is running.
    Cleanup {
        /// State directory of the agent.
        #[arg(long, env = "SWITCHTOWER_STATE_DIR", default_value = "/var/lib/switchtower")]
        state_dir: PathBuf,
        /// Wait for SIGTERM afterwards: containers of a DaemonSet must not exit.
        #[arg(long)]
        stay: bool,
        /// Only print what would be removed.
        #[arg(long)]
        dry_run: bool,
    },
    /// Set the kernel's connection tracking as kube-proxy does; for a privileged init container.
    Sysctl {
        /// nf_conntrack_max per core; 0 keeps the current value.
        #[arg(long, env = "SWITCHTOWER_CONNTRACK_MAX_PER_CORE", default_value_t = 32_768)]
        max_per_core: u32,
        /// Minimum of nf_conntrack_max.
        #[arg(long, env = "SWITCHTOWER_CONNTRACK_MIN", default_value_t = 131_072)]
        min: u32,
        /// Timeout of an idle established TCP flow in seconds; 0 keeps the current value.
        #[arg(long, env = "SWITCHTOWER_CONNTRACK_TCP_TIMEOUT_ESTABLISHED", default_value_t = 86_400)]
        tcp_timeout_established: u64,
        /// Timeout of a TCP flow in CLOSE_WAIT in seconds; 0 keeps the current value.
        #[arg(long, env = "SWITCHTOWER_CONNTRACK_TCP_TIMEOUT_CLOSE_WAIT", default_value_t = 3_600)]
        tcp_timeout_close_wait: u64,
    },
}

/// Mode of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// The rules translate connections.
    Active,
    /// Another service proxy serves the node.
    Shadow,
}

impl From<Mode> for ProxyMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Active => Self::Active,
            Mode::Shadow => Self::Shadow,
        }
    }
}

/// Format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// Human-readable lines.
    Text,
    /// One JSON object per line.
    Json,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_parse_without_brackets() {
        for (text, address) in [
            ("192.0.2.1:10249", "192.0.2.1:10249"),
            ("[fd00::1]:10249", "[fd00::1]:10249"),
            ("fd00::1:10249", "[fd00::1]:10249"),
            ("fd00:1:2:3:4:5:6:7:80", "[fd00:1:2:3:4:5:6:7]:80"),
            ("::1:10249", "[::1]:10249"),
        ] {
            assert_eq!(address_and_port(text), Ok(address.parse().unwrap()), "{text}");
        }
        for text in ["", "192.0.2.1", "fd00::1", ":10249", "node:10249", "[fd00::1]", "fd00::1:65536"] {
            assert!(address_and_port(text).is_err(), "{text}");
        }
    }

    #[test]
    fn command_line_parses() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
        let cli = Cli::parse_from(["agent", "--node-name", "n", "--controller", "https://a:1,https://b:2"]);
        assert_eq!(cli.agent.controller, ["https://a:1", "https://b:2"]);
        let cli = Cli::parse_from(["agent", "cleanup", "--dry-run"]);
        assert!(matches!(cli.command, Some(Action::Cleanup { dry_run: true, stay: false, .. })));
    }
}
