//! The command line.

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

mod migrate;

pub use migrate::{MigrateAction, MigrateArgs, MigrateBackArgs, MigrateStartArgs, MigrateWaitArgs};

/// Inspect and operate the Switchtower service proxy.
///
/// Exit codes: 0 no problem found, 1 a problem was found and reported, 2 the command could not be completed (usage
/// error, no connection, missing permission).
#[derive(Debug, Parser)]
#[command(name = "kubectl-switchtower", bin_name = "kubectl switchtower", version)]
pub struct Cli {
    /// Global flags.
    #[command(flatten)]
    pub global: Global,
    /// Subcommand.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags that every command accepts.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Path of the kubeconfig file [default: KUBECONFIG or ~/.kube/config]
    #[arg(long, global = true, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Kubeconfig context to use
    #[arg(long, global = true, value_name = "NAME")]
    pub context: Option<String>,
    /// Namespace of Services and pods [default: the namespace of the context]
    #[arg(short, long, global = true, value_name = "NAME")]
    pub namespace: Option<String>,
    /// Namespace in which Switchtower is installed
    #[arg(long, global = true, default_value = "switchtower-system", value_name = "NAME")]
    pub system_namespace: String,
    /// Address of the controller's admin API [default: port-forward to the controller pod]
    #[arg(long, global = true, env = "SWITCHTOWER_ADMIN_CONTROLLER", value_name = "HOST:PORT")]
    pub controller: Option<String>,
    /// Output format
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Text)]
    pub output: Format,
    /// Use of colours; NO_COLOR also disables them
    #[arg(long, global = true, value_enum, default_value_t = Color::Auto)]
    pub color: Color,
}

impl Global {
    /// Returns the flags of kubectl that select the same cluster.
    pub(crate) fn kubectl_flags(&self) -> Vec<OsString> {
        let kubeconfig = self.kubeconfig.iter().flat_map(|path| ["--kubeconfig".into(), path.into()]);
        let context = self.context.iter().flat_map(|name| ["--context".into(), name.into()]);
        kubeconfig.chain(context).collect()
    }
}

/// Output format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Human-readable text.
    Text,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
}

/// Use of colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Color {
    /// Only on a terminal.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// Subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show the state of all nodes, problems first
    #[command(
        after_help = "Examples:\n  kubectl switchtower status\n  kubectl switchtower status --all -o json"
    )]
    Status(StatusArgs),
    /// Explain where a Service's packets go, or what a message code means
    #[command(
        after_help = "Examples:\n  kubectl switchtower explain shop/cart:http\n  kubectl switchtower explain shop/cart --node alpha --from pod/shop/client\n  kubectl switchtower explain ST0203"
    )]
    Explain(ExplainArgs),
    /// Compare a node's desired, acknowledged and programmed state
    Diff(DiffArgs),
    /// Compare kube-proxy's rules on a node with Switchtower's: list Services that they treat differently
    Compare(CompareArgs),
    /// Show chains and map elements read from a node's kernel
    #[command(
        after_help = "Examples:\n  kubectl switchtower rules alpha shop/cart\n  kubectl switchtower rules alpha --filter 10.96.0.10"
    )]
    Rules(RulesArgs),
    /// Show how long a Service's latest changes took to reach the nodes
    Trace(TraceArgs),
    /// Wait until all connected nodes have applied a change
    #[command(
        after_help = "Examples:\n  kubectl switchtower wait shop/cart --timeout 20s\n  kubectl switchtower wait --percent 95\n  \
                      kubectl switchtower wait --endpoint 10.244.1.7 --gone"
    )]
    Wait(WaitArgs),
    /// Show and control rollouts of settings
    Rollout(RolloutArgs),
    /// Release removals that the delete budget of nodes holds
    #[command(
        after_help = "Examples:\n  kubectl switchtower release-held alpha\n  kubectl switchtower release-held --all"
    )]
    ReleaseHeld(ReleaseHeldArgs),
    /// Check the cluster before or after the installation of Switchtower
    #[command(
        after_help = "Examples:\n  kubectl switchtower check --pre\n  kubectl switchtower check --post"
    )]
    Check(CheckArgs),
    /// Replace kube-proxy node by node, or return to it
    ///
    /// Every change is made by kubectl, and its command line is printed.
    #[command(
        after_help = "Examples:\n  kubectl switchtower migrate plan\n  kubectl switchtower migrate start alpha\n  kubectl switchtower migrate back"
    )]
    Migrate(MigrateArgs),
    /// Collect state, metrics and logs in one archive for support, without credentials
    #[command(
        after_help = "Examples:\n  kubectl switchtower bundle --redact-addresses\n  kubectl switchtower bundle --node alpha --file incident.tar.gz"
    )]
    Bundle(BundleArgs),
    /// Serve a page with the live state of fleet, rollouts and Services on loopback
    ///
    /// The page uses the permissions of the kubeconfig. Its address contains a random password.
    #[command(
        after_help = "Examples:\n  kubectl switchtower dashboard\n  kubectl switchtower dashboard --file report.html"
    )]
    Dashboard(DashboardArgs),
    /// List message codes
    Codes(CodesArgs),
    /// Print a shell completion script
    ///
    /// kubectl completes `kubectl switchtower` if the file kubectl_complete-switchtower is in PATH.
    Completion(CompletionArgs),
    /// Complete a command line for kubectl
    #[command(name = "__complete", hide = true, disable_help_flag = true)]
    Complete(CompleteArgs),
}

