//! The delete budget: what the kernel keeps, what is acknowledged, and what releases it.

use switchtower_proto::v1::{Endpoint, FrontendKey, PoolKey};

use super::*;
use crate::testing::{endpoint, frontend, pool_key};

/// Number of Services and of their items: one pool and one frontend each.
const SERVICES: u32 = 200;

struct Node {
    _directory: tempfile::TempDir,
    kernel: MemoryKernel,
    fleet: Fleet,
    engine: Engine,
    events: mpsc::UnboundedReceiver<Event>,
}

fn at(generation: u64, services: u32, endpoints: u32) -> Fleet {
    let mut fleet = Fleet::new(services, endpoints);
    fleet.generation = generation;
    fleet
}

fn node() -> Node {
    let directory = tempfile::tempdir().unwrap();
    let kernel = MemoryKernel::default();
    let fleet = Fleet::new(SERVICES, 2);
    let mut engine = with_a_file(&kernel, directory.path(), &fleet);
    let (_, events) = attach(&mut engine);
    Node { _directory: directory, kernel, fleet, engine, events }
}

impl Node {
    /// Plays an update; returns the acknowledged generation and the reported number of held removals.
    fn play(&mut self, update: (Update, Vec<Part>)) -> (u64, u32) {
        play(&mut self.engine, update);
        self.acknowledged()
    }

    fn acknowledged(&mut self) -> (u64, u32) {
        let ack = ack(&mut self.events);
        assert_eq!(
            ack.digest,
            self.fleet.digest.to_bytes(),
            "the acknowledged digest is of the desired view"
        );
        (ack.generation, ack.deviations.map_or(0, |deviations| deviations.held))
    }

    fn remove(&mut self, services: std::ops::Range<u32>, frontends: bool) -> (u64, u32) {
        let update = self.fleet.remove(services, frontends);
        self.play(update)
    }

    fn release(&mut self, before: u64) -> (u64, u32) {
        self.engine.handle(Command::ReleaseHeld { before });
        self.acknowledged()
    }

    /// Numbers of pools with a member, and of frontends, in the kernel.
    fn kernel(&self) -> (usize, usize) {
        let memory = self.kernel.lock();
        (memory.pools.values().filter(|pool| !pool.is_empty()).count(), memory.frontends.len())
    }

    fn members(&self, key: &PoolKey) -> Option<Vec<Endpoint>> {
        self.kernel.lock().pools.get(key).map(|pool| pool.iter().cloned().collect())
    }

    fn has(&self, key: &FrontendKey) -> bool {
        self.kernel.lock().frontends.contains_key(key)
    }
}

#[test]
fn removals_within_the_budget_not_delayed() {
    let mut node = node();
    assert_eq!(node.remove(0..100, false), (2, 0), "100 of 400 items");
    assert_eq!(node.kernel(), (100, 200));
}

#[test]
fn removed_namespace_held_until_released() {
    let mut node = node();
    assert_eq!(node.remove(0..101, true), (2, 202));
    assert_eq!(node.kernel(), (200, 200), "nothing is gone");
    let (update, parts) = node.fleet.add_endpoint(150, 6);
    assert_eq!(node.play((update, parts)), (3, 202), "other changes are applied");
    assert_eq!(node.members(&pool_key(150)).unwrap().len(), 3);
    node.engine.handle(Command::ReleaseHeld { before: 2 });
    assert!(node.events.try_recv().is_err(), "only of earlier generations");
    assert_eq!(node.release(3), (3, 0));
    assert_eq!(node.kernel(), (99, 99));
}

/// A source that lists nothing, everything, and nothing again.
#[test]
fn held_items_that_returned_are_held_again() {
    let mut node = node();
    node.fleet = at(2, 0, 0);
    let update = node.fleet.snapshot();
    assert_eq!(node.play(update), (2, 400));
    // More than a minute later.
    node.engine.state.forget_window();
    node.fleet = at(3, SERVICES, 2);
    let update = node.fleet.snapshot();
    assert_eq!(node.play(update), (3, 0));
    node.fleet = at(4, 0, 0);
    let update = node.fleet.snapshot();
    assert_eq!(node.play(update), (4, 400), "they are no new items");
    assert_eq!(node.kernel(), (200, 200));
    node.engine.state.forget_window();
    assert_eq!(node.release(5), (4, 0));
    assert_eq!(node.kernel(), (0, 0));
}

#[test]
fn ack_names_held_items() {
    let mut node = node();
    let update = node.fleet.remove(0..150, true);
    play(&mut node.engine, update);
    let deviations = ack(&mut node.events).deviations.unwrap();
    assert_eq!((deviations.held, deviations.refused, deviations.samples.len()), (300, 0, 16));
    let first = &deviations.samples[0];
    assert_eq!(first.item, "frontend 10.96.0.0:80/TCP (namespace-0/service-0)");
    assert_eq!(first.reason, "removal held by the delete budget since generation 2");
    let (status, _) = attach(&mut node.engine);
    assert_eq!(status.deviations, Some(deviations), "Hello reports the same");
    assert_eq!(node.kernel.lock().stamp.unwrap().deviations, 300);
}

#[test]
fn empty_snapshot_empties_nothing() {
    let mut node = node();
    let generation = node.fleet.generation + 1;
    node.fleet = at(generation, 0, 0);
    let update = node.fleet.snapshot();
    assert_eq!(node.play(update), (2, 400));
    assert_eq!(node.kernel(), (200, 200));
    // The complete view again: nothing is held, nothing was interrupted.
    node.fleet = at(3, SERVICES, 2);
    let update = node.fleet.snapshot();
    assert_eq!(node.play(update), (3, 0));
    assert_eq!(node.kernel(), (200, 200));
    assert_eq!(node.engine.state.held(), 0);
}

