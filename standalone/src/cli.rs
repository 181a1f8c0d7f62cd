//! The command line: that of the controller, and `standalone`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use switchtower_controller::cli::{Command as ControllerCommand, CommandLine, LogFormat};

/// The command line of the program.
pub type Cli = CommandLine<Command>;

/// Subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// A subcommand of the controller.
    #[command(flatten)]
    Controller(ControllerCommand),
    /// Run controller and agent of one node in this process: for clusters of one node, and to repair a node while no
    /// other controller can run.
    ///
    /// Needs NET_ADMIN, and permission to create tokens of the agents' ServiceAccount.
    Standalone(StandaloneArgs),
}

/// Flags of `standalone`. Exit codes: 0 stopped by a signal, 1 startup failed, 2 invalid usage.
#[derive(Debug, Clone, Args)]
pub struct StandaloneArgs {
    /// Name of the Node.
    #[arg(long, env = "SWITCHTOWER_NODE_NAME", value_name = "NAME")]
    pub node_name: String,
    /// Kubeconfig file. Default: the ServiceAccount of the Pod, KUBECONFIG, or ~/.kube/config.
    #[arg(long, env = "SWITCHTOWER_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Namespace of the agents' ServiceAccount and of the Lease.
    #[arg(long, env = "SWITCHTOWER_NAMESPACE", default_value = "switchtower-system", value_name = "NAME")]
    pub namespace: String,
    /// State directory of the agent. Its subdirectory `standalone` contains the CA and the token.
    #[arg(long, env = "SWITCHTOWER_STATE_DIR", default_value = "/var/lib/switchtower", value_name = "DIR")]
    pub state_dir: PathBuf,
    /// Port on 127.0.0.1 between agent and controller.
    #[arg(long, env = "SWITCHTOWER_STANDALONE_PORT", default_value_t = 9443, value_name = "PORT")]
    pub port: u16,
    /// Additional flag of the controller, for example --controller-arg=--metrics-listen=127.0.0.1:9545. Repeatable.
    #[arg(long, allow_hyphen_values = true, value_name = "FLAG")]
    pub controller_arg: Vec<String>,
    /// Additional flag of the agent, for example --agent-arg=--healthz-bind-address=127.0.0.1:10256. Repeatable.
    #[arg(long, allow_hyphen_values = true, value_name = "FLAG")]
    pub agent_arg: Vec<String>,
    /// Log level or filter, for example `debug` or `info,switchtower_controller::rollout=debug`.
    #[arg(long, env = "SWITCHTOWER_LOG_LEVEL", default_value = "info", value_name = "LEVEL")]
    pub log_level: String,
    /// Log format.
    #[arg(long, env = "SWITCHTOWER_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
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
    fn controller_and_its_subcommands_keep_their_flags() {
        let cli = Cli::parse_from(["switchtower-controller", "--listen", "192.0.2.1:9443"]);
        assert!(cli.command.is_none() && cli.serve.listen == "192.0.2.1:9443".parse().unwrap());
        let cli = Cli::parse_from(["switchtower-controller", "render", "--from", "-", "--node", "n1"]);
        assert!(matches!(cli.command, Some(Command::Controller(ControllerCommand::Render(_)))));
    }

    #[test]
    fn standalone_requires_the_name_of_the_node() {
        assert!(Cli::try_parse_from(["switchtower-controller", "standalone"]).is_err());
        let cli = Cli::parse_from(["switchtower-controller", "standalone", "--node-name", "edge-1"]);
        assert!(matches!(cli.command, Some(Command::Standalone(args)) if args.node_name == "edge-1"));
    }
}
