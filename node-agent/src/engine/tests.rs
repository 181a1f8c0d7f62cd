//! The engine with a kernel in memory.

use switchtower_proto::v1::{
    Ack, Cidr, DriftCause, HealthCheck, HealthCheckKey, LayerKind, Part, ProxyMode, Settings, Update,
    UpdateEnd,
};
use tokio::sync::oneshot;

use super::*;
use crate::kernel::conntrack::{Families, FlowReport, FlowTable};
use crate::kernel::dataplane::Stamp as KernelStamp;
use crate::kernel::inspector::Inspector;
use crate::testing::{self, Fleet, MemoryKernel};

mod damage;
mod files;
mod held;
mod shadow;
mod trials;

/// Records the passes that begin; the test ends them.
#[derive(Clone, Default)]
struct NotedPasses(std::sync::Arc<std::sync::Mutex<Vec<Families>>>);

impl FlowTable for NotedPasses {
    fn begin(&mut self, families: Families) {
        self.0.lock().unwrap().push(families);
    }
}

impl NotedPasses {
    /// Ends the running pass and returns its families; `None` if none began.
    fn end(&self, engine: &mut Engine) -> Option<Families> {
        let families = self.0.lock().unwrap().pop()?;
        let done = FlowReport::Done { deleted: Ok(0), took: Duration::ZERO };
        engine.handle(Command::Flows(done));
        Some(families)
    }
}

fn engine(kernel: &MemoryKernel, directory: &std::path::Path) -> (Engine, Health) {
    let (engine, health, _) = probing_engine(kernel, directory);
    (engine, health)
}

fn probing_engine(
    kernel: &MemoryKernel,
    directory: &std::path::Path,
) -> (Engine, Health, testing::NotingProber) {
    let health = Health::default();
    let prober = testing::NotingProber::default();
    let parts = parts(kernel, directory, &health, &prober, &NotedPasses::default());
    (Engine::start(parts), health, prober)
}

fn parts(
    kernel: &MemoryKernel,
    directory: &std::path::Path,
    health: &Health,
    prober: &testing::NotingProber,
    passes: &NotedPasses,
) -> Parts {
    Parts {
        dataplane: Box::new(kernel.clone()),
        flows: Box::new(passes.clone()),
        snapshot: Some(SnapshotFile::new(directory, "node-1")),
        files: StateFiles::start().unwrap(),
        snapshot_limit: Some(Duration::from_secs(3600)),
        health: health.clone(),
        metrics: Metrics::register(&prometheus::Registry::new()).unwrap(),
        host_addresses: vec!["192.0.2.1".parse().unwrap()],
        controllers: Vec::new(),
        sysctls: crate::kernel::sysctl::Sysctls::new(directory),
        log: testing::log(),
        prober: Box::new(prober.clone()),
        trial: Some(TrialFile::new(directory)),
        questions: Inspector::none(),
        traces: crate::traces::Traces::none(),
        initial_mode: ProxyMode::Active,
        drain_gate: tokio::sync::watch::Sender::default(),
    }
}

fn attach(engine: &mut Engine) -> (AgentStatus, mpsc::UnboundedReceiver<Event>) {
    let (events, receiver) = mpsc::unbounded_channel();
    let (status, answer) = oneshot::channel();
    engine.handle(Command::Attach { events, status });
    (answer.blocking_recv().unwrap(), receiver)
}

fn play(engine: &mut Engine, (update, parts): (Update, Vec<Part>)) {
    let to = update.to;
    engine.handle(Command::Begin(Box::new(update)));
    parts.into_iter().for_each(|part| engine.handle(Command::Part(part)));
    engine.handle(Command::End(UpdateEnd { to }));
}

/// Returns an engine that holds `fleet` and has written its snapshot file.
fn with_a_file(kernel: &MemoryKernel, directory: &std::path::Path, fleet: &Fleet) -> Engine {
    let (mut engine, _) = engine(kernel, directory);
    play(&mut engine, fleet.snapshot());
    engine.write_last_snapshot();
    engine
}

