//! Answers for the nodes of all replicas: the replica that is asked queries the others.
//!
//! A replica answers queries of others for the nodes that it serves only, so that they never ask in a circle.

use std::collections::HashMap;
use std::time::Duration;

use axum::extract::{Query, State};
use axum::http::Uri;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use axum::{Extension, Json, Router};
use serde::de::DeserializeOwned;
use switchtower_admin_api::NodeStatus;

use super::auth::Caller;
use super::{Admin, Answer, Scope, progress, questions};
use crate::fleet::drain::{LOCAL, LocalQuery};
use crate::fleet::elsewhere::STATE;
use crate::replicas::nodes::{ObservedNode, PATH as NODES};

/// Timeout of a query about the state of a replica.
pub(super) const STATE_TIMEOUT: Duration = Duration::from_secs(2);
/// Timeout of a query that reads a kernel.
const KERNEL_TIMEOUT: Duration = Duration::from_secs(15);

impl Admin {
    /// Returns the routes for other replicas, which authenticate on the agents' port.
    pub fn routes_for_replicas(&self) -> Router {
        let admin = Self { scope: Scope::Own, ..self.clone() };
        Router::new()
            .route(STATE, get(async |State(admin): State<Admin>| Json(admin.fleet.replica_state())))
            .route(NODES, get(async |State(admin): State<Admin>| Json(admin.fleet.observed_nodes())))
            .route(progress::LOCAL, get(local_progress))
            .route(LOCAL, get(local_drain))
            .merge(questions())
            .layer(Extension(Caller::Operator))
            .with_state(admin)
    }

    /// Returns the answers of the other replicas to the same request.
    pub(super) async fn ask_others<T: DeserializeOwned>(&self, uri: &Uri, timeout: Duration) -> Vec<T> {
        if self.scope == Scope::Own {
            return Vec::new();
        }
        let path = uri.path_and_query().map_or_else(|| uri.path(), |path| path.as_str());
        let replies = self.fleet.others().ask(path, timeout).await;
        let answered = replies.into_iter().filter_map(|reply| match reply.answer {
            Ok(answer) => Some(answer),
            Err(error) => {
                tracing::debug!(%error, "a replica is missing from an answer");
                None
            }
        });
        answered.collect()
    }

    /// Returns the answer of the replica that serves the node, or that of this one if no other does.
    pub(super) async fn of_node<T: DeserializeOwned>(
        &self,
        node: &str,
        uri: &Uri,
        own: impl Future<Output = Answer<T>>,
    ) -> Answer<T> {
        if !self.fleet.is_connected(node)
            && let Some(answer) = self.ask_others(uri, KERNEL_TIMEOUT).await.pop()
        {
            return Ok(Json(answer));
        }
        own.await
    }

    /// Returns the progress of the nodes that other replicas serve.
    pub(super) async fn served_elsewhere(&self) -> HashMap<String, NodeStatus> {
        let uri = Uri::from_static(NODES);
        let replies: Vec<Vec<ObservedNode>> = self.ask_others(&uri, STATE_TIMEOUT).await;
        let connected = replies.into_iter().flatten().filter(|node| node.status.connected);
        connected.map(|node| (node.status.node.clone(), node.status)).collect()
    }
}

async fn local_progress(
    State(admin): State<Admin>,
    Query(parameters): Query<progress::Parameters>,
) -> Json<progress::LocalProgress> {
    Json(progress::local(&admin.fleet, &parameters))
}

async fn local_drain(State(admin): State<Admin>, Query(query): Query<LocalQuery>) -> Response {
    match admin.fleet.drained_here(&query).await {
        Some(answer) => Json(answer).into_response(),
        None => axum::http::StatusCode::BAD_REQUEST.into_response(),
    }
}
