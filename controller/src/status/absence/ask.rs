//! Queries agents that run and are not connected for the reason.
//!
//! Sends a plain HTTP request to the agent's health port, as load balancers and the kubelet do. The answer is not
//! authenticated: it is only displayed, and nothing else depends on it.

use std::net::SocketAddr;
use std::time::Duration;

use futures::StreamExt as _;
use serde::Deserialize;
use switchtower_admin_api::NodeReason;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::pod::{bounded, condition_reason};
use super::{Agents, Blocker};

/// Maximum number of concurrent requests.
const CONCURRENCY: usize = 16;
/// Interval between rounds.
const INTERVAL: Duration = Duration::from_secs(5);
/// Timeout of a request.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum length of an answer, in bytes.
const LENGTH_LIMIT: u64 = 8 << 10;

/// Answer of an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The agent's connection status.
    Status(Connection),
    /// The request failed or the answer is not valid; the error.
    Failed(String),
}

/// The body of `/connection`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Connection {
    /// The agent has a stream to a controller, possibly another one.
    pub connected: bool,
    /// CamelCase reason why it has none.
    #[serde(default)]
    pub reason: String,
    /// Description of the reason.
    #[serde(default)]
    pub detail: String,
}

impl Answer {
    /// Returns the blocker in the answer. `last_exit` describes the exit of the Pod's previous container.
    #[must_use]
    pub fn blocker(&self, pod: &str, last_exit: Option<&str>) -> Option<Blocker> {
        let before = last_exit.map(|exit| format!("; {exit}")).unwrap_or_default();
        match self {
            Self::Status(Connection { connected: true, .. }) => None,
            Self::Status(Connection { reason, detail, .. }) => Some(Blocker {
                reason: condition_reason(reason),
                message: format!("Pod {pod} is running; its agent reports: {}{before}", bounded(detail)),
            }),
            Self::Failed(error) => Some(Blocker::new(
                NodeReason::AgentNotAnswering,
                format!("Pod {pod} is running; its agent does not answer: {}{before}", bounded(error)),
            )),
        }
    }
}

/// Queries missing agents in rounds.
pub async fn run(agents: Agents) {
    loop {
        let round = agents.to_ask().await;
        futures::stream::iter(round)
            .for_each_concurrent(CONCURRENCY, |(node, address)| {
                let agents = &agents;
                async move { agents.answered(&node, ask(address).await) }
            })
            .await;
        tokio::time::sleep(INTERVAL).await;
    }
}

async fn ask(address: SocketAddr) -> Answer {
    let asked = tokio::time::timeout(TIMEOUT, get(address)).await;
    let text = match asked {
        Ok(Ok(text)) => text,
        Ok(Err(error)) => return Answer::Failed(format!("http://{address}/connection: {error}")),
        Err(_) => {
            return Answer::Failed(format!(
                "http://{address}/connection: no answer within {} s",
                TIMEOUT.as_secs()
            ));
        }
    };
    let body = text.split_once("\r\n\r\n").map(|(_, body)| body).unwrap_or_default();
    match serde_json::from_str(body) {
        Ok(connection) => Answer::Status(connection),
        Err(_) => {
            let status = text.lines().next().unwrap_or_default();
            Answer::Failed(format!("http://{address}/connection: unexpected answer {status:?}"))
        }
    }
}

/// Sends an HTTP/1.0 request: the end of the connection ends the answer.
async fn get(address: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET /connection HTTP/1.0\r\nHost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut bytes = Vec::new();
    stream.take(LENGTH_LIMIT).read_to_end(&mut bytes).await?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
