//! Input from the watches that is not compiled yet. Pure: no task and no clock; trace IDs are arguments.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use ipnet::IpNet;
use switchtower_core::compiled::Problem;
use switchtower_core::model::{Input, ObjectKey};
use switchtower_core::propagation::{Change, TraceContext, UnixNanoseconds};
use switchtower_proto::v1::Source;

use crate::ingest::{Fact, Ingested, Origin};
use crate::status::NodeEvent;
use crate::watch::{Batch, WatchedResource};

/// An input of the compiler.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) input: Input,
    /// `None` in the first complete lists: they are a state, not changes.
    pub(super) cause: Option<Cause>,
}

/// The event behind an input.
#[derive(Debug, Clone)]
pub(super) struct Cause {
    id: u64,
    received: SystemTime,
    origin: Origin,
}

/// Everything that arrived since the last compile.
#[derive(Debug, Default)]
pub(super) struct Work {
    /// Inputs of the compiler in order of arrival.
    pub(super) inputs: Vec<Arrival>,
    /// Problems of objects.
    pub(super) problems: Vec<Problem>,
    /// Added, changed and deleted Nodes.
    pub(super) nodes: Vec<NodeEvent>,
    /// Processed version of each resource.
    pub(super) source: Source,
    /// Version of each resource's latest list or change, without bookmarks.
    pub(super) changed: Source,
}

/// Collects batches until they are compiled.
#[derive(Debug, Default)]
pub(super) struct Intake {
    work: Work,
    synced: [bool; WatchedResource::ALL.len()],
    service_cidrs: BTreeMap<Arc<str>, Vec<IpNet>>,
    service_cidrs_changed: bool,
    /// The last event about a ServiceCIDR since the last compile.
    service_cidrs_cause: Option<Cause>,
    next_change: u64,
    initial_done: bool,
    /// The last fact about every object, before the first lists are complete.
    first: BTreeMap<Subject, Ingested>,
}

/// Object of a fact.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Subject {
    Service(ObjectKey),
    Slice(ObjectKey),
    Node(Arc<str>),
    ServiceCidrs,
    ServiceCidr(Arc<str>),
}

impl Subject {
    fn of(fact: &Fact) -> Self {
        match fact {
            Fact::Input(Input::Service(service)) => Self::Service(service.key.clone()),
            Fact::Input(Input::ServiceDeleted(key)) => Self::Service(key.clone()),
            Fact::Input(Input::Slice(slice)) => Self::Slice(slice.key.clone()),
            Fact::Input(Input::SliceDeleted(key)) => Self::Slice(key.clone()),
            Fact::Input(Input::Node(node)) | Fact::Node(node, _) => Self::Node(node.name.clone()),
            Fact::Input(Input::NodeDeleted(name)) | Fact::NodeDeleted(name) => Self::Node(name.clone()),
            Fact::Input(Input::ServiceCidrs(_)) => Self::ServiceCidrs,
            Fact::ServiceCidr(name, _) | Fact::ServiceCidrDeleted(name) => Self::ServiceCidr(name.clone()),
        }
    }
}

impl Intake {
    /// Adds a batch. The order within a resource is kept; resources are independent of each other.
    pub(super) fn absorb(&mut self, batch: Batch) {
        let Batch { resource, facts, resource_version, synced, received } = batch;
        let is_bookmark = facts.is_empty() && !synced;
        for ingested in facts {
            if self.initial_done {
                self.next_change += 1;
                let cause = Cause { id: self.next_change, received, origin: ingested.origin };
                self.absorb_one(ingested, Some(cause));
            } else {
                // While one resource cannot be listed, the changes of the others must not accumulate.
                self.first.insert(Subject::of(&ingested.fact), ingested);
            }
        }
        // A complete list is authoritative, even if the API server went back in time.
        let list = synced && resource_version != 0;
        let set = |source: &mut Source| {
            let version = version_of(source, resource);
            *version = if list { resource_version } else { (*version).max(resource_version) };
        };
        set(&mut self.work.source);
        if !is_bookmark {
            set(&mut self.work.changed);
        }
        if synced {
            self.synced[resource.index()] = true;
        }
    }