/// Flags of `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// List healthy nodes too
    #[arg(long)]
    pub all: bool,
}

/// Flags of `explain`.
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// `[svc/][NAMESPACE/]NAME[:PORT]`, or a message code such as ST0202
    pub subject: String,
    /// Explain for this node and compare with its kernel [default: all nodes, without their kernels]
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
    /// Source pod: pod/[NAMESPACE/]NAME. Implies the pod's node if --node is absent
    #[arg(long, value_name = "POD", conflicts_with = "from_ip")]
    pub from: Option<String>,
    /// Source address
    #[arg(long, value_name = "ADDRESS")]
    pub from_ip: Option<IpAddr>,
    /// Print every address and kind of source, not only exceptions
    #[arg(long)]
    pub all: bool,
}

/// Flags of `diff`.
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// Node name
    pub node: String,
}

/// Flags of `compare`.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Node name
    pub node: String,
    /// File with the output of `nft --json list table ip kube-proxy`, `iptables-save` or `ip6tables-save` on the node, or -;
    /// repeat it for several [default: run these in kube-proxy's Pod]
    #[arg(long, value_name = "FILE")]
    pub rules: Vec<PathBuf>,
}

/// Flags of `rules`.
#[derive(Debug, Args)]
pub struct RulesArgs {
    /// Node name
    pub node: String,
    /// `[svc/][NAMESPACE/]NAME[:PORT]`: only the rules for this Service
    #[arg(conflicts_with_all = ["filter", "limit"])]
    pub service: Option<String>,
    /// Only elements whose line contains this text, such as an address or the name of a set
    #[arg(long, default_value = "", value_name = "TEXT")]
    pub filter: String,
    /// Maximum number of elements, 1 to 100000
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub limit: u32,
}

/// Flags of `trace`.
#[derive(Debug, Args)]
pub struct TraceArgs {
    /// `[svc/][NAMESPACE/]NAME`
    pub service: String,
    /// Number of latest changes, 1 to 100
    #[arg(long, default_value_t = 1, num_args = 0..=1, default_missing_value = "1",
        value_parser = clap::value_parser!(u8).range(1..=100), value_name = "NUMBER")]
    pub last: u8,
}

/// Flags of `wait`.
#[derive(Debug, Args)]
pub struct WaitArgs {
    /// `[svc/][NAMESPACE/]NAME`: wait for the latest change of this Service and its endpoints [default: all changes]
    pub service: Option<String>,
    /// Event to wait for
    #[arg(long = "for", value_enum, default_value_t = WaitFor::Change)]
    pub wait_for: WaitFor,
    /// Maximum time to wait, such as 30s or 2m
    #[arg(long, default_value = "30s", value_parser = duration, value_name = "DURATION")]
    pub timeout: Duration,
    /// Percentage of connected nodes that must have applied the change, 1 to 100
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u8).range(1..=100))]
    pub percent: u8,
    /// Address of a pod: wait until no node sends new connections to it; needs --gone
    #[arg(long, value_name = "ADDRESS", requires = "gone", conflicts_with_all = ["service", "percent"])]
    pub endpoint: Option<IpAddr>,
    /// Wait for the removal of --endpoint from all nodes
    #[arg(long, requires = "endpoint")]
    pub gone: bool,
}

