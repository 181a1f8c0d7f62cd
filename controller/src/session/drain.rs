//! Queries of the drain gate on one stream (fleet.proto: DrainQuery).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use switchtower_core::compiled::PodIdentity;
use switchtower_core::drain::Names;
use switchtower_core::model::ObjectKey;
use switchtower_core::wire;
use switchtower_proto::v1::{DrainAnswer, DrainQuery, DrainVerdict, PodName};
use tokio::task::{AbortHandle, JoinSet};

use crate::fleet::Fleet;
use crate::fleet::drain::Drained;

/// Maximum number of queries that wait on one stream; a node has a few hundred pods.
const QUERIES: usize = 1_024;

/// Queries that wait; dropping it cancels them.
#[derive(Debug, Default)]
pub(super) struct DrainQueries {
    tasks: JoinSet<DrainAnswer>,
    waiting: HashMap<u64, AbortHandle>,
}

impl DrainQueries {
    /// Starts a query. Returns the answer if it cannot wait, or an error if it is malformed.
    pub(super) fn begin(
        &mut self,
        fleet: &Arc<Fleet>,
        node: &Arc<str>,
        query: &DrainQuery,
    ) -> Result<Option<DrainAnswer>, &'static str> {
        let id = query.id;
        let pod = identity(query)?;
        if self.waiting.contains_key(&id) {
            return Err("a second query with the same id");
        }
        if self.waiting.len() >= QUERIES {
            let verdict = DrainVerdict::Overloaded as i32;
            return Ok(Some(DrainAnswer { id, verdict, ..DrainAnswer::default() }));
        }
        let timeout = Duration::from_millis(query.timeout_milliseconds.into());
        let (fleet, node) = (fleet.clone(), node.clone());
        let task = async move {
            let drained = fleet.drain_everywhere(Some(&node), &pod, timeout).await;
            fleet.metrics().drained(drained.verdict_name(), drained.took);
            fleet.report_drain(&node, pod, &drained);
            answer(id, &drained)
        };
        self.waiting.insert(id, self.tasks.spawn(task));
        Ok(None)
    }

    /// Cancels a query; ignores one that has been answered.
    pub(super) fn cancel(&mut self, id: u64) {
        if let Some(task) = self.waiting.remove(&id) {
            task.abort();
        }
    }

    /// Returns the next answer; waits while there is none.
    pub(super) async fn next(&mut self) -> DrainAnswer {
        loop {
            match self.tasks.join_next().await {
                Some(Ok(answer)) => {
                    // Otherwise it was canceled at the last moment.
                    if self.waiting.remove(&answer.id).is_some() {
                        return answer;
                    }
                }
                Some(Err(_)) => {}
                None => std::future::pending().await,
            }
        }
    }
}

fn identity(query: &DrainQuery) -> Result<PodIdentity, &'static str> {
    let address = wire::address(&query.address).ok_or("an address of neither 4 nor 16 bytes")?;
    let Some(PodName { namespace, name }) = &query.host_pod else {
        return Ok(PodIdentity::Address(address));
    };
    // Maximum lengths of a DNS label and a DNS subdomain.
    if !(1..=63).contains(&namespace.len()) || !(1..=253).contains(&name.len()) {
        return Err("a pod whose namespace or name is empty or too long");
    }
    let (namespace, name) = (namespace.as_str().into(), name.as_str().into());
    Ok(PodIdentity::HostNetwork(ObjectKey { namespace, name }))
}

fn answer(id: u64, drained: &Drained) -> DrainAnswer {
    let total = |names: &Names| u32::try_from(names.total).unwrap_or(u32::MAX);
    let (waited_for, missing) = (&drained.answer.waited_for, &drained.answer.missing);
    DrainAnswer {
        id,
        verdict: drained.verdict() as i32,
        waited_for: waited_for.to_strings(),
        waited_for_total: total(waited_for),
        missing: missing.to_strings(),
        missing_total: total(missing),
    }
}
