//! The machine as tables: what happens, and what is in force afterwards.

use super::super::evidence::{ProbeOutcome, Seen};
use super::*;

const START: u64 = 1_000;

fn settings(revision: u64) -> Settings {
    Settings { profile: "default".into(), revision, ..Settings::default() }
}

fn probe(name: &str) -> Probe {
    Probe { name: name.into(), namespace: "default".into(), service: name.into(), ..Probe::default() }
}

/// Settings that are tried with one probe for two seconds and a half.
fn on_trial(revision: u64, fallback: u64) -> Settings {
    let trial = Trial {
        probes: vec![probe("web")],
        window_milliseconds: 2_500,
        fallback: Some(Box::new(settings(fallback))),
    };
    Settings { trial: Some(Box::new(trial)), ..settings(revision) }
}

fn measured(outcome: ProbeOutcome) -> Vec<Measured> {
    vec![Measured { probe: "web".into(), address: Some("10.96.0.1:80".parse().unwrap()), outcome }]
}

fn passed() -> Vec<Measured> {
    measured(ProbeOutcome::Passed { seen: Seen::new() })
}

fn failed() -> Vec<Measured> {
    measured(ProbeOutcome::Failed { errno: 111, detail: "refused".into() })
}

fn absent() -> Vec<Measured> {
    measured(ProbeOutcome::Absent { detail: "no endpoint".into() })
}

/// Backends with what they saw.
fn saw(seen: &[(&str, &[&str])]) -> Vec<Measured> {
    let seen = seen.iter().map(|(backend, sources)| {
        ((*backend).to_owned(), sources.iter().map(|source| source.parse().unwrap()).collect())
    });
    measured(ProbeOutcome::Passed { seen: seen.collect() })
}

/// A machine with its clock, in milliseconds.
struct Bench {
    trials: Trials,
    origin: Instant,
    now: u64,
    log: Vec<(u64, TrialPhase)>,
}

impl Bench {
    fn new() -> Self {
        let mut bench =
            Bench { trials: Trials::default(), origin: Instant::now(), now: START, log: Vec::new() };
        bench.desire(&settings(1));
        bench.log.clear();
        bench
    }

    fn at(&self) -> Instant {
        self.origin + Duration::from_millis(self.now)
    }

    fn in_force(&self) -> u64 {
        self.trials.in_force().unwrap().revision
    }

    fn phase(&self) -> TrialPhase {
        self.trials.record().map_or(TrialPhase::Unspecified, |record| record.phase)
    }

    fn note(&mut self, moved: TrialEffect) {
        if moved.status || moved.settings {
            self.log.push((self.in_force(), self.phase()));
        }
    }

    fn desire(&mut self, desired: &Settings) {
        let moved = self.trials.desire(desired);
        self.note(moved);
    }

    /// Runs the round that is due; it takes 10 ms.
    fn round(&mut self, results: Vec<Measured>) -> bool {
        let Some((number, probes)) = self.trials.round(self.at()) else { return false };
        assert_eq!(probes, [probe("web")]);
        assert_eq!(self.trials.round(self.at()), None, "one at a time");
        self.now += 10;
        let moved = self.trials.measured(number, results, self.at());
        self.note(moved);
        true
    }

    /// Waits for the next round and runs it.
    fn next_round(&mut self, results: Vec<Measured>) {
        let due = self.trials.due().expect("a round is due by itself");
        assert!(!self.round(passed()), "not before");
        self.now = due.duration_since(self.origin).as_millis() as u64;
        assert!(self.round(results));
    }

    fn cause(&self) -> Option<(u64, SettingsCause)> {
        self.trials.deviation().map(|deviation| (deviation.revision, deviation.cause()))
    }

    /// The machine after a restart of the agent, with the view's settings as `desired`.
    fn restart(&mut self, desired: &Settings) {
        let record = self.trials.record().cloned();
        self.trials = Trials::default();
        self.trials.desire(desired);
        record.into_iter().for_each(|record| {
            self.trials.remember(record);
        });
    }
}

#[test]
fn good_settings_pass_when_the_window_is_over() {
    let mut bench = Bench::new();
    bench.desire(&on_trial(2, 1));
    assert_eq!((bench.in_force(), bench.cause()), (1, Some((1, SettingsCause::Trial))));
    assert!(bench.round(passed()), "the baseline");
    assert_eq!((bench.in_force(), bench.cause()), (2, None));
    assert!(bench.round(passed()), "at once after the switch");
    bench.next_round(passed());
    bench.next_round(passed());
    assert_eq!(bench.phase(), TrialPhase::Watching);
    bench.next_round(passed());
    assert_eq!(bench.now, START + 2_500 + 20, "the last round is at the window's end");
    assert_eq!(bench.phase(), TrialPhase::Passed);
    assert!(!bench.round(passed()) && bench.trials.due().is_none(), "and that is all");
    let first_results = (2, TrialPhase::Watching);
    let expected =
        [(1, TrialPhase::Before), (2, TrialPhase::Watching), first_results, (2, TrialPhase::Passed)];
    assert_eq!(bench.log, expected);
    // The rollout is complete: the same settings, no longer on trial.
    bench.desire(&settings(2));
    assert_eq!((bench.in_force(), bench.phase(), bench.cause()), (2, TrialPhase::Unspecified, None));
}

