//! The command line.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Says what the service proxy of every node does, why, and what to do about it.
///
/// Exit codes: 0 all is well, 1 something is wrong and was named, 2 it cannot be told (wrong usage, no connection,
/// a missing right).
#[derive(Debug, Parser)]
#[command(name = "kubectl-switchtower", bin_name = "kubectl switchtower", version)]
pub struct Cli {
    /// Flags of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags of every command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Kubeconfig file; by default KUBECONFIG or ~/.kube/config, as kubectl.
    #[arg(long, global = true, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig.
    #[arg(long, global = true, value_name = "NAME")]
    pub context: Option<String>,
    /// Namespace of Services and pods; by default the context's.
    #[arg(short, long, global = true, value_name = "NAME")]
    pub namespace: Option<String>,
    /// Namespace in which Switchtower is installed.
    #[arg(long, global = true, default_value = "switchtower-system", value_name = "NAME")]
    pub system_namespace: String,
    /// Where the controller's admin API is, if it can be reached directly; by default through a port-forward to its
    /// pod.
    #[arg(long, global = true, env = "SWITCHTOWER_ADMIN_CONTROLLER", value_name = "HOST:PORT")]
    pub controller: Option<String>,
    /// How to print.
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Text)]
    pub output: Format,
    /// Colours; NO_COLOR turns them off too.
    #[arg(long, global = true, value_enum, default_value_t = Color::Auto)]
    pub color: Color,
}

/// Form of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// For programs.
    Json,
    /// For programs.
    Yaml,
}

/// When colours are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Color {
    /// On a terminal.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// The whole fleet on one screen, the worst first.
    #[command(
        after_help = "Examples:\n  kubectl switchtower status\n  kubectl switchtower status --all -o json"
    )]
    Status(StatusArgs),
    /// Why a Service's packets go where they go, or what a message code means.
    #[command(
        after_help = "Examples:\n  kubectl switchtower explain shop/cart:http\n  kubectl switchtower explain shop/cart --node alpha --from pod/shop/client\n  kubectl switchtower explain ST0203"
    )]
    Explain(ExplainArgs),
    /// What the controller wants on a node, what its agent acknowledged, and what its kernel holds.
    Diff(DiffArgs),
    /// A node's chains and map elements, read from its kernel.
    #[command(
        after_help = "Examples:\n  kubectl switchtower rules alpha shop/cart\n  kubectl switchtower rules alpha --filter 10.96.0.10"
    )]
    Rules(RulesArgs),
    /// How long a Service's last changes took to reach the nodes, stage by stage.
    Trace(TraceArgs),
    /// Waits until every connected node holds a change.
    #[command(
        after_help = "Examples:\n  kubectl switchtower wait shop/cart --timeout 20s\n  kubectl switchtower wait --percent 95"
    )]
    Wait(WaitArgs),
    /// Rollouts of settings.
    Rollout(RolloutArgs),
    /// Checks a cluster before Switchtower is installed, or after.
    #[command(
        after_help = "Examples:\n  kubectl switchtower check --pre\n  kubectl switchtower check --post"
    )]
    Check(CheckArgs),
    /// The catalogue of message codes.
    Codes(CodesArgs),
    /// Prints a completion script. `kubectl switchtower` itself is completed by kubectl, if the file
    /// kubectl_complete-switchtower is in PATH.
    Completion(CompletionArgs),
    /// Completes a command line for kubectl.
    #[command(name = "__complete", hide = true, disable_help_flag = true)]
    Complete(CompleteArgs),
}

/// Flags of `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Also list nodes that are in order.
    #[arg(long)]
    pub all: bool,
}

/// Flags of `explain`.
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// `[svc/][NAMESPACE/]NAME[:PORT]`, or a code such as ST0202.
    pub subject: String,
    /// On this node, checked against its kernel; by default all nodes, without asking their kernels.
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
    /// From this pod: pod/[NAMESPACE/]NAME. Without --node, on the pod's node.
    #[arg(long, value_name = "POD", conflicts_with = "from_ip")]
    pub from: Option<String>,
    /// From this address.
    #[arg(long, value_name = "ADDRESS")]
    pub from_ip: Option<IpAddr>,
    /// Print every address and kind of source, not only what differs from the ordinary.
    #[arg(long)]
    pub all: bool,
}

/// Flags of `diff`.
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// The node.
    pub node: String,
}

/// Flags of `rules`.
#[derive(Debug, Args)]
pub struct RulesArgs {
    /// The node.
    pub node: String,
    /// `[svc/][NAMESPACE/]NAME[:PORT]`: only what the kernel does with this Service's packets
    #[arg(conflicts_with_all = ["filter", "limit"])]
    pub service: Option<String>,
    /// Only elements whose line contains this: an address, a set's name.
    #[arg(long, default_value = "", value_name = "TEXT")]
    pub filter: String,
    /// Most elements, 1 to 100000.
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub limit: u32,
}

/// Flags of `trace`.
#[derive(Debug, Args)]
pub struct TraceArgs {
    /// `[svc/][NAMESPACE/]NAME`
    pub service: String,
    /// How many of its last changes, 1 to 100.
    #[arg(long, default_value_t = 1, num_args = 0..=1, default_missing_value = "1",
        value_parser = clap::value_parser!(u8).range(1..=100), value_name = "NUMBER")]
    pub last: u8,
}