#[test]
fn pool_with_a_member_never_held() {
    let mut node = node();
    node.fleet = at(2, SERVICES, 1);
    let update = node.fleet.snapshot();
    assert_eq!(node.play(update), (2, 0));
    assert!((0..SERVICES).all(|number| node.members(&pool_key(number)).unwrap().len() == 1));
}

#[test]
fn returning_pool_ends_its_hold() {
    let mut node = node();
    assert_eq!(node.remove(0..150, false), (2, 150));
    let update = node.fleet.add_pool(pool_key(7), vec![endpoint(7, 1), endpoint(7, 5)]);
    assert_eq!(node.play(update), (3, 149));
    assert_eq!(node.members(&pool_key(7)).unwrap(), [endpoint(7, 1), endpoint(7, 5)]);
}

#[test]
fn reused_address_released_from_held_pools() {
    let mut node = node();
    assert_eq!(node.remove(0..150, false), (2, 150));
    // The pod address now belongs to another Service.
    let update = node.fleet.add_pool(pool_key(900), vec![endpoint(7, 0)]);
    assert_eq!(node.play(update), (3, 150));
    assert_eq!(node.members(&pool_key(7)).unwrap(), [endpoint(7, 1)]);
    let update = node.fleet.add_pool(pool_key(901), vec![endpoint(7, 1)]);
    assert_eq!(node.play(update), (4, 149));
    assert_eq!(node.members(&pool_key(7)), None);
}

#[test]
fn reused_service_address_releases_its_frontends() {
    let mut node = node();
    assert_eq!(node.remove(0..150, true), (2, 300));
    let mut other = frontend(900);
    let key = other.key.as_mut().unwrap();
    *key = FrontendKey { port: 8080, ..frontend(7).key.unwrap() };
    let update = node.fleet.add_frontend(other);
    assert_eq!(node.play(update), (3, 299));
    assert!(!node.has(&frontend(7).key.unwrap()));
    assert!(node.has(&frontend(8).key.unwrap()));
}

#[test]
fn pool_of_a_deleted_service_released() {
    let mut node = node();
    assert_eq!(node.remove(0..150, false), (2, 150));
    node.engine.state.forget_window();
    assert_eq!(node.remove(7..8, true), (3, 149));
    assert_eq!((node.members(&pool_key(7)), node.has(&frontend(7).key.unwrap())), (None, false));
}

#[test]
fn holds_survive_a_restart() {
    let mut node = node();
    assert_eq!(node.remove(0..150, true), (2, 300));
    node.engine.write_last_snapshot();
    let commits = node.kernel.lock().commits.len();
    let directory = &node._directory;
    drop(std::mem::replace(&mut node.engine, engine(&node.kernel, directory.path()).0));
    assert_eq!(node.kernel(), (200, 200));
    assert_eq!(node.kernel.lock().commits.len(), commits, "the restart writes nothing");
    let (status, events) = attach(&mut node.engine);
    assert_eq!(status.deviations.unwrap().held, 300);
    node.events = events;
    assert_eq!(node.release(u64::MAX), (2, 0));
    assert_eq!(node.kernel(), (50, 50));
}

#[test]
fn restart_without_a_current_file_holds_again() {
    let mut node = node();
    let before = node.fleet.clone();
    let update = node.fleet.remove(0..150, true);
    play(&mut node.engine, update.clone());
    // Killed: the file has the view of generation 1.
    let (mut second, _) = engine(&node.kernel, node._directory.path());
    assert_eq!(second.state.digest(), before.digest);
    let (_, events) = attach(&mut second);
    (node.engine, node.events) = (second, events);
    assert_eq!(node.play(update), (2, 300));
    assert_eq!(node.kernel(), (200, 200));
}

#[test]
fn rebooted_node_programs_held_items() {
    let mut node = node();
    assert_eq!(node.remove(0..150, true), (2, 300));
    node.engine.write_last_snapshot();
    node.kernel = MemoryKernel::default();
    let (_engine, _) = engine(&node.kernel, node._directory.path());
    assert_eq!(node.kernel(), (200, 200));
}

#[test]
fn release_in_advance_holds_nothing() {
    let mut node = node();
    node.engine.handle(Command::ReleaseHeld { before: 3 });
    assert_eq!(node.remove(0..150, true), (2, 0));
    assert_eq!(node.kernel(), (50, 50));
}

#[test]
fn failed_commit_keeps_the_hold() {
    let mut node = node();
    node.kernel.lock().fail = Some(libc::ENOMEM);
    let update = node.fleet.remove(0..150, true);
    play(&mut node.engine, update);
    assert!(matches!(node.events.try_recv(), Ok(Event::Nack(_))));
    node.kernel.lock().fail = None;
    retry(&mut node.engine);
    assert_eq!(node.acknowledged(), (2, 300));
    assert_eq!(node.kernel(), (200, 200));
}

#[test]
fn health_check_of_a_held_service_keeps_its_answer() {
    let mut node = node();
    let key = HealthCheckKey { namespace: "namespace-1".into(), name: "service-1".into() };
    let check = HealthCheck { key: Some(key), port: 30_000, ready_ipv4: 2, ready_ipv6: 0 };
    let update = node.fleet.health_check(LayerKind::Node, None, check);
    node.play(update);
    let ready = |node: &Node| -> Vec<u32> {
        HealthTargets::of(&node.engine.state, &[]).checks.values().map(|check| check.ready_ipv4).collect()
    };
    // One update empties the Services and their health checks.
    let generation = node.fleet.generation + 1;
    node.fleet = at(generation, 0, 0);
    let update = node.fleet.snapshot();
    node.play(update);
    assert_eq!(ready(&node), [2]);
    node.release(u64::MAX);
    assert!(ready(&node).is_empty());
}