#[test]
fn failing_probe_restores_the_fallback() {
    for rounds in 0..3 {
        let mut bench = Bench::new();
        bench.desire(&on_trial(2, 1));
        bench.round(passed());
        let round = |bench: &mut Bench, first: bool, results| {
            if first { assert!(bench.round(results)) } else { bench.next_round(results) }
        };
        (0..rounds).for_each(|number| round(&mut bench, number == 0, passed()));
        round(&mut bench, rounds == 0, failed());
        assert_eq!((bench.in_force(), bench.cause()), (1, Some((1, SettingsCause::RolledBack))));
        let status = bench.trials.status().unwrap();
        assert_eq!((status.revision, status.phase()), (2, TrialPhase::RolledBack));
        let result = &status.results[0];
        assert!(result.ok_before && !result.ok_after && result.failed && !result.ok_again);
        assert_eq!((result.errno, result.address.as_str()), (111, "10.96.0.1:80"));
        assert!(bench.round(passed()), "whether the fallback helped");
        assert!(bench.trials.status().unwrap().results[0].ok_again);
        assert!(!bench.round(passed()) && bench.trials.due().is_none(), "and that is all");
        // The same revision again: never by itself.
        bench.desire(&on_trial(2, 1));
        assert_eq!((bench.in_force(), bench.phase()), (1, TrialPhase::RolledBack));
        // Without a trial it is an order.
        bench.desire(&settings(2));
        assert_eq!((bench.in_force(), bench.cause()), (2, None));
    }
}

#[test]
fn only_regressions_count() {
    let bridge: &[(&str, &[&str])] = &[("a", &["10.244.0.1"]), ("b", &["192.0.2.1"])];
    let cases: [(&str, Vec<Measured>, Vec<Measured>, bool); 10] = [
        ("broken before and after", failed(), failed(), false),
        ("broken before, works after", failed(), passed(), false),
        ("nothing to connect to before", absent(), failed(), false),
        ("nothing to connect to after", passed(), absent(), false),
        ("not measured before", Vec::new(), failed(), false),
        ("the same sources", saw(bridge), saw(bridge), false),
        ("another backend answers", saw(&bridge[..1]), saw(&bridge[1..]), false),
        ("one more source", saw(bridge), saw(&[("a", &["10.244.0.1", "192.0.2.9"])]), false),
        ("another source", saw(bridge), saw(&[("a", &["192.0.2.1"]), ("b", &["192.0.2.1"])]), true),
        ("no answer any more", saw(bridge), failed(), true),
    ];
    for (what, before, after, counts) in cases {
        let mut bench = Bench::new();
        bench.desire(&on_trial(2, 1));
        bench.round(before);
        bench.round(after);
        assert_eq!(bench.phase() == TrialPhase::RolledBack, counts, "{what}");
        assert_eq!(bench.in_force(), if counts { 1 } else { 2 }, "{what}");
        let result = bench.trials.status().unwrap().results.remove(0);
        assert_eq!(result.failed, counts, "{what}");
    }
}

#[test]
fn changed_source_is_named() {
    let mut bench = Bench::new();
    bench.desire(&on_trial(2, 1));
    bench.round(saw(&[("a", &["10.244.0.1"])]));
    bench.round(saw(&[("a", &["192.0.2.1"])]));
    let result = bench.trials.status().unwrap().results.remove(0);
    assert!(result.ok_before && result.ok_after && result.failed);
    assert_eq!((result.source_before, result.source_after), (vec![10, 244, 0, 1], vec![192, 0, 2, 1]));
    assert_eq!(result.detail, "a backend that saw 10.244.0.1 sees 192.0.2.1");
}

#[test]
fn settings_without_a_trial_in_force_at_once() {
    let mut bench = Bench::new();
    bench.desire(&settings(2));
    assert_eq!((bench.in_force(), bench.phase()), (2, TrialPhase::Unspecified));
    let mut unprobed = on_trial(3, 2);
    unprobed.trial.as_mut().unwrap().probes.clear();
    bench.desire(&unprobed);
    assert_eq!((bench.in_force(), bench.phase(), bench.cause()), (3, TrialPhase::Passed, None));
    assert!(!bench.round(passed()));
    // A node without settings has no baseline.
    let mut trials = Trials::default();
    assert!(trials.desire(&on_trial(2, 1)).settings);
    assert_eq!(trials.in_force().unwrap(), &settings(2));
    assert_eq!((trials.round(Instant::now()), trials.status()), (None, None));
}

