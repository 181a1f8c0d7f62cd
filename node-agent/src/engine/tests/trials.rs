//! Trials of settings: settings in the kernel, reports, restarts.

use switchtower_proto::v1::{Settings, SettingsCause, TrialPhase};

use super::*;
use crate::state::{Measured, ProbeOutcome, Seen};
use crate::testing::{NotingProber, settings_on_trial};

/// An engine with a programmed kernel, connected.
struct Node {
    kernel: MemoryKernel,
    directory: tempfile::TempDir,
    fleet: Fleet,
    engine: Engine,
    prober: NotingProber,
    events: mpsc::UnboundedReceiver<Event>,
}

impl Node {
    fn new() -> Self {
        let (kernel, directory) = (MemoryKernel::default(), tempfile::tempdir().unwrap());
        let (mut engine, _, prober) = probing_engine(&kernel, directory.path());
        let (_, mut events) = attach(&mut engine);
        let fleet = Fleet::new(5, 2);
        play(&mut engine, fleet.snapshot());
        assert!(ack(&mut events).deviations.is_none());
        Node { kernel, directory, fleet, engine, prober, events }
    }

    fn begin(&mut self) {
        let update = self.fleet.replace_settings(settings_on_trial(0));
        play(&mut self.engine, update);
    }

    fn in_force(&self) -> u64 {
        self.kernel.lock().settings.as_ref().unwrap().revision
    }

    /// Answers the round that the engine started.
    fn round(&mut self, passes: bool) {
        let round = self.prober.take().expect("a round was started");
        let outcome = || match passes {
            true => ProbeOutcome::Passed { seen: Seen::new() },
            false => ProbeOutcome::Failed { errno: libc::ECONNREFUSED, detail: "refused".into() },
        };
        let measured = round.targets.iter().map(|target| {
            assert_eq!((target.address, &target.absent), (Some("10.96.0.0:80".parse().unwrap()), &None));
            Measured { probe: target.probe.name.clone(), address: target.address, outcome: outcome() }
        });
        let (number, measured) = (round.number, measured.collect());
        self.engine.handle(Command::Probed { number, measured });
    }

    fn report(&mut self) -> switchtower_proto::v1::TrialStatus {
        match self.events.try_recv() {
            Ok(Event::Report(report)) => report.trial.expect("the trial's status"),
            other => panic!("expected a Report, got {other:?}"),
        }
    }

    /// Returns the settings deviation of the Ack of this generation.
    fn deviation(&mut self, generation: u64) -> Option<(u64, SettingsCause)> {
        let ack = ack(&mut self.events);
        assert_eq!(ack.generation, generation);
        let settings = ack.deviations?.settings?;
        Some((settings.revision, settings.cause()))
    }

    /// Kills the agent and starts the next one, with a current snapshot file or an old one.
    fn restart(&mut self, current: bool) -> AgentStatus {
        if current {
            self.engine.write_last_snapshot();
        }
        let (engine, _, prober) = probing_engine(&self.kernel, self.directory.path());
        (self.engine, self.prober) = (engine, prober);
        let (status, events) = attach(&mut self.engine);
        self.events = events;
        status
    }
}

#[test]
fn good_settings_enter_into_force_without_a_generation() {
    let mut node = Node::new();
    node.begin();
    assert_eq!(node.report().phase(), TrialPhase::Before);
    assert_eq!(node.deviation(2), Some((0, SettingsCause::Trial)), "acknowledged with the old settings");
    assert_eq!(node.in_force(), 0);
    // Other changes do not wait for the trial.
    let update = node.fleet.add_endpoint(3, 5);
    play(&mut node.engine, update);
    assert_eq!(node.deviation(3), Some((0, SettingsCause::Trial)));
    node.round(true);
    assert_eq!((node.in_force(), node.report().phase()), (2, TrialPhase::Watching));
    assert_eq!(node.deviation(3), None, "the same generation again, without a deviation");
    assert!(node.kernel.lock().settings.as_ref().unwrap().trial.is_none());
    node.round(true);
    let status = node.report();
    assert_eq!((status.phase(), status.revision), (TrialPhase::Passed, 2));
    assert!(status.results[0].ok_before && status.results[0].ok_after);
    assert!(node.events.try_recv().is_err() && node.prober.take().is_none());
    // The trial is complete: only the stamp is committed.
    let update = node.fleet.replace_settings(Settings { trial: None, ..settings_on_trial(0) });
    play(&mut node.engine, update);
    assert_eq!((node.deviation(4), node.in_force()), (None, 2));
}

