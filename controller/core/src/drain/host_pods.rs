//! Endpoints of pods that share the address of their node (`hostNetwork: true`): the drain gate identifies these pods by
//! name, because their address belongs to all of them.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use super::Socket;
use crate::model::PodId;

/// Maximum number of endpoints that are in no EndpointSlice any more and are remembered: a hook may ask later.
const REMEMBERED: usize = 4_096;

/// An endpoint with the address of its node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostEndpoint {
    /// The pod (`targetRef`).
    pub pod: PodId,
    /// The node (`nodeName`).
    pub node: Arc<str>,
    /// Address, protocol and port.
    pub socket: Socket,
    /// Condition.
    pub ready: bool,
}

/// An endpoint appeared in an EndpointSlice, or disappeared from one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPodChange {
    /// The endpoint.
    pub endpoint: HostEndpoint,
    /// Whether the endpoint appeared.
    pub present: bool,
}

/// Number of EndpointSlices that contain an endpoint.
#[derive(Debug, Default)]
struct Count {
    all: u32,
    ready: u32,
}

/// Host-network pods of all nodes. A change and a query cost the endpoints of one pod.
#[derive(Debug, Default)]
pub struct HostPods {
    pods: HashMap<PodId, BTreeMap<(Arc<str>, Socket), Count>>,
    /// Pods with an endpoint that is in no EndpointSlice any more, oldest first.
    gone: VecDeque<PodId>,
}

impl HostPods {
    /// Takes note of a change.
    pub fn change(&mut self, change: &HostPodChange) {
        let HostEndpoint { pod, node, socket, ready } = &change.endpoint;
        let count = self.pods.entry(*pod).or_default().entry((node.clone(), *socket)).or_default();
        if change.present {
            count.all += 1;
            count.ready += u32::from(*ready);
            return;
        }
        count.all = count.all.saturating_sub(1);
        count.ready = count.ready.saturating_sub(u32::from(*ready));
        if count.all == 0 {
            self.gone.push_back(*pod);
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        while self.gone.len() > REMEMBERED {
            let Some(pod) = self.gone.pop_front() else { return };
            if let Some(endpoints) = self.pods.get_mut(&pod) {
                endpoints.retain(|_, count| count.all > 0);
                if endpoints.is_empty() {
                    self.pods.remove(&pod);
                }
            }
        }
    }

    /// Returns the endpoints of a pod on a node, including those that are remembered.
    #[must_use]
    pub fn sockets(&self, pod: PodId, node: &str) -> Vec<Socket> {
        self.of(pod, node).map(|(socket, _)| socket).collect()
    }

    /// Returns true if an endpoint of the pod on the node is ready.
    #[must_use]
    pub fn is_ready(&self, pod: PodId, node: &str) -> bool {
        self.of(pod, node).any(|(_, count)| count.ready > 0)
    }

    fn of<'a>(&'a self, pod: PodId, node: &'a str) -> impl Iterator<Item = (Socket, &'a Count)> {
        let endpoints = self.pods.get(&pod).into_iter().flatten();
        endpoints.filter(move |((name, _), _)| **name == *node).map(|((_, socket), count)| (*socket, count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(name: &str, port: u16, ready: bool, present: bool) -> HostPodChange {
        let socket = Socket { address: "192.0.2.1".parse().unwrap(), protocol: 6, port };
        let endpoint = HostEndpoint { pod: PodId::of("default", name), node: "n1".into(), socket, ready };
        HostPodChange { endpoint, present }
    }

    fn ports(pods: &HostPods, name: &str, node: &str) -> Vec<u16> {
        pods.sockets(PodId::of("default", name), node).iter().map(|socket| socket.port).collect()
    }

    #[test]
    fn pods_of_one_address_are_distinguished() {
        let mut pods = HostPods::default();
        pods.change(&change("a", 80, true, true));
        pods.change(&change("a", 443, false, true));
        pods.change(&change("b", 53, false, true));
        assert_eq!((ports(&pods, "a", "n1"), ports(&pods, "b", "n1")), (vec![80, 443], vec![53]));
        assert_eq!(ports(&pods, "a", "n2"), [0; 0], "a node asks for its own pods only");
        assert_ne!(PodId::of("default", "a"), PodId::of("defaulta", ""));
        let ready = |pods: &HostPods, name| pods.is_ready(PodId::of("default", name), "n1");
        assert!(ready(&pods, "a") && !ready(&pods, "b"));
        // It terminates: two Services, one slice after the other.
        pods.change(&change("a", 80, true, true));
        for _ in 0..2 {
            pods.change(&change("a", 80, false, true));
            pods.change(&change("a", 80, true, false));
        }
        assert!(!ready(&pods, "a"));
        assert_eq!(ports(&pods, "a", "n1"), [80, 443]);
    }

    #[test]
    fn deleted_endpoints_are_remembered_up_to_a_limit() {
        let mut pods = HostPods::default();
        pods.change(&change("a", 80, true, true));
        pods.change(&change("a", 80, true, false));
        assert_eq!(ports(&pods, "a", "n1"), [80], "a hook may ask later");
        for index in 0..2 * REMEMBERED {
            let name = format!("p{index}");
            pods.change(&change(&name, 80, true, true));
            pods.change(&change(&name, 80, true, false));
        }
        assert_eq!(ports(&pods, "a", "n1"), [0; 0]);
        assert_eq!((pods.pods.len(), pods.gone.len()), (REMEMBERED, REMEMBERED));
    }
}
