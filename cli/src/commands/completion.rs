//! `completion`: shell completion scripts, and the protocol by which kubectl completes plugins.

use std::time::Duration;

use clap::{Arg, Command, CommandFactory as _};

use crate::args::{Cli, CompleteArgs, CompletionArgs, Global};
use crate::cluster::Cluster;
use crate::output::Report;

/// Timeout for reading names from the cluster. Short, because completion is interactive.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Directive for kubectl (cobra's ShellCompDirectiveNoFileComp): do not complete file names.
const NO_FILES: &str = ":4";

pub(crate) fn run(args: &CompletionArgs) -> Report {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "kubectl-switchtower", &mut script);
    Report::text(String::from_utf8_lossy(&script).into_owned())
}

/// Prints the candidates for the last argument, one per line with a description, followed by a directive, as cobra does.
pub(crate) async fn complete(global: &Global, args: &CompleteArgs) -> Report {
    let place = place(&args.words);
    let mut lines = place.words;
    if let Some(names) = place.names
        && let Ok(Some(names)) = tokio::time::timeout(TIMEOUT, names_of(global, names)).await
    {
        lines.extend(names.into_iter().filter(|name| name.starts_with(&place.prefix)));
    }
    lines.push(NO_FILES.to_owned());
    Report::text(lines.join("\n") + "\n")
}

/// Kinds of names that are read from the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Names {
    Nodes,
    Rollouts,
}

/// Candidates for the last argument.
#[derive(Debug, Default, PartialEq, Eq)]
struct Place {
    prefix: String,
    words: Vec<String>,
    names: Option<Names>,
}

async fn names_of(global: &Global, names: Names) -> Option<Vec<String>> {
    let cluster = Cluster::new(global).await.ok()?;
    Some(match names {
        Names::Nodes => {
            let rows = cluster.rows().await.ok()?;
            rows.into_iter().filter_map(|row| row.metadata.name).collect()
        }
        Names::Rollouts => {
            let rollouts = cluster.rollouts().await.ok()?;
            rollouts.into_iter().filter_map(|rollout| rollout.metadata.name).collect()
        }
    })
}

fn place(words: &[String]) -> Place {
    let mut root = Cli::command();
    root.build();
    let (prefix, before) = words.split_last().map_or(("", words), |(last, before)| (&**last, before));
    let mut command = &root;
    let (mut waiting, mut positionals): (Option<&Arg>, usize) = (None, 0);
    for word in before {
        if waiting.take().is_some() {
            continue; // This is the value of the preceding flag.
        }
        if let Some(flag) = word.strip_prefix("--") {
            waiting = command
                .get_arguments()
                .find(|known| known.get_long() == Some(flag) && known.get_action().takes_values());
        } else if let Some(letter) = word.strip_prefix('-').and_then(|rest| rest.chars().next()) {
            let flag = command.get_arguments().find(|known| known.get_short() == Some(letter));
            waiting = flag.filter(|known| known.get_action().takes_values() && word.len() == 2);
        } else if let Some(next) = command.find_subcommand(word) {
            command = next;
        } else {
            positionals += 1;
        }
    }
    let argument = waiting.or_else(|| command.get_positionals().nth(positionals));
    let mut lines = Vec::new();
    if waiting.is_none() && prefix.starts_with('-') {
        lines.extend(command.get_arguments().filter(|known| !known.is_hide_set()).filter_map(flag));
    } else {
        let subcommands = command.get_subcommands().filter(|known| waiting.is_none() && !known.is_hide_set());
        lines.extend(subcommands.map(|known| described(known.get_name(), known.get_about())));
        let values = argument.into_iter().flat_map(Arg::get_possible_values);
        lines.extend(values.map(|value| described(value.get_name(), value.get_help())));
    }
    lines.retain(|line| line.starts_with(prefix));
    Place { prefix: prefix.to_owned(), words: lines, names: argument.and_then(|known| names(command, known)) }
}

fn names(command: &Command, argument: &Arg) -> Option<Names> {
    match (command.get_name(), argument.get_id().as_str()) {
        (_, "node") => Some(Names::Nodes),
        ("status" | "pause" | "resume" | "approve" | "abort", "name") => Some(Names::Rollouts),
        _ => None,
    }
}

fn flag(argument: &Arg) -> Option<String> {
    let name = argument.get_long()?;
    Some(described(&format!("--{name}"), argument.get_help()))
}

/// Formats a value with its description, separated by a tab.
fn described(value: &str, about: Option<&clap::builder::StyledStr>) -> String {
    match about.map(ToString::to_string).as_deref().and_then(|about| about.lines().next()) {
        Some(about) => format!("{value}\t{about}"),
        None => value.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(words: &[&str]) -> (Vec<String>, Option<Names>) {
        let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
        let Place { words, names, .. } = place(&words);
        let value = |line: String| line.split('\t').next().unwrap_or_default().to_owned();
        (words.into_iter().map(value).collect(), names)
    }

    #[test]
    fn commands_flags_and_values_are_completed() {
        let (commands, _) = values(&[""]);
        for command in ["status", "explain", "rollout"] {
            assert!(commands.contains(&command.to_owned()), "{commands:?}");
        }
        assert!(!commands.iter().any(|command| command.starts_with("__")), "{commands:?}");
        assert_eq!(values(&["exp"]).0, ["explain"]);
        assert_eq!(values(&["check", "--p"]).0, ["--pre", "--post"]);
        assert_eq!(values(&["status", "-o", "j"]).0, ["json"]);
        assert_eq!(values(&["status", "--color", "ne"]).0, ["never"]);
        assert!(values(&["rollout", ""]).0.contains(&"abort".to_owned()));
    }

    #[test]
    fn names_are_read_from_the_cluster() {
        assert_eq!(values(&["diff", ""]).1, Some(Names::Nodes));
        assert_eq!(values(&["explain", "shop/cart", "--node", "al"]).1, Some(Names::Nodes));
        assert_eq!(values(&["rollout", "abort", ""]).1, Some(Names::Rollouts));
        assert_eq!(values(&["-n", "shop", "rules", ""]).1, Some(Names::Nodes));
        assert_eq!(values(&["explain", ""]).1, None);
    }
}
