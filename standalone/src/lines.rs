//! The command lines of both parts.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Parser as _, ValueEnum as _};
use switchtower_controller::cli::{Cli as Controller, ServeArgs};
use switchtower_controller::run::WITHOUT_KUBE;
use switchtower_node_agent::cli::Cli as Agent;

use crate::cli::StandaloneArgs;

/// Directory of the CA and the token, readable by the owner only.
pub(crate) fn secrets(args: &StandaloneArgs) -> PathBuf {
    args.state_dir.join("standalone")
}

/// File of the agent's token.
pub(crate) fn token_file(args: &StandaloneArgs) -> PathBuf {
    secrets(args).join("token")
}

/// Settings of the controller, which serves this selection of Nodes.
///
/// # Errors
/// A flag of `--controller-arg` is invalid.
pub(crate) fn controller(args: &StandaloneArgs, selector: Option<&str>) -> anyhow::Result<ServeArgs> {
    let port = args.port;
    let mut line = vec![
        "switchtower-controller".to_owned(),
        format!("--listen=127.0.0.1:{port}"),
        format!("--advertise=127.0.0.1:{port}"),
        format!("--tls-dir={}", secrets(args).display()),
        "--no-bootstrap".to_owned(),
        format!("--namespace={}", args.namespace),
        format!("--replica=standalone-{}", args.node_name),
    ];
    line.extend(args.kubeconfig.iter().map(|path| format!("--kubeconfig={}", path.display())));
    line.extend(selector.map(|selector| format!("--node-selector={selector}")));
    line.extend(args.controller_arg.iter().cloned());
    let parsed = Controller::try_parse_from(line).context("--controller-arg")?;
    anyhow::ensure!(parsed.command.is_none(), "--controller-arg accepts flags, not subcommands");
    Ok(parsed.serve)
}

/// Command line of the agent.
///
/// # Errors
/// A flag of `--agent-arg` is invalid.
pub(crate) fn agent(args: &StandaloneArgs) -> anyhow::Result<Agent> {
    let format = args.log_format.to_possible_value();
    let mut line = vec![
        "switchtower-node-agent".to_owned(),
        format!("--node-name={}", args.node_name),
        format!("--controller=https://127.0.0.1:{}", args.port),
        format!("--ca-file={}", secrets(args).join("ca.crt").display()),
        format!("--token-file={}", token_file(args).display()),
        format!("--state-dir={}", args.state_dir.display()),
        format!("--log-level={WITHOUT_KUBE},{}", args.log_level),
        format!("--log-format={}", format.as_ref().map_or("text", |format| format.get_name())),
    ];
    line.extend(args.agent_arg.iter().cloned());
    let parsed = Agent::try_parse_from(line).context("--agent-arg")?;
    anyhow::ensure!(!parsed.is_subcommand(), "--agent-arg accepts flags, not subcommands");
    Ok(parsed)
}

#[cfg(test)]
mod tests {
    use crate::cli::{Cli, Command};

    use super::*;

    fn args(more: &[&str]) -> StandaloneArgs {
        let line = ["switchtower-controller", "standalone", "--node-name=edge-1"];
        match Cli::parse_from(line.iter().chain(more)).command {
            Some(Command::Standalone(args)) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn controller_listens_on_loopback_and_publishes_nothing() {
        let serve = controller(&args(&["--port=9543"]), Some("a=b")).unwrap();
        assert_eq!(serve.listen, "127.0.0.1:9543".parse().unwrap());
        assert_eq!(serve.advertise, ["127.0.0.1:9543"]);
        assert!(serve.no_bootstrap);
        assert_eq!(serve.node_selector, "a=b");
        assert_eq!(serve.tls_dir, Some("/var/lib/switchtower/standalone".into()));
    }

    #[test]
    fn additional_flags_reach_their_part() {
        let args = args(&[
            "--controller-arg=--metrics-listen=127.0.0.1:9545",
            "--agent-arg=--snapshot-max-age-hours=0",
        ]);
        assert_eq!(controller(&args, None).unwrap().metrics_listen, "127.0.0.1:9545".parse().unwrap());
        agent(&args).unwrap();
    }

    #[test]
    fn invalid_additional_flags_name_their_option() {
        let wrong = |more: &str| args(&[more]);
        for (text, option) in
            [("--agent-arg=--no-such-flag", "--agent-arg"), ("--agent-arg=cleanup", "--agent-arg")]
        {
            assert!(format!("{:#}", agent(&wrong(text)).unwrap_err()).contains(option));
        }
        let error = controller(&wrong("--controller-arg=--no-such-flag"), None).unwrap_err();
        assert!(format!("{error:#}").contains("--controller-arg"));
    }
}