/// Returns an engine that has acknowledged a view of which the kernel refuses one item.
fn with_a_refused_item(
    kernel: &MemoryKernel,
    directory: &std::path::Path,
) -> (Engine, mpsc::UnboundedReceiver<Event>) {
    kernel.lock().refused =
        vec![Refused { item: "frontend".into(), reason: "ENFILE".into(), errno: libc::ENFILE }];
    let (mut engine, _) = engine(kernel, directory);
    let (_, mut events) = attach(&mut engine);
    play(&mut engine, Fleet::new(5, 2).snapshot());
    assert_eq!(ack(&mut events).deviations.unwrap().refused, 1);
    (engine, events)
}

fn ack(events: &mut mpsc::UnboundedReceiver<Event>) -> Ack {
    match events.try_recv() {
        Ok(Event::Ack(ack)) => ack,
        other => panic!("expected an Ack, got {other:?}"),
    }
}

#[test]
fn generation_acknowledged_once_the_kernel_holds_it() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = MemoryKernel::default();
    let (mut engine, health) = engine(&kernel, directory.path());
    let (status, mut events) = attach(&mut engine);
    assert!(status.kernel.is_none() && status.view.is_none());

    let mut fleet = Fleet::new(20, 3);
    play(&mut engine, fleet.snapshot());
    let first = ack(&mut events);
    assert_eq!((first.generation, first.digest.clone()), (1, fleet.digest.to_bytes().to_vec()));
    assert!(first.deviations.is_none());
    assert_eq!(kernel.lock().stamp.unwrap().generation, 1);
    assert!(health.read().eligible);

    play(&mut engine, fleet.add_endpoint(3, 5));
    assert_eq!(ack(&mut events).generation, 2);
    assert_eq!(kernel.lock().commits.last(), Some(&1), "one endpoint is one change");
}

#[test]
fn failed_commit_retried_and_acknowledged() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = MemoryKernel::default();
    kernel.lock().fail = Some(libc::EPERM);
    let (mut engine, _) = engine(&kernel, directory.path());
    let (_, mut events) = attach(&mut engine);
    play(&mut engine, Fleet::new(5, 2).snapshot());
    match events.try_recv() {
        Ok(Event::Nack(nack)) => {
            assert_eq!((nack.reason, nack.errno), (NackReason::Kernel as i32, libc::EPERM));
            assert_eq!((nack.generation, nack.kept), (1, 0));
        }
        other => panic!("expected a Nack, got {other:?}"),
    }
    retry(&mut engine);
    assert!(events.try_recv().is_err(), "the same failure is reported once");
    kernel.lock().fail = None;
    retry(&mut engine);
    assert_eq!(ack(&mut events).generation, 1);
}

/// Waits until the engine's next attempt is due, and runs it.
fn retry(engine: &mut Engine) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while let SyncState::Retrying { at, .. } = engine.sync
        && at > Instant::now()
        && Instant::now() < deadline
    {
        std::thread::sleep(Duration::from_millis(10));
    }
    engine.wake();
}

#[test]
fn health_checks_follow_the_commit() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = MemoryKernel::default();
    let (mut engine, health) = engine(&kernel, directory.path());
    let (_, mut events) = attach(&mut engine);
    let mut fleet = Fleet::new(5, 2);
    let key = HealthCheckKey { namespace: "shop".into(), name: "cart".into() };
    let check =
        |ready| HealthCheck { key: Some(key.clone()), port: 31_999, ready_ipv4: ready, ready_ipv6: 0 };
    let answers = || {
        let targets = health.subscribe().borrow().clone();
        targets.checks.into_values().map(|check| check.ready_ipv4).collect::<Vec<_>>()
    };
    play(&mut engine, fleet.snapshot());
    play(&mut engine, fleet.health_check(LayerKind::Node, None, check(2)));
    assert_eq!((ack(&mut events).generation, ack(&mut events).generation), (1, 2));
    assert_eq!(answers(), [2]);
    kernel.lock().fail = Some(libc::EPERM);
    play(&mut engine, fleet.health_check(LayerKind::Node, Some(&check(2)), check(0)));
    assert!(matches!(events.try_recv(), Ok(Event::Nack(_))));
    assert_eq!(answers(), [2]);
    kernel.lock().fail = None;
    retry(&mut engine);
    assert_eq!(ack(&mut events).generation, 3);
    assert_eq!(answers(), [0]);
}