/// Event that `wait` waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WaitFor {
    /// The kernels of the connected nodes hold the change.
    Change,
}

/// Flags of `rollout`.
#[derive(Debug, Args)]
pub struct RolloutArgs {
    /// Subcommand.
    #[command(subcommand)]
    pub action: RolloutAction,
}

/// Subcommands of `rollout`.
#[derive(Debug, Subcommand)]
pub enum RolloutAction {
    /// Show the progress of rollouts; exit code 1 if one failed
    Status {
        /// Name of the rollout [default: all]
        name: Option<String>,
    },
    /// Pause a rollout: no further node is updated
    Pause {
        /// Name of the rollout
        name: String,
    },
    /// Resume a paused rollout
    Resume {
        /// Name of the rollout
        name: String,
    },
    /// Approve the step that waits for approval
    Approve {
        /// Name of the rollout
        name: String,
    },
    /// Abort a rollout and return its nodes to the stable revision; cannot be undone
    Abort {
        /// Name of the rollout
        name: String,
    },
}

/// Flags of `release-held`.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("which").required(true)))]
pub struct ReleaseHeldArgs {
    /// Node names
    #[arg(group = "which")]
    pub nodes: Vec<String>,
    /// All nodes
    #[arg(long, group = "which")]
    pub all: bool,
}

/// Flags of `check`.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("when").required(true)))]
pub struct CheckArgs {
    /// Check that Switchtower can be installed
    #[arg(long, group = "when")]
    pub pre: bool,
    /// Check that the installation works
    #[arg(long, group = "when")]
    pub post: bool,
}

/// Flags of `bundle`.
#[derive(Debug, Args)]
pub struct BundleArgs {
    /// File to create [default: switchtower-bundle-TIME.tar.gz]
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Include differences and complete tables of this node; can be repeated
    #[arg(long, value_name = "NAME")]
    pub node: Vec<String>,
    /// Replace IP addresses by names that are the same in all files
    #[arg(long)]
    pub redact_addresses: bool,
    /// Maximum number of lines of each log, 1 to 100000
    #[arg(long, default_value_t = 5_000, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub log_lines: u32,
    /// Maximum total size of the files before compression, in MiB, 1 to 1024
    #[arg(long, default_value_t = 50, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..=1_024))]
    pub max_size: u32,
}

/// Flags of `dashboard`.
#[derive(Debug, Args)]
pub struct DashboardArgs {
    /// Port on 127.0.0.1; 0 selects a free port
    #[arg(long, default_value_t = 0, value_name = "PORT")]
    pub port: u16,
    /// Write the current state as a page to this file instead of serving it
    #[arg(long, value_name = "FILE", conflicts_with = "port")]
    pub file: Option<PathBuf>,
}

/// Flags of `codes`.
#[derive(Debug, Args)]
pub struct CodesArgs {
    /// Message code [default: all]
    pub code: Option<String>,
    /// Print docs/codes.md
    #[arg(long)]
    pub markdown: bool,
}

/// Flags of `completion`.
#[derive(Debug, Args)]
pub struct CompletionArgs {
    /// Shell
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

/// Arguments of `__complete`.
#[derive(Debug, Args)]
pub struct CompleteArgs {
    /// Arguments typed after `kubectl switchtower`; the last one may be incomplete
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub words: Vec<String>,
}

/// Parses a duration such as `500ms`, `30s`, `2m` or `1h`.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let wrong = || format!("{text:?} is not a duration such as 500ms, 30s, 2m or 1h");
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

/// A Service on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceName {
    /// `None` for the current namespace.
    pub namespace: Option<String>,
    /// Name of the Service.
    pub name: String,
    /// Number or name of a port.
    pub port: Option<String>,
}

impl ServiceName {
    /// Parses `[svc/][NAMESPACE/]NAME[:PORT]`.
    ///
    /// # Errors
    /// Returns a message that names the expected form.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a Service: expected [svc/][NAMESPACE/]NAME[:PORT]");
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
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn service_names_parse() {
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
    fn durations_parse() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        for text in ["", "2", "s", "2 m", "-1s", "1.5s", "99999999999999999999s"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