    fn absorb_one(&mut self, ingested: Ingested, cause: Option<Cause>) {
        self.work.problems.extend(ingested.problems);
        match ingested.fact {
            Fact::Input(input) => self.work.inputs.push(Arrival { input, cause }),
            Fact::Node(node, identity) => {
                self.work.inputs.push(Arrival { input: Input::Node(node), cause });
                self.work.nodes.push(NodeEvent::Applied(identity));
            }
            Fact::NodeDeleted(name) => {
                self.work.inputs.push(Arrival { input: Input::NodeDeleted(name.clone()), cause });
                self.work.nodes.push(NodeEvent::Gone(name));
            }
            Fact::ServiceCidr(name, cidrs) => {
                self.service_cidrs_changed |= self.service_cidrs.get(&name) != Some(&cidrs);
                self.service_cidrs.insert(name, cidrs);
                self.service_cidrs_cause = cause;
            }
            Fact::ServiceCidrDeleted(name) => {
                self.service_cidrs_changed |= self.service_cidrs.remove(&name).is_some();
                self.service_cidrs_cause = cause;
            }
        }
    }

    /// Returns the work to compile, or `None` before every resource was listed once (invariant: nothing is served
    /// from incomplete lists).
    pub(super) fn take(&mut self) -> Option<Work> {
        if self.synced.contains(&false) {
            return None;
        }
        if !self.initial_done {
            for ingested in std::mem::take(&mut self.first).into_values() {
                self.absorb_one(ingested, None);
            }
            self.work.nodes.push(NodeEvent::Synced);
        }
        if std::mem::take(&mut self.service_cidrs_changed) || !self.initial_done {
            let all: BTreeSet<IpNet> = self.service_cidrs.values().flatten().copied().collect();
            let input = Input::ServiceCidrs(all.into_iter().collect());
            self.work.inputs.push(Arrival { input, cause: self.service_cidrs_cause.take() });
        }
        self.initial_done = true;
        let Work { source, changed, .. } = self.work;
        Some(std::mem::replace(&mut self.work, Work { source, changed, ..Work::default() }))
    }

    /// Returns the resources whose first list is not complete.
    pub(super) fn missing(&self) -> impl Iterator<Item = WatchedResource> {
        WatchedResource::ALL.into_iter().filter(|resource| !self.synced[resource.index()])
    }
}

fn version_of(source: &mut Source, resource: WatchedResource) -> &mut u64 {
    match resource {
        WatchedResource::Services => &mut source.services,
        WatchedResource::EndpointSlices => &mut source.endpoint_slices,
        WatchedResource::Nodes => &mut source.nodes,
        WatchedResource::ServiceCidrs => &mut source.service_cidrs,
    }
}

impl Cause {
    /// Describes the change for updates and traces.
    pub(super) fn describe(&self, input: &Input, trace: TraceContext) -> Change {
        let since = self.received.duration_since(UNIX_EPOCH).unwrap_or_default();
        Change {
            id: self.id,
            object: describe(input).into(),
            service: service(input),
            received: UnixNanoseconds::try_from(since.as_nanos()).unwrap_or(0),
            triggered: self.origin.triggered,
            trace,
            origin: self.origin.trace,
        }
    }
}

/// "EndpointSlice default/web-x7", for traces and logs.
fn describe(input: &Input) -> String {
    let name = |kind: &str, key: &ObjectKey| format!("{kind} {}/{}", key.namespace, key.name);
    match input {
        Input::Service(service) => name("Service", &service.key),
        Input::ServiceDeleted(key) => name("Service", key),
        Input::Slice(slice) => name("EndpointSlice", &slice.key),
        Input::SliceDeleted(key) => name("EndpointSlice", key),
        Input::Node(node) => format!("Node {}", node.name),
        Input::NodeDeleted(name) => format!("Node {name}"),
        Input::ServiceCidrs(_) => "ServiceCIDRs".to_owned(),
    }
}