#[test]
fn refused_items_reported_as_deviations() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = MemoryKernel::default();
    let refused =
        |number: u32| Refused { item: format!("frontend {number}"), reason: "EINVAL".into(), errno: 22 };
    kernel.lock().refused = (0..40).map(refused).collect();
    let (mut engine, _) = engine(&kernel, directory.path());
    let (_, mut events) = attach(&mut engine);
    let fleet = Fleet::new(5, 2);
    play(&mut engine, fleet.snapshot());
    let ack = ack(&mut events);
    let deviations = ack.deviations.unwrap();
    assert_eq!((deviations.refused, deviations.samples.len()), (40, 16));
    assert_ne!(deviations.effective_digest, ack.digest);
    assert_eq!(ack.digest, fleet.digest.to_bytes());
}

#[test]
fn agent_killed_before_snapshot_writes_only_the_next_change() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = MemoryKernel::default();
    let mut fleet = Fleet::new(50, 3);
    let mut first = with_a_file(&kernel, directory.path(), &fleet);
    play(&mut first, fleet.add_endpoint(7, 5));
    // Killed: the kernel holds generation 2, the file generation 1.
    drop(first);
    let commits = kernel.lock().commits.len();

    let (mut second, _) = engine(&kernel, directory.path());
    let (status, mut events) = attach(&mut second);
    assert_eq!(kernel.lock().commits.len(), commits, "no write before a controller answers");
    assert_eq!(status.kernel.unwrap().generation, 2);
    let view = status.view.unwrap();
    assert_eq!((view.generation, view.resume.unwrap().revision), (1, 1));

    // The controller resumes from the view: both changes since then arrive as one delta.
    let (first_missed, mut parts) = {
        let mut again = Fleet::new(50, 3);
        again.add_endpoint(7, 5)
    };
    let (next, more) = fleet.add_endpoint(9, 5);
    parts.extend(more);
    play(&mut second, (Update { from: first_missed.from, ..next }, parts));
    assert_eq!(ack(&mut events).generation, 3);
    let memory = kernel.lock();
    assert_eq!(memory.commits[commits..], [1], "exactly the new endpoint");
    assert_eq!(memory.stamp.unwrap().digest, fleet.digest.0);
}

#[test]
fn resumed_view_adopted_after_the_hold() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = MemoryKernel::default();
    let fleet = Fleet::new(5, 2);
    drop(with_a_file(&kernel, directory.path(), &fleet));
    let mut memory = kernel.lock();
    memory.stamp = memory.stamp.map(|stamp| KernelStamp { generation: 0, digest: 7, ..stamp });
    drop(memory);
    let (mut second, _) = engine(&kernel, directory.path());
    let (_, mut events) = attach(&mut second);
    let now = Instant::now();
    second.resumed(now);
    assert_eq!(second.sync, SyncState::Held { until: Some(now + HOLD_AFTER_RESUME) });
    second.wake();
    assert_eq!(kernel.lock().stamp.unwrap().generation, 0, "not before the hold ends");
    second.hold(Some(now));
    second.wake();
    assert_eq!(ack(&mut events).generation, 1);
    assert_eq!(kernel.lock().stamp.unwrap().generation, 1);
}

