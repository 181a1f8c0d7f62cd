//! Changes by kubectl, each printed as a command line before it runs.

use std::ffi::OsString;
use std::io::Write as _;
use std::process::Stdio;

use serde_json::Value;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use crate::args::{Format, Global};
use crate::error::CliError;
use crate::output::announce;

/// Runs kubectl with the cluster of the command line.
#[derive(Debug)]
pub(super) struct Kubectl {
    cluster: Vec<OsString>,
    format: Format,
}

impl Kubectl {
    pub(super) fn new(global: &Global) -> Self {
        Self { cluster: global.kubectl_flags(), format: global.output }
    }

    /// Prints a line about the progress: to standard output, or to standard error with JSON and YAML.
    pub(super) fn progress(&self, line: &str) {
        if self.format == Format::Text {
            announce(line);
        } else {
            // A closed pipe is not an error.
            let _ = writeln!(std::io::stderr().lock(), "{line}");
        }
    }

    /// Runs one command.
    pub(super) async fn run(&self, arguments: &[&str]) -> Result<(), CliError> {
        self.progress(&format!("$ kubectl {}", quoted(arguments)));
        self.execute(arguments, None).await
    }

    /// Runs one command with an object on standard input.
    pub(super) async fn run_with(&self, arguments: &[&str], object: &Value) -> Result<(), CliError> {
        self.progress(&format!("$ kubectl {} -f - <<'EOF'\n{object}\nEOF", quoted(arguments)));
        self.execute(&[arguments, &["-f", "-"]].concat(), Some(object.to_string())).await
    }

    async fn execute(&self, arguments: &[&str], input: Option<String>) -> Result<(), CliError> {
        let mut command = Command::new("kubectl");
        command.args(&self.cluster).args(arguments).kill_on_drop(true);
        command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let failed =
            |error: std::io::Error| CliError::new(format!("cannot run kubectl: {error}; add it to PATH"));
        let mut child = command.spawn().map_err(failed)?;
        if let (Some(text), Some(mut pipe)) = (input, child.stdin.take()) {
            // If kubectl exits early, its own error is reported.
            let _ = pipe.write_all(text.as_bytes()).await;
        }
        let output = child.wait_with_output().await.map_err(failed)?;
        if output.status.success() {
            return Ok(());
        }
        let errors = String::from_utf8_lossy(&output.stderr);
        Err(CliError::new(format!("kubectl {} failed: {}", arguments.first().unwrap_or(&""), errors.trim())))
    }
}

/// Quotes arguments for a shell.
fn quoted(arguments: &[&str]) -> String {
    let plain =
        |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_./=:,@".contains(&byte));
    let quote = |text: &&str| {
        if !text.is_empty() && plain(text) {
            (*text).to_owned()
        } else {
            format!("'{}'", text.replace('\'', r"'\''"))
        }
    };
    arguments.iter().map(quote).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn printed_command_can_be_pasted() {
        assert_eq!(quoted(&["label", "node", "a", "x/y=z"]), "label node a x/y=z");
        assert_eq!(quoted(&["-p", r#"{"a":"it's"}"#, ""]), r#"-p '{"a":"it'\''s"}' ''"#);
    }
}
