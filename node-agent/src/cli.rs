//! The command line. Every flag has an environment twin.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Holds this node's view of all Services and commits it to nftables.
///
/// Exit codes: 0 after SIGTERM, 1 if the agent could not start, 2 for a wrong command line.
#[derive(Debug, Parser)]
#[command(name = "switchtower-node-agent", version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// What to do instead of running the agent.
    #[command(subcommand)]
    pub command: Option<Action>,
    /// The agent's settings.
    #[command(flatten)]
    pub agent: AgentArgs,
    /// Format of the log.
    #[arg(long, global = true, env = "SWITCHTOWER_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Level or filter of the log, for example `info` or `switchtower_node_agent=debug`.
    #[arg(long, global = true, env = "SWITCHTOWER_LOG_LEVEL", default_value = "info")]
    pub log_level: String,
}

/// Settings of the agent.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// The Node's name; must be the one in the token.
    #[arg(long, env = "SWITCHTOWER_NODE_NAME")]
    pub node_name: Option<String>,
    /// Another name for the Node than --node-name, as kube-proxy has it.
    #[arg(long, env = "SWITCHTOWER_HOSTNAME_OVERRIDE")]
    pub hostname_override: Option<String>,
    /// Controllers, https://HOST:PORT, several separated by commas.
    #[arg(long, env = "SWITCHTOWER_CONTROLLER", value_delimiter = ',')]
    pub controller: Vec<String>,
    /// Token file; read anew for every connection.
    #[arg(long, env = "SWITCHTOWER_TOKEN_FILE", default_value = "/var/run/secrets/tokens/switchtower")]
    pub token_file: PathBuf,
    /// The controller's CA (PEM; one, or two during rotation). Default: ca.crt in --bootstrap-dir.
    #[arg(long, env = "SWITCHTOWER_CA_FILE")]
    pub ca_file: Option<PathBuf>,
    /// Directory with `ca.crt` and `controllers` (host:port per line), as the ConfigMap switchtower-bootstrap.
    #[arg(long, env = "SWITCHTOWER_BOOTSTRAP_DIR")]
    pub bootstrap_dir: Option<PathBuf>,
    /// Where the view and the controllers' addresses are kept across restarts.
    #[arg(long, env = "SWITCHTOWER_STATE_DIR", default_value = "/var/lib/switchtower")]
    pub state_dir: PathBuf,
    /// Hours after which a view on disk that no agent has had in force is not programmed any more; 0: never.
    #[arg(long, env = "SWITCHTOWER_SNAPSHOT_MAX_AGE_HOURS", default_value_t = 24)]
    pub snapshot_max_age_hours: u32,
    /// Addresses of /metrics and /proxyMode, several separated by commas; IPv6 with or without brackets.
    #[arg(
        long,
        env = "SWITCHTOWER_METRICS_BIND_ADDRESS",
        value_delimiter = ',',
        value_parser = address_and_port,
        default_value = "127.0.0.1:10249"
    )]
    pub metrics_bind_address: Vec<SocketAddr>,
    /// Address of /healthz and /livez; `[::]` is both families, and IPv4 alone where there is no IPv6.
    #[arg(
        long,
        env = "SWITCHTOWER_HEALTHZ_BIND_ADDRESS",
        value_parser = address_and_port,
        default_value = "[::]:10256"
    )]
    pub healthz_bind_address: SocketAddr,
}

impl AgentArgs {
    /// The age from which on a view on disk is not programmed; `None`: there is no limit.
    #[must_use]
    pub fn snapshot_limit(&self) -> Option<Duration> {
        let hours = u64::from(self.snapshot_max_age_hours);
        (hours > 0).then(|| Duration::from_secs(hours * 3600))
    }
}

/// `ADDRESS:PORT`. IPv6 needs no brackets: a manifest that is the same on all nodes cannot know the family. What
/// stands behind the last colon is the port.
fn address_and_port(text: &str) -> Result<SocketAddr, String> {
    let without_brackets = || {
        let (address, port) = text.rsplit_once(':')?;
        Some(SocketAddr::new(address.parse().ok()?, port.parse().ok()?))
    };
    let parsed = text.parse().ok().or_else(without_brackets);
    parsed.ok_or_else(|| {
        "an IP address and a port are expected, as 192.0.2.1:10249 or [2001:db8::1]:10249".to_owned()
    })
}

/// Other things that the binary does.
#[derive(Debug, Subcommand)]
pub enum Action {
    /// Deletes the agent's nftables tables of this network namespace and its state files; without the tables Services do
    /// not work on this node. Fails while an agent is running.
    Cleanup {
        /// Where the agent kept its files.
        #[arg(long, env = "SWITCHTOWER_STATE_DIR", default_value = "/var/lib/switchtower")]
        state_dir: PathBuf,
        /// Wait for SIGTERM afterwards: a DaemonSet's containers must not end.
        #[arg(long)]
        stay: bool,
        /// Only say what would be removed.
        #[arg(long)]
        dry_run: bool,
    },
    /// Sets the kernel's connection tracking as kube-proxy does; for a privileged init container.
    Sysctl {
        /// nf_conntrack_max per core; 0 leaves it alone.
        #[arg(long, env = "SWITCHTOWER_CONNTRACK_MAX_PER_CORE", default_value_t = 32_768)]
        max_per_core: u32,
        /// Least nf_conntrack_max.
        #[arg(long, env = "SWITCHTOWER_CONNTRACK_MIN", default_value_t = 131_072)]
        min: u32,
        /// Seconds an established TCP flow may be idle; 0 leaves it alone.
        #[arg(long, env = "SWITCHTOWER_CONNTRACK_TCP_TIMEOUT_ESTABLISHED", default_value_t = 86_400)]
        tcp_timeout_established: u64,
        /// Seconds a TCP flow stays in CLOSE_WAIT; 0 leaves it alone.
        #[arg(long, env = "SWITCHTOWER_CONNTRACK_TCP_TIMEOUT_CLOSE_WAIT", default_value_t = 3_600)]
        tcp_timeout_close_wait: u64,
    },
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_both_families_may_come_without_brackets() {
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
    fn the_command_line_parses() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
        let cli = Cli::parse_from(["agent", "--node-name", "n", "--controller", "https://a:1,https://b:2"]);
        assert_eq!(cli.agent.controller, ["https://a:1", "https://b:2"]);
        let cli = Cli::parse_from(["agent", "cleanup", "--dry-run"]);
        assert!(matches!(cli.command, Some(Action::Cleanup { dry_run: true, stay: false, .. })));
    }
}
