//! Port-forward to the controller pod through `kubectl`, which supports all ways of reaching a cluster (exec plugins,
//! proxies). It ends when [`Forward`] is dropped.

use std::process::Stdio;
use std::time::Duration;

use switchtower_admin_api::codes;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::process::{Child, Command};

use crate::args::Global;
use crate::error::CliError;

/// Port of the admin API in the controller pod.
const PORT: u16 = 9444;
/// Timeout for kubectl to start listening.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(15);

/// A running `kubectl port-forward`.
#[derive(Debug)]
pub(crate) struct Forward {
    pub(crate) address: String,
    _kubectl: Child,
}

impl Forward {
    /// Starts the port-forward and waits until it listens.
    pub(crate) async fn open(global: &Global, namespace: &str, pod: &str) -> Result<Self, CliError> {
        let mut command = Command::new("kubectl");
        command.args(global.kubectl_flags());
        command.args(["--namespace", namespace, "port-forward", &format!("pod/{pod}"), &format!(":{PORT}")]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().map_err(|error| {
            CliError::new(format!(
                "cannot start kubectl for a port-forward to the controller: {error}; add kubectl to PATH or set \
                 --controller"
            ))
        })?;
        let (Some(out), Some(mut errors)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(CliError::new("kubectl has no output"));
        };
        let mut lines = BufReader::new(out).lines();
        let listening = async {
            while let Ok(Some(line)) = lines.next_line().await {
                if let Some(address) = local_address(&line) {
                    return Some(address);
                }
            }
            None
        };
        if let Ok(Some(address)) = tokio::time::timeout(LISTEN_TIMEOUT, listening).await {
            // Keep reading: kubectl prints a line per connection and exits on a broken pipe.
            tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
            tokio::spawn(async move { tokio::io::copy(&mut errors, &mut tokio::io::sink()).await });
            return Ok(Self { address, _kubectl: child });
        }
        let _ = child.start_kill();
        let mut text = String::new();
        let _ = tokio::time::timeout(Duration::from_secs(1), errors.read_to_string(&mut text)).await;
        let message = format!("cannot forward a port to pod {namespace}/{pod}: {}", text.trim());
        Err(CliError::coded(codes::CONTROLLER_UNREACHABLE, message))
    }
}

/// Parses `Forwarding from 127.0.0.1:41233 -> 9444`.
fn local_address(line: &str) -> Option<String> {
    let (address, _) = line.strip_prefix("Forwarding from ")?.split_once(" -> ")?;
    Some(address.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_is_read_from_kubectl_output() {
        let line = "Forwarding from 127.0.0.1:41233 -> 9444";
        assert_eq!(local_address(line).as_deref(), Some("127.0.0.1:41233"));
        assert_eq!(local_address("Forwarding from [::1]:41233 -> 9444").as_deref(), Some("[::1]:41233"));
        assert_eq!(local_address("Handling connection for 41233"), None);
    }
}