#[test]
fn newer_trial_starts_from_proven_settings() {
    // While the baseline is measured the old settings are in force, and stay.
    let mut bench = Bench::new();
    bench.desire(&on_trial(2, 1));
    let stale = bench.trials.round(bench.at()).unwrap().0;
    bench.desire(&on_trial(3, 1));
    assert_eq!((bench.in_force(), bench.phase()), (1, TrialPhase::Before));
    assert_eq!(bench.trials.measured(stale, passed(), bench.at()), TrialEffect::default());
    assert_eq!(bench.in_force(), 1, "results of another trial's round decide nothing");
    // Settings under observation are rolled back first; what passed stays.
    for (until_passed, during) in [(false, 1), (true, 2)] {
        let mut bench = Bench::new();
        bench.desire(&on_trial(2, 1));
        bench.round(passed());
        bench.round(passed());
        while until_passed && bench.phase() != TrialPhase::Passed {
            bench.next_round(passed());
        }
        bench.desire(&on_trial(3, 1));
        assert_eq!((bench.in_force(), bench.phase()), (during, TrialPhase::Before));
        bench.round(passed());
        assert_eq!((bench.in_force(), bench.phase()), (3, TrialPhase::Watching));
        bench.round(failed());
        assert_eq!((bench.in_force(), bench.phase()), (1, TrialPhase::RolledBack));
    }
}

#[test]
fn controller_takes_a_trial_back_in_any_phase() {
    let steps: [Vec<Vec<Measured>>; 4] =
        [vec![], vec![passed()], vec![passed(), passed()], vec![passed(), failed()]];
    for rounds in steps {
        let mut bench = Bench::new();
        bench.desire(&on_trial(2, 1));
        rounds.into_iter().for_each(|results| assert!(bench.round(results)));
        bench.desire(&settings(1));
        assert_eq!((bench.in_force(), bench.phase(), bench.cause()), (1, TrialPhase::Unspecified, None));
        assert!(!bench.round(passed()));
    }
}

#[test]
fn restart_continues_the_trial() {
    let desired = on_trial(2, 1);
    // The view of after the trial's beginning, and one of before that the controller then completes.
    for view in [desired.clone(), settings(1)] {
        let restart = |bench: &mut Bench| {
            bench.restart(&view);
            bench.desire(&desired);
        };
        let mut bench = Bench::new();
        bench.desire(&desired);
        restart(&mut bench);
        assert_eq!((bench.in_force(), bench.phase()), (1, TrialPhase::Before));
        bench.round(passed());
        restart(&mut bench);
        assert_eq!((bench.in_force(), bench.phase()), (2, TrialPhase::Watching));
        bench.round(passed());
        restart(&mut bench);
        assert!(bench.round(failed()), "against the baseline of before the restart");
        assert_eq!((bench.in_force(), bench.phase()), (1, TrialPhase::RolledBack));
        restart(&mut bench);
        assert_eq!((bench.in_force(), bench.phase()), (1, TrialPhase::RolledBack), "never retried");
        assert!(bench.round(passed()));
        restart(&mut bench);
        assert!(bench.trials.status().unwrap().results[0].ok_again);
        assert!(!bench.round(passed()));
    }
}

#[test]
fn record_of_other_settings_ignored() {
    let mut bench = Bench::new();
    bench.desire(&on_trial(2, 1));
    bench.round(passed());
    bench.round(failed());
    bench.restart(&settings(1));
    assert_eq!((bench.in_force(), bench.phase()), (1, TrialPhase::Unspecified));
    assert_eq!(bench.cause(), Some((1, SettingsCause::RolledBack)), "the kernel was left so");
    bench.desire(&on_trial(3, 1));
    assert_eq!((bench.in_force(), bench.phase()), (1, TrialPhase::Before));
}

#[test]
fn node_returns_to_the_revision_of_another_profile() {
    let other = |revision| Settings { profile: "other".into(), ..settings(revision) };
    let in_force = |bench: &Bench| {
        let settings = bench.trials.in_force().unwrap();
        (settings.profile.clone(), settings.revision)
    };
    let own = ("other".to_owned(), 7);
    for restarts in [false, true] {
        let mut bench = Bench::new();
        bench.desire(&other(7));
        // The profile's stable revision is default@1.
        bench.desire(&on_trial(2, 1));
        bench.round(passed());
        assert_eq!(in_force(&bench), ("default".to_owned(), 2));
        if restarts {
            bench.restart(&on_trial(2, 1));
        }
        bench.round(failed());
        assert_eq!((bench.phase(), in_force(&bench)), (TrialPhase::RolledBack, own.clone()));
        assert_eq!(bench.cause(), Some((7, SettingsCause::RolledBack)));
        // The next trial compares with it, and falls back to it.
        bench.desire(&on_trial(3, 1));
        assert_eq!(in_force(&bench), own);
        bench.round(passed());
        bench.desire(&on_trial(4, 1));
        assert_eq!(in_force(&bench), own, "revision 3 is not proved");
        bench.round(passed());
        bench.round(failed());
        assert_eq!(in_force(&bench), own);
        // The controller has the last word.
        bench.desire(&settings(1));
        assert_eq!(in_force(&bench), ("default".to_owned(), 1));
    }
}