/// Flags of `wait`.
#[derive(Debug, Args)]
pub struct WaitArgs {
    /// `[svc/][NAMESPACE/]NAME`: its last change and that of its endpoints. By default everything so far.
    pub service: Option<String>,
    /// What to wait for.
    #[arg(long = "for", value_enum, default_value_t = WaitFor::Change)]
    pub wait_for: WaitFor,
    /// How long, as in 30s or 2m.
    #[arg(long, default_value = "30s", value_parser = duration, value_name = "DURATION")]
    pub timeout: Duration,
    /// Percentage of the connected nodes that is enough, 1 to 100.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u8).range(1..=100))]
    pub percent: u8,
}

/// What `wait` waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WaitFor {
    /// The change is in the kernels of all connected nodes.
    Change,
}

/// Flags of `rollout`.
#[derive(Debug, Args)]
pub struct RolloutArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: RolloutAction,
}

/// What can be done with rollouts.
#[derive(Debug, Subcommand)]
pub enum RolloutAction {
    /// Where rollouts stand. Exit code 1 if one failed.
    Status {
        /// The rollout; by default all.
        name: Option<String>,
    },
    /// Touches no further node.
    Pause {
        /// The rollout.
        name: String,
    },
    /// Goes on after a pause.
    Resume {
        /// The rollout.
        name: String,
    },
    /// Approves the step that waits for it.
    Approve {
        /// The rollout.
        name: String,
    },
    /// Ends it and returns its nodes to the stable revision. Final.
    Abort {
        /// The rollout.
        name: String,
    },
}

/// Flags of `check`.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("when").required(true)))]
pub struct CheckArgs {
    /// Before the installation: is anything in the way?
    #[arg(long, group = "when")]
    pub pre: bool,
    /// After the installation: does everything work together?
    #[arg(long, group = "when")]
    pub post: bool,
}

/// Flags of `codes`.
#[derive(Debug, Args)]
pub struct CodesArgs {
    /// One code; by default all.
    pub code: Option<String>,
    /// As the page docs/codes.md.
    #[arg(long)]
    pub markdown: bool,
}

/// Flags of `completion`.
#[derive(Debug, Args)]
pub struct CompletionArgs {
    /// The shell.
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

/// Words of `__complete`.
#[derive(Debug, Args)]
pub struct CompleteArgs {
    /// What was typed after `kubectl switchtower`; the last one is incomplete.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub words: Vec<String>,
}

/// `500ms`, `30s`, `2m`, `1h`.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let wrong = || format!("{text:?} is no duration: write 500ms, 30s, 2m or 1h");
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let milliseconds = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(wrong()),
    };
    number.checked_mul(milliseconds).map(Duration::from_millis).ok_or_else(wrong)
}

/// A Service as people write it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceName {
    /// `None`: the namespace in force.
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
    /// A port's number or name.
    pub port: Option<String>,
}

impl ServiceName {
    /// Reads `[svc/][NAMESPACE/]NAME[:PORT]`.
    ///
    /// # Errors
    /// It is not of this form; the text says of which it is.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no Service: write [svc/][NAMESPACE/]NAME[:PORT]");
        let (path, port) = match text.split_once(':') {
            Some((path, port)) if !port.is_empty() => (path, Some(port.to_owned())),
            Some(_) => return Err(wrong()),
            None => (text, None),
        };
        let mut parts: Vec<&str> = path.split('/').collect();
        if parts.len() > 1 && ["svc", "service", "services"].contains(&parts[0]) {
            parts.remove(0);
        }
        let word = |part: &&str| {
            !part.is_empty()
                && part.len() <= 63
                && part.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        };
        match parts.as_slice() {
            parts if !parts.iter().all(word) => Err(wrong()),
            [name] => Ok(Self { namespace: None, name: (*name).to_owned(), port }),
            [namespace, name] => {
                Ok(Self { namespace: Some((*namespace).to_owned()), name: (*name).to_owned(), port })
            }
            _ => Err(wrong()),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn services_as_people_write_them() {
        let of = |namespace: Option<&str>, name: &str, port: Option<&str>| ServiceName {
            namespace: namespace.map(str::to_owned),
            name: name.to_owned(),
            port: port.map(str::to_owned),
        };
        let cases = [
            ("cart", of(None, "cart", None)),
            ("svc/cart:80", of(None, "cart", Some("80"))),
            ("shop/cart", of(Some("shop"), "cart", None)),
            ("service/shop/cart:http", of(Some("shop"), "cart", Some("http"))),
        ];
        for (text, wanted) in cases {
            assert_eq!(ServiceName::parse(text), Ok(wanted), "{text}");
        }
        for text in ["", "svc/", "a/b/c", "Cart", "cart:", "svc/shop/cart/80", "shop//cart"] {
            assert!(ServiceName::parse(text).unwrap_err().contains("[NAMESPACE/]NAME[:PORT]"), "{text}");
        }
    }

    #[test]
    fn durations() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        for text in ["", "2", "s", "2 m", "-1s", "1.5s", "99999999999999999999s"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
