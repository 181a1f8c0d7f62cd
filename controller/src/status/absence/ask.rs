//! Asks agents that run and are not connected why that is.
//!
//! A plain HTTP request to the agent's health port, which load balancers and the kubelet ask too. The answer
//! is not authenticated: it is shown to people, and nothing else depends on it.

use std::net::SocketAddr;
use std::time::Duration;

use futures::StreamExt as _;
use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::pod::{bounded, word};
use super::{Agents, Obstacle};

/// Requests under way at once.
const CONCURRENCY: usize = 16;
/// Between two rounds.
const INTERVAL: Duration = Duration::from_secs(5);
/// For one request.
const PATIENCE: Duration = Duration::from_secs(2);
/// Longest answer that is read.
const LENGTH_LIMIT: u64 = 8 << 10;

/// What an agent answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Its word.
    Heard(Connection),
    /// Nothing that could be understood: what went wrong.
    Silent(String),
}

/// The body of `/connection`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Connection {
    /// It has a stream to a controller, maybe another one.
    pub connected: bool,
    /// Why not, in one word.
    #[serde(default)]
    pub reason: String,
    /// For people.
    #[serde(default)]
    pub detail: String,
}

impl Answer {
    /// The obstacle that it names, for the Pod of this name; `last_words` of a container that ended before.
    #[must_use]
    pub fn obstacle(&self, pod: &str, last_words: Option<&str>) -> Option<Obstacle> {
        let before = last_words.map(|words| format!("; {words}")).unwrap_or_default();
        match self {
            Self::Heard(Connection { connected: true, .. }) => None,
            Self::Heard(Connection { reason, detail, .. }) => Some(Obstacle {
                reason: word(reason),
                message: format!("Pod {pod} runs; its agent says: {}{before}", bounded(detail)),
            }),
            Self::Silent(error) => Some(Obstacle::new(
                "AgentNotAnswering",
                format!("Pod {pod} runs; its agent does not answer: {}{before}", bounded(error)),
            )),
        }
    }
}

/// Asks, in rounds, for as long as agents are missing.
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
    let asked = tokio::time::timeout(PATIENCE, get(address)).await;
    let text = match asked {
        Ok(Ok(text)) => text,
        Ok(Err(error)) => return Answer::Silent(format!("http://{address}/connection: {error}")),
        Err(_) => {
            return Answer::Silent(format!(
                "http://{address}/connection: no answer within {} s",
                PATIENCE.as_secs()
            ));
        }
    };
    let body = text.split_once("\r\n\r\n").map(|(_, body)| body).unwrap_or_default();
    match serde_json::from_str(body) {
        Ok(connection) => Answer::Heard(connection),
        Err(_) => {
            let status = text.lines().next().unwrap_or_default();
            Answer::Silent(format!("http://{address}/connection answers {status:?}"))
        }
    }
}

/// HTTP/1.0: the answer ends with the connection.
async fn get(address: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET /connection HTTP/1.0\r\nHost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut bytes = Vec::new();
    stream.take(LENGTH_LIMIT).read_to_end(&mut bytes).await?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