#[test]
fn newer_kernel_waits_for_the_update_after_a_resume() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = MemoryKernel::default();
    let mut fleet = Fleet::new(5, 2);
    let mut first = with_a_file(&kernel, directory.path(), &fleet);
    play(&mut first, fleet.add_endpoint(3, 5));
    drop(first);
    let (mut second, _) = engine(&kernel, directory.path());
    let (_, mut events) = attach(&mut second);
    second.handle(Command::Resumed);
    assert_eq!(second.sync, SyncState::Held { until: None }, "a slow update is waited for");
    // A controller without a change sends an empty update above the kernel's generation.
    let digest = second.state.digest().to_bytes().to_vec();
    let update = Update { from: Some(1), to: 3, digest, ..Update::default() };
    play(&mut second, (update, Vec::new()));
    assert_eq!(ack(&mut events).generation, 3);
    assert_eq!(kernel.lock().stamp.unwrap().generation, 3);
}

#[test]
fn current_file_adopted_without_a_write() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = MemoryKernel::default();
    let mut fleet = Fleet::new(50, 3);
    drop(with_a_file(&kernel, directory.path(), &fleet));
    let (mut second, health) = engine(&kernel, directory.path());
    assert_eq!(kernel.lock().commits.len(), 1, "nothing was written");
    assert!(health.read().eligible, "the view of the file is in force");
    let (_, mut events) = attach(&mut second);
    play(&mut second, fleet.add_endpoint(1, 6));
    assert_eq!(ack(&mut events).generation, 2);
    assert_eq!(kernel.lock().commits[1..], [1]);
}

#[test]
fn unreadable_kernel_not_resumed() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = MemoryKernel::default();
    let mut fleet = Fleet::new(5, 2);
    drop(with_a_file(&kernel, directory.path(), &fleet));
    kernel.lock().fail = Some(libc::EPERM);
    let (mut second, _) = engine(&kernel, directory.path());
    let (status, mut events) = attach(&mut second);
    assert!(
        status.view.is_none(),
        "resumed, it would count as up to date while its kernel refuses everything"
    );
    fleet.generation += 1;
    play(&mut second, fleet.snapshot());
    match events.try_recv() {
        Ok(Event::Nack(nack)) => {
            assert_eq!((nack.reason, nack.errno), (NackReason::Kernel as i32, libc::EPERM));
        }
        other => panic!("expected a Nack, got {other:?}"),
    }
    // A successful commit proves the kernel's content.
    kernel.lock().fail = None;
    fleet.generation += 1;
    play(&mut second, fleet.snapshot());
    assert_eq!(ack(&mut events).generation, 3);
    assert!(attach(&mut second).0.view.is_some());
}

#[test]
fn rebooted_node_programmed_from_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let fleet = Fleet::new(50, 3);
    let _first = with_a_file(&MemoryKernel::default(), directory.path(), &fleet);
    let rebooted = MemoryKernel::default();
    let _second = engine(&rebooted, directory.path());
    assert_eq!(rebooted.lock().pools.len(), 50);
    assert_eq!(rebooted.lock().stamp.unwrap().digest, fleet.digest.0);
}

#[test]
fn refused_update_leaves_the_kernel_unchanged() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = MemoryKernel::default();
    let (mut engine, _) = engine(&kernel, directory.path());
    let (_, mut events) = attach(&mut engine);
    let mut fleet = Fleet::new(5, 2);
    play(&mut engine, fleet.snapshot());
    ack(&mut events);
    let (mut update, parts) = fleet.add_endpoint(1, 4);
    update.digest[3] ^= 1;
    play(&mut engine, (update, parts));
    match events.try_recv() {
        Ok(Event::Nack(nack)) => {
            assert_eq!(nack.reason, NackReason::DigestMismatch as i32);
            assert_eq!((nack.generation, nack.kept), (2, 1));
        }
        other => panic!("expected a Nack, got {other:?}"),
    }
    assert_eq!(kernel.lock().commits.len(), 1);
    // A snapshot recovers.
    fleet.generation += 1;
    play(&mut engine, fleet.snapshot());
    assert_eq!(ack(&mut events).generation, 3);
    assert_eq!(kernel.lock().commits.len(), 2);
}

