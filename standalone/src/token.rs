//! The agent's token: requested from the API server, bound to the Node, renewed before it expires.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Node, ServiceAccount};
use kube::api::PostParams;
use kube::{Api, Client};
use switchtower_controller::cli::ServeArgs;
use switchtower_node_agent::storage::files::replace;

/// Requested lifetime. The API server may return a shorter or longer one.
const LIFETIME: Duration = Duration::from_secs(3_600);
/// Interval between two tokens, below the minimum lifetime that an API server grants (10 minutes).
const RENEWAL: Duration = Duration::from_secs(300);
/// Interval between two attempts.
const RETRY: Duration = Duration::from_secs(5);
/// Timeout of a request.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Label by which the controller selects the Node.
const HOST_NAME: &str = "kubernetes.io/hostname";

/// Requests tokens for the agent of one Node.
pub(crate) struct Issuer {
    client: Client,
    namespace: String,
    account: String,
    audience: String,
    node: String,
    file: PathBuf,
}

impl Issuer {
    pub(crate) fn new(client: Client, serve: &ServeArgs, node: &str, file: PathBuf) -> Self {
        Self {
            client,
            namespace: serve.namespace.clone(),
            account: serve.agent_service_account.clone(),
            audience: serve.audience.clone(),
            node: node.to_owned(),
            file,
        }
    }

    /// Writes the first token, retrying until the API server grants one, and returns the label selector of the Node.
    pub(crate) async fn first(&self) -> Option<String> {
        loop {
            match self.write_token().await {
                Ok(node) => return selector(&node),
                Err(error) => {
                    tracing::error!(error = format!("{error:#}"), "the agent has no token; retrying");
                }
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Renews the token for as long as the process runs.
    pub(crate) async fn renew(self) {
        loop {
            tokio::time::sleep(RENEWAL).await;
            while let Err(error) = self.write_token().await {
                tracing::warn!(error = format!("{error:#}"), "failed to renew the agent's token; retrying");
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    async fn write_token(&self) -> anyhow::Result<Node> {
        let (node, token) = tokio::time::timeout(TIMEOUT, self.request())
            .await
            .context("the API server does not answer")??;
        replace(&self.file, token.as_bytes()).with_context(|| format!("writing {}", self.file.display()))?;
        Ok(node)
    }

    async fn request(&self) -> anyhow::Result<(Node, String)> {
        let Self { client, namespace, account, node, .. } = self;
        let nodes: Api<Node> = Api::all(client.clone());
        let node = nodes.get(node).await.with_context(|| {
            format!("reading the Node {node}; check --node-name and the permission to get Nodes")
        })?;
        let bound = BoundObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: node.metadata.name.clone(),
            uid: node.metadata.uid.clone(),
        };
        let request = TokenRequest {
            spec: TokenRequestSpec {
                audiences: vec![self.audience.clone()],
                bound_object_ref: Some(bound),
                expiration_seconds: i64::try_from(LIFETIME.as_secs()).ok(),
            },
            ..TokenRequest::default()
        };
        let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), namespace);
        let answer = accounts.create_token_request(account, &PostParams::default(), &request).await;
        let answer = answer.with_context(|| {
            format!(
                "requesting a token of the ServiceAccount {namespace}/{account}; create it with \
                 manifests/namespace.yaml and manifests/rbac.yaml, and permit `create serviceaccounts/token`"
            )
        })?;
        let token = answer.status.context("the API server returned no token")?.token;
        Ok((node, token))
    }
}

/// Selects the Node; `None` if it lacks the label, as in a cluster without a kubelet.
fn selector(node: &Node) -> Option<String> {
    let host = node.metadata.labels.as_ref()?.get(HOST_NAME)?;
    Some(format!("{HOST_NAME}={host}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;

    use super::*;

    #[test]
    fn token_is_readable_by_its_owner_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("standalone/token");
        for text in ["first", "second"] {
            replace(&path, text.as_bytes()).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
            let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
            assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        }
    }

    #[test]
    fn selector_is_the_nodes_host_name() {
        let mut node = Node::default();
        assert_eq!(selector(&node), None);
        node.metadata.labels = Some([(HOST_NAME.to_owned(), "edge-1.lan".to_owned())].into());
        assert_eq!(selector(&node).as_deref(), Some("kubernetes.io/hostname=edge-1.lan"));
    }
}
