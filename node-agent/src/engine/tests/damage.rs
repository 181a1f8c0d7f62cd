//! Consequences of rules that were missing or wrong for some time.

use super::*;
use crate::state::Measured;

/// Returns an engine that holds a fleet and needs no pass over the conntrack table, with its passes.
fn settled(kernel: &MemoryKernel, directory: &std::path::Path) -> (Engine, NotedPasses, Fleet) {
    let passes = NotedPasses::default();
    let (health, prober) = (Health::default(), testing::NotingProber::default());
    let mut engine = Engine::start(parts(kernel, directory, &health, &prober, &passes));
    let fleet = Fleet::new(5, 2);
    play(&mut engine, fleet.snapshot());
    while passes.end(&mut engine).is_some() {
        engine.wake();
    }
    (engine, passes, fleet)
}

const BOTH: Option<Families> = Some(Families { ipv4: true, ipv6: true });

#[test]
fn flows_reconciled_after_a_repair() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = MemoryKernel::default();
    let (mut engine, passes, _) = settled(&kernel, directory.path());
    let drift = |engine: &mut Engine| {
        engine.handle(Command::Drift { cause: DriftCause::Changed, noticed: Instant::now() });
        engine.wake();
    };
    drift(&mut engine);
    assert_eq!(passes.end(&mut engine), None, "no difference");
    kernel.lock().differences = 1;
    drift(&mut engine);
    assert_eq!(passes.end(&mut engine), BOTH);
    // A failed repair leads to a full comparison.
    kernel.lock().fail = Some(libc::EPERM);
    std::thread::sleep(Duration::from_millis(150));
    drift(&mut engine);
    assert_eq!(passes.end(&mut engine), None, "not while rules are missing");
    kernel.lock().fail = None;
    kernel.lock().pools.clear();
    retry(&mut engine);
    engine.wake();
    assert_eq!(passes.end(&mut engine), BOTH);
}

#[test]
fn flows_reconciled_after_settings_and_addresses_change() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = MemoryKernel::default();
    let (mut engine, passes, mut fleet) = settled(&kernel, directory.path());
    let cidr = Cidr { address: vec![198, 51, 100, 0], prefix_length: 24 };
    let settings = Settings { node_port_addresses: vec![cidr], ..testing::settings() };
    play(&mut engine, fleet.replace_settings(settings));
    engine.wake();
    assert_eq!(passes.end(&mut engine), BOTH, "settings");
    engine.handle(Command::HostAddresses(vec!["198.51.100.1".parse().unwrap()]));
    engine.wake();
    assert_eq!(passes.end(&mut engine), BOTH, "addresses");
    engine.wake();
    assert_eq!(passes.end(&mut engine), None);
}

#[test]
fn flows_of_one_family_reconciled_while_the_other_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = MemoryKernel::default();
    let (mut engine, passes, mut fleet) = settled(&kernel, directory.path());
    kernel.lock().refused_family = Some("IPv6");
    let cidr = Cidr { address: vec![198, 51, 100, 0], prefix_length: 24 };
    play(
        &mut engine,
        fleet.replace_settings(Settings { node_port_addresses: vec![cidr], ..testing::settings() }),
    );
    engine.wake();
    assert_eq!(passes.end(&mut engine), Some(Families { ipv4: true, ipv6: false }));
    engine.wake();
    assert_eq!(passes.end(&mut engine), None, "IPv6 has its old rules");
    kernel.lock().refused_family = None;
    retry(&mut engine);
    engine.wake();
    assert_eq!(passes.end(&mut engine), Some(Families { ipv4: false, ipv6: true }));
}

#[test]
fn flows_reconciled_after_a_rollback() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = MemoryKernel::default();
    let (passes, prober) = (NotedPasses::default(), testing::NotingProber::default());
    let mut engine = Engine::start(parts(&kernel, directory.path(), &Health::default(), &prober, &passes));
    let mut fleet = Fleet::new(5, 2);
    play(&mut engine, fleet.snapshot());
    let tried = crate::testing::settings_on_trial(0);
    play(&mut engine, fleet.replace_settings(tried));
    let round = |engine: &mut Engine, passes_probe: bool| {
        let round = prober.take().expect("a round of probes");
        let outcome = if passes_probe {
            crate::state::ProbeOutcome::Passed { seen: Default::default() }
        } else {
            crate::state::ProbeOutcome::Failed { errno: libc::ECONNREFUSED, detail: "refused".into() }
        };
        let one = |target: &crate::state::Target| Measured {
            probe: target.probe.name.clone(),
            address: target.address,
            outcome: outcome.clone(),
        };
        let measured = round.targets.iter().map(one).collect();
        engine.handle(Command::Probed { number: round.number, measured });
    };
    round(&mut engine, true);
    while passes.end(&mut engine).is_some() {
        engine.wake();
    }
    round(&mut engine, false);
    engine.wake();
    assert_eq!(passes.end(&mut engine), BOTH);
}

#[test]
fn newer_kernel_repaired_from_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = MemoryKernel::default();
    let mut fleet = Fleet::new(5, 2);
    let mut first = with_a_file(&kernel, directory.path(), &fleet);
    play(&mut first, fleet.add_endpoint(3, 5));
    drop(first);
    let (mut second, _) = engine(&kernel, directory.path());
    assert!(second.sync.is_held());
    kernel.lock().frontends.clear();
    second.handle(Command::Drift { cause: DriftCause::Changed, noticed: Instant::now() });
    assert_eq!(kernel.lock().frontends.len(), 5, "flushed chains are restored");
    let (status, _events) = attach(&mut second);
    assert_eq!(status.kernel.unwrap().generation, 1);
    assert_eq!(status.view.unwrap().generation, 1);
}
