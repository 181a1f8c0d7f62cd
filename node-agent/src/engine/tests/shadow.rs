//! Mode Shadow.

use super::*;

#[test]
fn flows_of_another_proxy_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let (kernel, passes, health) = (MemoryKernel::default(), NotedPasses::default(), Health::default());
    let prober = testing::NotingProber::default();
    let mut engine = Engine::start(parts(&kernel, directory.path(), &health, &prober, &passes));
    let (_, mut events) = attach(&mut engine);
    let mut fleet = Fleet::new(5, 2);
    let shadow = Settings { mode: ProxyMode::Shadow.into(), ..testing::settings() };
    drop(fleet.replace_settings(shadow));
    play(&mut engine, fleet.snapshot());
    assert_eq!(ack(&mut events).mode(), ProxyMode::Shadow);
    assert!(passes.end(&mut engine).is_none(), "no pass in mode Shadow");
    assert_eq!(*health.mode().borrow(), ProxyMode::Shadow);
    play(&mut engine, fleet.replace_settings(testing::settings()));
    assert_eq!(ack(&mut events).mode(), ProxyMode::Active);
    assert!(passes.end(&mut engine).is_some(), "one pass begins with mode Active");
    assert_eq!(*health.mode().borrow(), ProxyMode::Active);
}