#[test]
fn addresses_and_drift_committed_without_a_generation() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = MemoryKernel::default();
    let (mut engine, _) = engine(&kernel, directory.path());
    let (_, mut events) = attach(&mut engine);
    play(&mut engine, Fleet::new(5, 2).snapshot());
    ack(&mut events);
    let facts = kernel.lock().stamp.unwrap().facts;
    engine.handle(Command::HostAddresses(vec!["198.51.100.1".parse().unwrap()]));
    assert_eq!(kernel.lock().commits.len(), 2);
    let stamp = kernel.lock().stamp.unwrap();
    assert_eq!(stamp.generation, 1);
    assert_ne!(stamp.facts, facts);
    assert!(events.try_recv().is_err(), "no Ack without a new generation");
    kernel.lock().differences = 1;
    engine.handle(Command::Drift { cause: DriftCause::Changed, noticed: Instant::now() });
    match events.try_recv() {
        Ok(Event::Report(report)) => {
            assert_eq!((report.drift_repaired, report.drift_cause()), (1, DriftCause::Changed));
        }
        other => panic!("expected a Report, got {other:?}"),
    }
    assert_eq!(kernel.lock().repairs, 1);
    engine.handle(Command::ForeignProxy(true));
    match events.try_recv() {
        Ok(Event::Report(report)) => {
            assert_eq!(report.drift_cause(), DriftCause::Unspecified, "drift is reported once");
        }
        other => panic!("expected a Report, got {other:?}"),
    }
}

#[test]
fn items_accepted_by_a_repair_acknowledged() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = MemoryKernel::default();
    let (mut engine, mut events) = with_a_refused_item(&kernel, directory.path());
    let drift = |engine: &mut Engine| {
        engine.handle(Command::Drift { cause: DriftCause::Changed, noticed: Instant::now() });
    };
    drift(&mut engine);
    assert!(events.try_recv().is_err(), "still refused, and no foreign change");
    kernel.lock().refused.clear();
    drift(&mut engine);
    let ack = ack(&mut events);
    assert_eq!((ack.generation, ack.deviations), (1, None));
    assert!(events.try_recv().is_err(), "no drift was repaired");
    assert_eq!(kernel.lock().repairs, 2);
}

#[test]
fn refused_items_retried_without_a_repair() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = MemoryKernel::default();
    let (mut engine, mut events) = with_a_refused_item(&kernel, directory.path());
    engine.wake();
    assert_eq!(kernel.lock().retries, 0, "not immediately");
    kernel.lock().refused.clear();
    let due = engine.refused_due().unwrap();
    assert!(engine.next_wakeup().unwrap() <= due);
    std::thread::sleep(due.saturating_duration_since(Instant::now()));
    engine.wake();
    let ack = ack(&mut events);
    assert_eq!((ack.generation, ack.deviations), (1, None));
    // One guard at a time: the lock is not reentrant.
    assert_eq!(kernel.lock().retries, 1);
    assert_eq!(kernel.lock().repairs, 0);
    assert_eq!(engine.refused_due(), None);
}

#[test]
fn new_session_receives_the_nack_of_a_failing_kernel() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = MemoryKernel::default();
    let (mut engine, _) = engine(&kernel, directory.path());
    let (_, mut events) = attach(&mut engine);
    let mut fleet = Fleet::new(5, 2);
    play(&mut engine, fleet.snapshot());
    ack(&mut events);
    kernel.lock().fail = Some(libc::EPERM);
    play(&mut engine, fleet.add_endpoint(1, 5));
    assert!(matches!(events.try_recv(), Ok(Event::Nack(_))));
    let (status, mut events) = attach(&mut engine);
    assert_eq!((status.kernel.unwrap().generation, status.view.unwrap().generation), (1, 2));
    retry(&mut engine);
    match events.try_recv() {
        Ok(Event::Nack(nack)) => assert_eq!((nack.generation, nack.errno), (2, libc::EPERM)),
        other => panic!("expected a Nack, got {other:?}"),
    }
}

