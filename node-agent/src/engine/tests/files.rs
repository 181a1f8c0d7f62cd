//! The state directory: maximum age of a view, stalled disks.

use super::*;

/// Dates the snapshot file back by some hours.
fn age(directory: &std::path::Path, hours: u64) {
    let file = std::fs::File::open(directory.join("view.snapshot")).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(hours * 3600)).unwrap();
}

#[test]
fn expired_view_not_programmed_without_tables() {
    let directory = tempfile::tempdir().unwrap();
    let mut fleet = Fleet::new(5, 2);
    drop(with_a_file(&MemoryKernel::default(), directory.path(), &fleet));
    age(directory.path(), 2);
    let rebooted = MemoryKernel::default();
    let (mut second, health) = engine(&rebooted, directory.path());
    assert!(rebooted.lock().stamp.is_none(), "nothing is programmed");
    assert!(!health.read().holds_view);
    let (status, mut events) = attach(&mut second);
    assert!(status.view.is_none(), "the controller sends everything");
    fleet.generation += 1;
    play(&mut second, fleet.snapshot());
    assert_eq!(ack(&mut events).generation, 2);
    assert!(health.read().holds_view);
}

#[test]
fn expired_view_in_the_kernel_stays_in_force() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = MemoryKernel::default();
    drop(with_a_file(&kernel, directory.path(), &Fleet::new(5, 2)));
    age(directory.path(), 2);
    let (mut second, health) = engine(&kernel, directory.path());
    assert!(health.read().holds_view);
    assert!(attach(&mut second).0.view.is_some());
}

#[test]
fn old_view_programmed_without_a_limit() {
    let directory = tempfile::tempdir().unwrap();
    drop(with_a_file(&MemoryKernel::default(), directory.path(), &Fleet::new(5, 2)));
    age(directory.path(), 10_000);
    let kernel = MemoryKernel::default();
    let (prober, passes) = (testing::NotingProber::default(), NotedPasses::default());
    let parts = parts(&kernel, directory.path(), &Health::default(), &prober, &passes);
    let _second = Engine::start(Parts { snapshot_limit: None, ..parts });
    assert!(kernel.lock().stamp.is_some());
}

#[test]
fn unchanged_view_confirmed() {
    let directory = tempfile::tempdir().unwrap();
    let mut engine = with_a_file(&MemoryKernel::default(), directory.path(), &Fleet::new(5, 2));
    age(directory.path(), 2);
    let due = engine.snapshot_due().expect("the file is confirmed eventually");
    assert!(due > Instant::now() + Duration::from_secs(60));
    engine.keep_snapshot();
    assert!(engine.parts.files.flush(Duration::from_secs(20)));
    let age = engine.parts.snapshot.as_ref().unwrap().age(SystemTime::now()).unwrap();
    assert!(age < Duration::from_secs(60), "{age:?}");
}

#[test]
fn stalled_disk_does_not_delay_commits() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = MemoryKernel::default();
    let (mut engine, _) = engine(&kernel, directory.path());
    let (_, mut events) = attach(&mut engine);
    // Opening a pipe blocks until the other side opens, like a disk that does not answer.
    let pipe = directory.path().join("view.new");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let mut fleet = Fleet::new(5, 2);
    play(&mut engine, fleet.snapshot());
    engine.keep_snapshot();
    let began = Instant::now();
    play(&mut engine, fleet.add_endpoint(3, 5));
    assert_eq!((ack(&mut events).generation, ack(&mut events).generation), (1, 2));
    assert!(began.elapsed() < Duration::from_secs(5));
    drop(std::fs::File::open(&pipe).unwrap());
}