#[test]
fn bad_settings_rolled_back_without_a_controller() {
    let mut node = Node::new();
    node.begin();
    let (gone, events) = mpsc::unbounded_channel();
    drop(gone);
    node.events = events;
    node.round(true);
    assert_eq!(node.in_force(), 2);
    node.round(false);
    assert_eq!(node.in_force(), 0);
    node.round(true);
    // Hello reports it to the next controller.
    let (status, events) = attach(&mut node.engine);
    node.events = events;
    let settings = status.deviations.unwrap().settings.unwrap();
    assert_eq!((settings.profile.as_str(), settings.revision), ("builtin", 0));
    assert_eq!(settings.cause(), SettingsCause::RolledBack);
    let trial = status.trial.unwrap();
    assert_eq!((trial.phase(), trial.profile.as_str()), (TrialPhase::RolledBack, "default"));
    let result = &trial.results[0];
    assert!(result.failed && result.ok_again, "{result:?}");
    assert_eq!(result.errno, libc::ECONNREFUSED);
    // Endpoints keep changing.
    let update = node.fleet.add_endpoint(3, 5);
    play(&mut node.engine, update);
    assert_eq!(node.deviation(3), Some((0, SettingsCause::RolledBack)));
    assert_eq!(node.in_force(), 0);
}

#[test]
fn trial_resumed_after_a_kill_in_any_phase() {
    // The snapshot file predates the trial, so that the controller sends the settings again; or it is current.
    for current in [false, true] {
        for (rounds, in_force, phase) in [
            (&[][..], 0, TrialPhase::Before),
            (&[true][..], 2, TrialPhase::Watching),
            (&[true, true][..], 2, TrialPhase::Passed),
            (&[true, false][..], 0, TrialPhase::RolledBack),
        ] {
            let mut node = Node::new();
            node.engine.write_last_snapshot();
            node.begin();
            rounds.iter().for_each(|passes| node.round(*passes));
            let commits = node.kernel.lock().commits.len();
            let status = node.restart(current);
            assert_eq!(node.kernel.lock().commits.len(), commits, "no write");
            if current {
                assert_eq!(status.trial.unwrap().phase(), phase);
            } else {
                let mut again = Fleet::new(5, 2);
                play(&mut node.engine, again.replace_settings(settings_on_trial(0)));
                assert_eq!(node.deviation(2).is_some(), in_force == 0);
            }
            assert_eq!(node.in_force(), in_force, "{phase:?}, current: {current}");
            assert_eq!(node.engine.state.trial_status().unwrap().phase(), phase);
            match phase {
                TrialPhase::Before => node.round(true),
                TrialPhase::Watching => node.round(false),
                TrialPhase::RolledBack => node.round(true),
                _ => assert!(node.prober.take().is_none()),
            }
            let expected = match phase {
                TrialPhase::Before | TrialPhase::Passed => 2,
                _ => 0,
            };
            assert_eq!(node.in_force(), expected, "{phase:?}, current: {current}");
        }
    }
}

#[test]
fn trial_waits_for_the_kernel() {
    let mut node = Node::new();
    node.kernel.lock().fail = Some(libc::EPERM);
    node.begin();
    assert!(node.prober.take().is_none(), "no probe before the commit");
    node.kernel.lock().fail = None;
    node.engine.sync = SyncState::Queued;
    node.engine.wake();
    node.round(true);
    assert_eq!(node.in_force(), 2);
}

#[test]
fn refused_switch_reported_and_retried() {
    let mut node = Node::new();
    node.begin();
    assert_eq!(node.report().phase(), TrialPhase::Before);
    assert!(node.deviation(2).is_some());
    node.kernel.lock().fail = Some(libc::ENOMEM);
    node.round(true);
    assert_eq!((node.in_force(), node.report().phase()), (0, TrialPhase::Watching));
    match node.events.try_recv() {
        Ok(Event::Nack(nack)) => assert_eq!((nack.generation, nack.errno), (2, libc::ENOMEM)),
        other => panic!("expected a Nack, got {other:?}"),
    }
    assert!(node.prober.take().is_none(), "no probe before the switch");
    node.kernel.lock().fail = None;
    node.engine.sync = SyncState::Queued;
    node.engine.wake();
    assert_eq!((node.deviation(2), node.in_force()), (None, 2));
    node.round(true);
    assert_eq!(node.report().phase(), TrialPhase::Passed);
}