/// Returns the Service of an input; unknown for a deleted slice.
fn service(input: &Input) -> Option<ObjectKey> {
    match input {
        Input::Service(service) => Some(service.key.clone()),
        Input::ServiceDeleted(key) => Some(key.clone()),
        Input::Slice(slice) => {
            Some(ObjectKey { namespace: slice.key.namespace.clone(), name: slice.service.clone() })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(resource: WatchedResource, facts: Vec<Fact>, version: u64, synced: bool) -> Batch {
        let facts = facts.into_iter().map(Ingested::gone).collect();
        Batch { resource, facts, resource_version: version, synced, received: UNIX_EPOCH }
    }

    fn absorb(intake: &mut Intake, batch: Batch) {
        intake.absorb(batch);
    }

    fn deleted(name: &str) -> Fact {
        Fact::Input(Input::ServiceDeleted(ObjectKey { namespace: "default".into(), name: name.into() }))
    }

    fn synced() -> Intake {
        let mut intake = Intake::default();
        for resource in WatchedResource::ALL {
            absorb(&mut intake, batch(resource, vec![], 5, true));
        }
        assert!(intake.take().is_some());
        intake
    }

    #[test]
    fn nothing_is_compiled_before_every_list_is_complete() {
        let mut intake = Intake::default();
        absorb(&mut intake, batch(WatchedResource::Services, vec![deleted("a")], 5, true));
        for resource in [WatchedResource::EndpointSlices, WatchedResource::Nodes] {
            absorb(&mut intake, batch(resource, vec![], 6, true));
            assert!(intake.take().is_none());
        }
        assert_eq!(intake.missing().collect::<Vec<_>>(), [WatchedResource::ServiceCidrs]);
        absorb(&mut intake, batch(WatchedResource::ServiceCidrs, vec![], 7, true));
        let work = intake.take().unwrap();
        assert_eq!(work.inputs.len(), 2, "the Service and the (empty) list of ServiceCIDRs");
        assert!(work.inputs.iter().all(|arrival| arrival.cause.is_none()), "the first state is not a change");
        assert_eq!(work.nodes, [NodeEvent::Synced]);
        assert_eq!((work.source.services, work.source.service_cidrs), (5, 7));
    }

    #[test]
    fn only_latest_fact_of_object_kept_before_first_lists() {
        let mut intake = Intake::default();
        for version in 0..1_000 {
            let facts = vec![deleted(&format!("s{}", version % 3))];
            absorb(&mut intake, batch(WatchedResource::Services, facts, version, true));
            assert!(intake.take().is_none());
        }
        for resource in WatchedResource::ALL {
            absorb(&mut intake, batch(resource, vec![], 2_000, true));
        }
        let work = intake.take().unwrap();
        assert_eq!(
            (work.inputs.len(), work.source.services),
            (4, 2_000),
            "three Services, and the ServiceCIDRs"
        );
    }

    #[test]
    fn change_is_described_by_its_object_and_event() {
        let mut intake = synced();
        absorb(&mut intake, batch(WatchedResource::Services, vec![deleted("s0"), deleted("s1")], 9, false));
        let work = intake.take().unwrap();
        assert_eq!((work.inputs.len(), work.source.services), (2, 9));
        let Arrival { input, cause } = &work.inputs[1];
        let trace = TraceContext { trace: 1, span: 2, sampled: false };
        let change = cause.as_ref().unwrap().describe(input, trace);
        assert_eq!((change.id, &*change.object), (2, "Service default/s1"));
        let service = change.service.as_ref().map(|key| (&*key.namespace, &*key.name));
        assert_eq!(service, Some(("default", "s1")));
        let next = intake.take().unwrap();
        assert_eq!((next.inputs.len(), next.source.services), (0, 9));
    }

    #[test]
    fn service_cidrs_compiled_together_and_only_when_changed() {
        let mut intake = synced();
        let cidr = |name: &str, net: &str| Fact::ServiceCidr(name.into(), vec![net.parse().unwrap()]);
        let facts = vec![cidr("b", "10.97.0.0/16"), cidr("a", "10.96.0.0/16")];
        absorb(&mut intake, batch(WatchedResource::ServiceCidrs, facts, 9, false));
        let expected = vec!["10.96.0.0/16".parse().unwrap(), "10.97.0.0/16".parse().unwrap()];
        let work = intake.take().unwrap();
        let [Arrival { input, cause: Some(cause) }] = &work.inputs[..] else { panic!("{:?}", work.inputs) };
        assert_eq!((input, cause.id), (&Input::ServiceCidrs(expected), 2));
        absorb(&mut intake, batch(WatchedResource::ServiceCidrs, vec![cidr("a", "10.96.0.0/16")], 10, false));
        assert!(intake.take().unwrap().inputs.is_empty());
    }

    #[test]
    fn versions_go_back_with_a_complete_list_only() {
        let mut intake = synced();
        absorb(&mut intake, batch(WatchedResource::Nodes, vec![], 90, false));
        absorb(&mut intake, batch(WatchedResource::Nodes, vec![], 0, false));
        assert_eq!(intake.take().unwrap().source.nodes, 90);
        absorb(&mut intake, batch(WatchedResource::Nodes, vec![], 70, true));
        assert_eq!(intake.take().unwrap().source.nodes, 70, "an etcd that was restored");
    }
}
