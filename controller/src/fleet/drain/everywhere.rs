//! Queries of the drain gate over all replicas: each waits for the nodes that it serves.
//!
//! Invariant: nothing counts as drained before every present replica has processed what this one has, and its nodes have
//! acknowledged it. A replica that does not answer is waited for until it is gone; its nodes then had the same time to
//! connect to another one as after a restart of a single controller.

use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use switchtower_core::compiled::PodIdentity;
use switchtower_core::drain::{Names, Verdict};
use switchtower_core::model::ObjectKey;
use switchtower_proto::v1::Source;
use tokio::time::Instant;

use super::super::elsewhere::covers;
use super::{Drained, Fleet, TIMEOUT_LIMIT};

/// Path of [`LocalDrain`], with a [`LocalQuery`].
pub(crate) const LOCAL: &str = "/v1/replica/drain";
/// Maximum time that a replica waits before it answers; the query is repeated.
const TURN: Duration = Duration::from_secs(2);
/// Interval between queries while a replica does not answer.
const RETRY: Duration = Duration::from_millis(250);
/// Interval between checks of the processed versions.
const CATCH_UP: Duration = Duration::from_millis(20);

/// A query about the nodes of one replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LocalQuery {
    /// Address of the pod, unless it shares that of its node.
    address: Option<IpAddr>,
    /// Namespace, name and node of a pod that shares the address of its node.
    namespace: Option<String>,
    name: Option<String>,
    node: Option<String>,
    /// Versions that must have been processed.
    services: u64,
    slices: u64,
    /// Maximum time until the answer.
    milliseconds: u64,
}

impl LocalQuery {
    fn new(node: Option<&str>, pod: &PodIdentity, source: Source, wait: Duration) -> Self {
        let (address, pod) = match pod {
            PodIdentity::Address(address) => (Some(*address), None),
            PodIdentity::HostNetwork(name) => (None, Some(name)),
        };
        Self {
            address,
            namespace: pod.map(|pod| pod.namespace.to_string()),
            name: pod.map(|pod| pod.name.to_string()),
            node: node.map(str::to_owned),
            services: source.services,
            slices: source.endpoint_slices,
            milliseconds: u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
        }
    }

    fn pod(&self) -> Option<PodIdentity> {
        let name = || {
            let (namespace, name) = (self.namespace.as_deref()?.into(), self.name.as_deref()?.into());
            Some(PodIdentity::HostNetwork(ObjectKey { namespace, name }))
        };
        self.address.map(PodIdentity::Address).or_else(name)
    }

    /// Returns the path with the query. All values are IP addresses, numbers and names of Kubernetes objects, which contain
    /// no reserved characters.
    fn path(&self) -> String {
        let text = |key: &str, value: &Option<String>| value.as_ref().map(|value| format!("{key}={value}"));
        let mut pairs = vec![
            format!("services={}", self.services),
            format!("slices={}", self.slices),
            format!("milliseconds={}", self.milliseconds),
        ];
        pairs.extend(self.address.map(|address| format!("address={address}")));
        pairs.extend(text("namespace", &self.namespace));
        pairs.extend(text("name", &self.name));
        pairs.extend(text("node", &self.node));
        format!("{LOCAL}?{}", pairs.join("&"))
    }
}

/// Answer for the nodes of one replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct LocalDrain {
    /// No node of the replica sends new connections to the pod.
    drained: bool,
    /// Nodes that have not acknowledged.
    waited_for: Vec<String>,
    waited_for_total: usize,
}

fn is_drained(verdict: Verdict) -> bool {
    matches!(verdict, Verdict::Drained | Verdict::NotAnEndpoint)
}

impl Fleet {
    /// Answers a query of another replica.
    pub(crate) async fn drained_here(&self, query: &LocalQuery) -> Option<LocalDrain> {
        let pod = query.pod()?;
        let deadline = Instant::now() + Duration::from_millis(query.milliseconds).min(TURN);
        let wanted = Source { services: query.services, endpoint_slices: query.slices, ..Source::default() };
        while !covers(&self.processed().0, &wanted) {
            if Instant::now() >= deadline {
                return Some(LocalDrain { drained: false, waited_for: Vec::new(), waited_for_total: 0 });
            }
            tokio::time::sleep(CATCH_UP).await;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let answer = self.drain(query.node.as_deref(), &pod, left).await.answer;
        Some(LocalDrain {
            drained: is_drained(answer.verdict),
            waited_for: answer.waited_for.to_strings(),
            waited_for_total: answer.waited_for.total,
        })
    }

    /// Waits until no node of any replica sends new connections to the pod, at most for `timeout`. `node`: the node of the
    /// pod.
    pub async fn drain_everywhere(
        &self,
        node: Option<&str>,
        pod: &PodIdentity,
        timeout: Duration,
    ) -> Drained {
        let asked = Instant::now();
        let deadline = asked + timeout.min(TIMEOUT_LIMIT);
        let mut drained = self.drain(node, pod, timeout).await;
        if is_drained(drained.answer.verdict)
            && let Err(waited_for) = self.drained_elsewhere(node, pod, deadline).await
        {
            drained.answer.verdict = Verdict::NotAcknowledged;
            drained.answer.waited_for = waited_for;
        }
        drained.took = asked.elapsed();
        drained
    }

    /// Waits until no node of another replica sends new connections to the pod. Returns the nodes that have not acknowledged
    /// at the deadline.
    async fn drained_elsewhere(
        &self,
        node: Option<&str>,
        pod: &PodIdentity,
        deadline: Instant,
    ) -> Result<(), Names> {
        let (source, _) = self.processed();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let path = LocalQuery::new(node, pod, source, left.min(TURN)).path();
            let replies = self.others().ask::<LocalDrain>(&path, TURN * 2).await;
            if replies.iter().all(|reply| reply.answer.as_ref().is_ok_and(|answer| answer.drained)) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let answers = || replies.iter().filter_map(|reply| reply.answer.as_ref().ok());
                return Err(Names {
                    names: answers()
                        .flat_map(|answer| &answer.waited_for)
                        .map(|name| name.as_str().into())
                        .collect(),
                    total: answers().map(|answer| answer.waited_for_total).sum(),
                });
            }
            if replies.iter().any(|reply| reply.answer.is_err()) {
                tokio::time::sleep(RETRY.min(left)).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(path: &str) -> LocalQuery {
        let uri: http::Uri = path.parse().unwrap();
        axum::extract::Query::<LocalQuery>::try_from_uri(&uri).unwrap().0
    }

    #[test]
    fn queries_survive_the_way_to_another_replica() {
        let source = Source { services: 3, endpoint_slices: 4, ..Source::default() };
        let key = ObjectKey { namespace: "shop".into(), name: "cart-0".into() };
        for (node, pod) in [
            (None, PodIdentity::Address("2001:db8::7".parse().unwrap())),
            (Some("n1.example"), PodIdentity::HostNetwork(key)),
        ] {
            let sent = LocalQuery::new(node, &pod, source, Duration::from_millis(900));
            assert_eq!(query(&sent.path()), sent);
            assert_eq!(query(&sent.path()).pod(), Some(pod));
        }
    }
}
