//! Trials of settings: decides which settings are in force. Pure: the caller runs the rounds of probes and passes in
//! results and the time.
//!
//! `fleet.proto` ("Trial of settings") specifies the state machine. Settings without a trial enter into force
//! immediately.

use std::time::{Duration, Instant};

use switchtower_proto::v1::{
    Probe, Settings, SettingsCause, SettingsDeviation, Trial, TrialPhase, TrialStatus,
};

use super::evidence::{self, Measured};
use super::targets::Found;

/// Interval between two rounds after the switch.
pub(crate) const ROUND_INTERVAL: Duration = Duration::from_secs(1);

/// Record of a trial across a restart of the agent.
#[derive(Debug, Clone, PartialEq)]
pub struct TrialRecord {
    /// Settings under trial; the trial's fallback is the target of a rollback.
    pub tried: Settings,
    /// The settings in force.
    pub in_force: Settings,
    /// Never `Unspecified`.
    pub phase: TrialPhase,
    /// The baseline; empty in [`TrialPhase::Before`].
    pub before: Vec<Measured>,
    /// The latest round after the switch; in [`TrialPhase::RolledBack`] the one that failed.
    pub after: Vec<Measured>,
    /// The round after the rollback.
    pub again: Option<Vec<Measured>>,
}

/// Effect of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TrialEffect {
    /// The settings in force changed and must be committed.
    pub settings: bool,
    /// The trial's status changed: record and report it.
    pub status: bool,
}

/// Settings in force, and the trial that decides on them.
#[derive(Debug, Default)]
pub(super) struct Trials {
    in_force: Option<Settings>,
    current: Option<TrialRecord>,
    /// Record from before a restart, until the view holds its settings.
    remembered: Option<TrialRecord>,
    /// Number of the last round; `running` until its results arrive.
    round: u64,
    running: bool,
    /// Earliest start of the next round; `None`: as soon as the kernel holds the settings in force.
    next: Option<Instant>,
    /// End of the observation after the switch; set by its first round.
    until: Option<Instant>,
    /// Frontends of the probes; found by the first round.
    pub(super) frontends: Option<Vec<Found>>,
}

fn bare(settings: &Settings) -> Settings {
    Settings { trial: None, ..settings.clone() }
}

fn same(one: &Settings, other: &Settings) -> bool {
    (&one.profile, one.revision) == (&other.profile, other.revision)
}

fn trial(record: &TrialRecord) -> &Trial {
    static NONE: Trial = Trial { probes: Vec::new(), window_milliseconds: 0, fallback: None };
    record.tried.trial.as_deref().unwrap_or(&NONE)
}

fn fallback(tried: &Settings) -> Option<Settings> {
    Some(bare(tried.trial.as_ref()?.fallback.as_deref()?))
}

/// Returns the settings under trial on this node. If the node runs proven settings of another profile, they become the
/// fallback instead of those of most nodes.
fn with_own_fallback(desired: &Settings, in_force: &Settings) -> Settings {
    let mut tried = desired.clone();
    if let Some(trial) = tried.trial.as_mut().filter(|_| desired.profile != in_force.profile) {
        trial.fallback = Some(Box::new(bare(in_force)));
    }
    tried
}

impl Trials {
    /// The settings in force, without a trial; `None` before the first view.
    pub(super) fn in_force(&self) -> Option<&Settings> {
        self.in_force.as_ref()
    }

    /// Restores a record from before a restart.
    pub(super) fn remember(&mut self, record: TrialRecord) -> TrialEffect {
        match &self.current {
            // The view holds the settings under trial, so the trial continues.
            None if self.in_force.as_ref().is_some_and(|in_force| same(in_force, &record.tried)) => {
                self.resume(record)
            }
            _ => {
                self.remembered = Some(record);
                TrialEffect::default()
            }
        }
    }

    fn resume(&mut self, record: TrialRecord) -> TrialEffect {
        let settings = self.in_force.as_ref() != Some(&record.in_force);
        self.in_force = Some(record.in_force.clone());
        self.current = Some(record);
        self.restart_rounds();
        TrialEffect { settings, status: false }
    }

    fn restart_rounds(&mut self) {
        (self.running, self.next, self.until, self.frontends) = (false, None, None, None);
    }

    /// Takes over the desired settings.
    pub(super) fn desire(&mut self, desired: &Settings) -> TrialEffect {
        let before = self.in_force.clone();
        let status = self.take(desired);
        TrialEffect { settings: self.in_force != before, status }
    }

