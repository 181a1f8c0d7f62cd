//! Nodes, agent pods and their tokens, in bulk.

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::{Node, Pod, ServiceAccount};
use kube::api::PostParams;
use kube::{Api, Client};
use serde_json::json;

use crate::lab::objects;
use crate::switchtower::{AGENT_ACCOUNT, AUDIENCE, NAMESPACE};

/// Requests under way at once.
pub(super) const CONCURRENCY: usize = 64;
const ZONES: usize = 3;
const TOKEN_SECONDS: i64 = 24 * 3_600;

/// The name of a Node.
pub(super) fn node_name(number: usize) -> String {
    format!("hollow-{number}")
}

/// An address in a Node's pod CIDR, which differs from that of the next 32,000 Nodes.
pub(super) fn pod_address(node: usize, pod: usize) -> String {
    format!("10.{}.{}.{}", 128 + node / 256 % 126, node % 256, 1 + pod % 250)
}

/// Creates the Nodes.
pub(super) async fn create_nodes(client: &Client, nodes: usize) -> Result<()> {
    let api: Api<Node> = Api::all(client.clone());
    let create = |number: usize| {
        let api = api.clone();
        async move {
            let node = serde_json::from_value(node(number))?;
            api.create(&PostParams::default(), &node).await.context("creating a Node")?;
            anyhow::Ok(())
        }
    };
    futures::stream::iter((0..nodes).map(create)).buffer_unordered(CONCURRENCY).try_collect().await
}

fn node(number: usize) -> serde_json::Value {
    let cidr = format!("10.{}.{}.0/24", 128 + number / 256 % 126, number % 256);
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": node_name(number), "labels": {
            "kubernetes.io/os": "linux",
            "topology.kubernetes.io/zone": format!("zone-{}", number % ZONES),
        }},
        "spec": {"podCIDR": cidr, "podCIDRs": [cidr]},
        "status": {
            "addresses": [{
                "type": "InternalIP",
                "address": format!("172.{}.{}.{}", 16 + number / 65_536, number / 256 % 256, number % 256),
            }],
            "conditions": [{"type": "Ready", "status": "True", "reason": "Hollow"}],
        },
    })
}

/// Creates each agent's pod and requests a token that is bound to it.
pub(super) async fn create_tokens(client: &Client, nodes: usize) -> Result<Vec<String>> {
    let create = |number| create_token(client.clone(), number);
    futures::stream::iter((0..nodes).map(create)).buffered(CONCURRENCY).try_collect().await
}

async fn create_token(client: Client, number: usize) -> Result<String> {
    let node = node_name(number);
    let name = format!("{AGENT_ACCOUNT}-{node}");
    let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let pod = serde_json::from_value(objects::pod(NAMESPACE, &name, &node, AGENT_ACCOUNT))?;
    let pod = pods.create(&PostParams::default(), &pod).await.context("creating an agent's Pod")?;
    let request: TokenRequest = serde_json::from_value(json!({"spec": {
        "audiences": [AUDIENCE],
        "expirationSeconds": TOKEN_SECONDS,
        "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": pod.metadata.uid},
    }}))?;
    let accounts: Api<ServiceAccount> = Api::namespaced(client, NAMESPACE);
    let answer = accounts.create_token_request(AGENT_ACCOUNT, &PostParams::default(), &request).await;
    Ok(answer.context("requesting a token")?.status.context("a TokenRequest without status")?.token)
}