#[test]
fn last_addresses_committed_after_failures() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = MemoryKernel::default();
    let (mut first, health) = engine(&kernel, directory.path());
    let bound = || health.subscribe().borrow().bind.iter().map(ToString::to_string).collect::<Vec<_>>();
    let mut fleet = Fleet::new(5, 2);
    play(&mut first, fleet.snapshot());
    let everywhere = |bytes: [u8; 4], prefix_length| Cidr { address: bytes.to_vec(), prefix_length };
    let settings =
        Settings { node_port_addresses: vec![everywhere([198, 51, 100, 0], 24)], ..testing::settings() };
    play(&mut first, fleet.replace_settings(settings));
    first.write_last_snapshot();
    let addresses = |number: u8| Command::HostAddresses(vec![IpAddr::from([198, 51, 100, number])]);
    first.handle(addresses(1));
    assert_eq!(bound(), ["198.51.100.1"]);
    kernel.lock().fail = Some(libc::EPERM);
    (2..50).for_each(|number| first.handle(addresses(number)));
    assert_eq!(first.pending.len(), 1);
    assert_eq!(bound(), ["198.51.100.1"], "as in the kernel");
    kernel.lock().fail = None;
    // After so many failures the next attempt is many seconds away.
    first.sync = SyncState::Retrying { at: Instant::now(), attempt: 0 };
    first.wake();
    assert_eq!(bound(), ["198.51.100.49"]);

    // During a hold, addresses are not committed.
    play(&mut first, fleet.add_endpoint(1, 5));
    drop(first);
    let (mut second, health) = engine(&kernel, directory.path());
    let bound = || health.subscribe().borrow().bind.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert!(health.read().eligible, "the kernel forwards, so load balancers may send traffic");
    (2..50).for_each(|number| second.handle(addresses(number)));
    assert_eq!((second.sync.is_held(), second.pending.len()), (true, 0));
    assert_eq!(bound(), ["198.51.100.49"]);
}

#[test]
fn foreign_proxy_reported_to_every_session() {
    let directory = tempfile::tempdir().unwrap();
    let (mut engine, _) = engine(&MemoryKernel::default(), directory.path());
    let foreign = |events: &mut tokio::sync::mpsc::UnboundedReceiver<Event>| match events.try_recv() {
        Ok(Event::Report(report)) => Some(report.foreign_proxy),
        _ => None,
    };
    let (_, mut events) = attach(&mut engine);
    assert_eq!(foreign(&mut events), None, "nothing to report");
    engine.handle(Command::ForeignProxy(true));
    assert_eq!(foreign(&mut events), Some(true));
    let (_, mut events) = attach(&mut engine);
    assert_eq!(foreign(&mut events), Some(true), "a new session has no earlier report");
    engine.handle(Command::ForeignProxy(false));
    assert_eq!(foreign(&mut events), Some(false));
    let (_, mut events) = attach(&mut engine);
    assert_eq!(foreign(&mut events), None);
}

#[test]
fn fixture_and_state_agree() {
    assert_eq!(testing::state(3, 2).digest(), Fleet::new(3, 2).digest);
}

#[test]
fn frontends_at_controllers_removed_during_a_hold() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = MemoryKernel::default();
    let mut fleet = Fleet::new(2, 2);
    let mut first = with_a_file(&kernel, directory.path(), &fleet);
    play(&mut first, fleet.add_endpoint(0, 3));
    // Killed: the kernel is newer than the file.
    drop(first);
    let commits = kernel.lock().commits.len();
    let (mut second, _) = engine(&kernel, directory.path());
    assert!(second.sync.is_held());
    let controller: SocketAddr = "192.0.2.9:9443".parse().unwrap();
    let (done, mut attempted) = oneshot::channel();
    second.handle(Command::Controllers { addresses: vec![controller], done });
    assert_eq!(attempted.try_recv(), Err(oneshot::error::TryRecvError::Closed), "the session continues");
    assert_eq!(kernel.lock().released, [controller]);
    assert_eq!((second.sync.is_held(), kernel.lock().commits.len()), (true, commits), "no other write");
}