    /// Returns whether the status changed.
    fn take(&mut self, desired: &Settings) -> bool {
        if desired.trial.is_none() {
            self.in_force = Some(bare(desired));
            self.restart_rounds();
            return self.current.take().or(self.remembered.take()).is_some();
        }
        if let Some(record) = self.remembered.take_if(|record| same(&record.tried, desired)) {
            self.resume(record);
            return false;
        }
        if self.current.as_ref().is_some_and(|current| same(&current.tried, desired)) {
            return false;
        }
        let in_force = match (&self.current, self.in_force.take()) {
            // Roll back unproven settings before the next trial.
            (Some(current), Some(_)) if current.phase == TrialPhase::Watching => {
                let own = fallback(&current.tried).filter(|own| own.profile != desired.profile);
                own.or_else(|| fallback(desired))
            }
            (_, in_force) => in_force,
        };
        self.restart_rounds();
        let status = self.current.take().is_some();
        let Some(in_force) = in_force.filter(|in_force| !same(in_force, desired)) else {
            // Nothing to compare with, or nothing to try.
            self.in_force = Some(bare(desired));
            return status;
        };
        self.remembered = None;
        let tried = with_own_fallback(desired, &in_force);
        let without_probes = desired.trial.as_ref().is_none_or(|trial| trial.probes.is_empty());
        let (in_force, phase) =
            if without_probes { (bare(desired), TrialPhase::Passed) } else { (in_force, TrialPhase::Before) };
        self.in_force = Some(in_force.clone());
        let (before, after) = (Vec::new(), Vec::new());
        self.current = Some(TrialRecord { tried, in_force, phase, before, after, again: None });
        true
    }

    /// Time of the next round, if one is scheduled.
    pub(super) fn due(&self) -> Option<Instant> {
        self.next.filter(|_| !self.running)
    }

    /// Returns number and probes of the round to run now, if any.
    pub(super) fn round(&mut self, now: Instant) -> Option<(u64, Vec<Probe>)> {
        let current = self.current.as_ref()?;
        let wanted = match current.phase {
            TrialPhase::Before | TrialPhase::Watching => true,
            TrialPhase::RolledBack => current.again.is_none(),
            TrialPhase::Passed | TrialPhase::Unspecified => false,
        };
        if !wanted || self.running || self.next.is_some_and(|next| now < next) {
            return None;
        }
        let Trial { probes, window_milliseconds, .. } = trial(current);
        if current.phase == TrialPhase::Watching {
            let window = Duration::from_millis(u64::from(*window_milliseconds));
            self.until.get_or_insert(now + window);
        }
        self.round += 1;
        (self.running, self.next) = (true, None);
        Some((self.round, probes.clone()))
    }

    /// The results of a round.
    pub(super) fn measured(&mut self, number: u64, measured: Vec<Measured>, now: Instant) -> TrialEffect {
        if number != self.round || !std::mem::take(&mut self.running) {
            return TrialEffect::default();
        }
        let Some(current) = &mut self.current else { return TrialEffect::default() };
        match current.phase {
            TrialPhase::Before => {
                current.before = measured;
                current.phase = TrialPhase::Watching;
                current.in_force = bare(&current.tried);
                self.in_force = Some(current.in_force.clone());
                TrialEffect { settings: true, status: true }
            }
            TrialPhase::Watching => self.watched(measured, now),
            TrialPhase::RolledBack => {
                current.again = Some(measured);
                TrialEffect { settings: false, status: true }
            }
            TrialPhase::Passed | TrialPhase::Unspecified => TrialEffect::default(),
        }
    }

    fn watched(&mut self, measured: Vec<Measured>, now: Instant) -> TrialEffect {
        let Some(current) = &mut self.current else { return TrialEffect::default() };
        let first = current.after.is_empty();
        current.after = measured;
        if evidence::any_failed(&current.before, &current.after) {
            current.phase = TrialPhase::RolledBack;
            if let Some(fallback) = fallback(&current.tried) {
                current.in_force = fallback;
            }
            self.in_force = Some(current.in_force.clone());
            return TrialEffect { settings: true, status: true };
        }
        let until = self.until.unwrap_or(now);
        if now >= until {
            current.phase = TrialPhase::Passed;
            return TrialEffect { settings: false, status: true };
        }
        self.next = Some((now + ROUND_INTERVAL).min(until));
        TrialEffect { settings: false, status: first }
    }

    /// Record for a restart; `None`: nothing.
    pub(super) fn record(&self) -> Option<&TrialRecord> {
        self.current.as_ref()
    }

    /// The last trial: this agent's, or what the one before it left while the view does not know of it.
    fn last(&self) -> Option<&TrialRecord> {
        self.current.as_ref().or(self.remembered.as_ref())
    }

    /// Settings in force that are not the desired ones, as the kernel was left by the last trial.
    pub(super) fn deviation(&self) -> Option<SettingsDeviation> {
        let TrialRecord { tried, in_force, phase, .. } = self.last()?;
        if same(tried, in_force) {
            return None;
        }
        let cause = match phase {
            TrialPhase::RolledBack => SettingsCause::RolledBack,
            _ => SettingsCause::Trial,
        };
        Some(SettingsDeviation {
            profile: in_force.profile.clone(),
            revision: in_force.revision,
            cause: cause as i32,
        })
    }

    /// The status of the trial, for the controller.
    pub(super) fn status(&self) -> Option<TrialStatus> {
        let TrialRecord { tried, phase, before, after, again, .. } = self.last()?;
        Some(TrialStatus {
            profile: tried.profile.clone(),
            revision: tried.revision,
            phase: *phase as i32,
            results: evidence::results(before, after, again.as_deref()),
        })
    }
}

#[cfg(test)]
mod tests;
