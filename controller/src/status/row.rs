//! Computes a node's row from the observation, the previous row and the time. Pure.
//!
//! STATE and the Ready condition are derived from the other conditions, so that the columns never contradict each
//! other.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use switchtower_admin_api::{ConditionType, NodeReason as Reason, NodeState as State};
use switchtower_crds::{
    Agent, Connection, Counts, DeviationCounts, Generations, LastError, ProfileInForce, ProxyStatusStatus,
};

use switchtower_proto::v1::{ProxyMode, SettingsCause, SettingsDeviation};

use super::condition::{Status, Verdict};
use super::local_detection;
use super::observation::{Loss, Observation, RefusedGeneration};

#[cfg(test)]
mod tests;
use super::absence::Blocker;

/// Delay after which a lost stream shows as disconnected. A short interruption or a move to another replica must not
/// cause a transition of the whole fleet.
pub const DISCONNECT_GRACE: Duration = Duration::from_secs(7);
/// Delay after which a node shows as behind: an update in flight is no transition.
pub const BEHIND_GRACE: Duration = Duration::from_secs(5);
/// Time for which a repaired foreign change shows as drift.
pub const DRIFT_SHOWN: Duration = Duration::from_secs(30);

/// Meaning of the fact that no agent of a node has connected to this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absence {
    /// None: the process has just started. The row stays unchanged for this time.
    Expected(Duration),
    /// The agent should have reconnected, but a busy fleet takes longer: the row must not claim that the node is ready.
    Overdue,
    /// The agent is absent: it had enough time to reconnect, or the controller cannot accept streams.
    Certain,
}

/// Inputs of a row.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// Observation of the node's agent; `None` if none connected since this process started.
    pub observation: Option<&'a Observation>,
    /// Known reason why the agent is absent. Ignored while the agent is connected.
    pub blocker: Option<&'a Blocker>,
    /// The status in the API server.
    pub previous: Option<&'a ProxyStatusStatus>,
    /// `metadata.generation` of the row.
    pub row_generation: Option<i64>,
    /// Name of this replica.
    pub replica: &'a str,
    /// Meaning of a missing agent.
    pub absence: Absence,
    /// Current time of this process, as in the observation.
    pub now: Timestamp,
    /// Clock of the API server minus that of this process. The times in a row are the API server's.
    pub ahead: SignedDuration,
}

impl Inputs<'_> {
    fn stored(&self, time: Timestamp) -> Time {
        api_time(time.checked_add(self.ahead).unwrap_or(time))
    }
}

/// A computed row.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The status to write.
    pub status: ProxyStatusStatus,
    /// The state in `status`.
    pub state: State,
    /// Delay after which the row can change without a new observation.
    pub check_after: Option<Duration>,
    /// True if this process observed the status. Otherwise the row is only carried over and must not be renewed.
    pub confirmed: bool,
}

/// The conditions from which Ready and STATE are derived.
struct Verdicts {
    connected: Verdict,
    programmed: Verdict,
    consistent: Verdict,
    exclusive: Verdict,
    local_detection: Verdict,
    kernel_settings: Verdict,
    /// Present if the drain gate of the settings does not work.
    drain_gate: Option<Verdict>,
}

/// Computes the row. The times of the last renewal stay those of the previous row: the writer sets them.
#[must_use]
pub fn row(inputs: Inputs<'_>) -> Row {
    let mut check = CheckAfter(None);
    let came_before = inputs.previous.filter(|previous| previous.connection.is_some());
    let mut row = match (inputs.observation, came_before, inputs.absence) {
        (Some(observation), ..) => observed(observation, inputs, &mut check),
        (None, Some(previous), Absence::Expected(rest)) => carried_over(previous, rest),
        (None, Some(previous), Absence::Overdue) => awaited(previous, inputs),
        (None, Some(previous), Absence::Certain) => gone(previous, inputs),
        (None, None, _) => absent(inputs),
    };
    row.status.reported_at = inputs.previous.and_then(|previous| previous.reported_at.clone());
    row.status.stale_after = inputs.previous.and_then(|previous| previous.stale_after.clone());
    row
}

/// Keeps the row as it was read: agents need a moment to reconnect to a restarted controller.
fn carried_over(previous: &ProxyStatusStatus, rest: Duration) -> Row {
    let state = State::from_name(&previous.state);
    Row {
        status: previous.clone(),
        state: state.unwrap_or(State::Unknown),
        check_after: Some(rest),
        confirmed: false,
    }
}

/// Collects the shortest delay after which the row must be computed again.
struct CheckAfter(Option<Duration>);

impl CheckAfter {
    fn after(&mut self, delay: Duration) {
        self.0 = Some(self.0.map_or(delay, |known| known.min(delay)));
    }

    /// Returns true if `limit` has passed since `since`; otherwise schedules a check for that time.
    fn passed(&mut self, since: Timestamp, limit: Duration, now: Timestamp) -> bool {
        let elapsed = Duration::try_from(now.duration_since(since)).unwrap_or_default();
        if elapsed >= limit {
            return true;
        }
        self.after(limit - elapsed);
        false
    }
}

fn observed(observation: &Observation, inputs: Inputs<'_>, check: &mut CheckAfter) -> Row {
    let now = inputs.now;
    let verdicts = Verdicts {
        connected: connected(observation, inputs.blocker, check, now),
        programmed: programmed(observation, check, now),
        consistent: consistent(observation, check, now),
        exclusive: exclusive(observation),
        local_detection: local_detection(observation),
        kernel_settings: kernel_settings(observation),
        drain_gate: drain_gate(observation),
    };
    let state = derive_state(&verdicts, observation);
    let ready = derive_ready(state, &verdicts);
    let disconnected = !verdicts.connected.holds();
    let status = ProxyStatusStatus {
        observed_generation: inputs.row_generation,
        state: state.as_str().to_owned(),
        generation: Generations {
            desired: to_api(observation.desired),
            sent: to_api(observation.sent),
            applied: to_api(observation.applied),
        },
        digest: observation.digest.map(|digest| hex(&digest)),
        behind_since: observation
            .behind_since
            .filter(|since| shows(*since, BEHIND_GRACE, now))
            .map(|since| inputs.stored(since)),
        profile: profile(observation)
            .or_else(|| inputs.previous.and_then(|previous| previous.profile.clone())),
        connection: Some(Connection {
            replica: inputs.replica.to_owned(),
            session: to_api(observation.session),
        }),
        agent: Some(Agent {
            version: observation.agent_version.clone(),
            connected_to: (!disconnected).then(|| inputs.replica.to_owned()),
            since: Some(inputs.stored(if disconnected {
                observation.lost_since.unwrap_or(now)
            } else {
                observation.since
            })),
        }),
        kernel: Some(observation.kernel_version.clone()).filter(|kernel| !kernel.is_empty()),
        counts: observation
            .counts
            .map(|(services, endpoints)| Counts { services: services.into(), endpoints: endpoints.into() }),
        deviations: deviations(observation),
        drift_repaired: Some(to_api(observation.drift_repaired)),
        last_error: last_error(observation, state, inputs.previous),
        conditions: conditions(ready, verdicts, inputs),
        ..ProxyStatusStatus::default()
    };
    Row { status, state, check_after: check.0, confirmed: true }
}

fn shows(since: Timestamp, limit: Duration, now: Timestamp) -> bool {
    Duration::try_from(now.duration_since(since)).unwrap_or_default() >= limit
}

fn connected(
    observation: &Observation,
    blocker: Option<&Blocker>,
    check: &mut CheckAfter,
    now: Timestamp,
) -> Verdict {
    match observation.lost_since {
        Some(lost) if check.passed(lost, DISCONNECT_GRACE, now) => {
            let (reason, message) = match observation.loss {
                Loss::StreamEnded => (
                    Reason::AgentDisconnected,
                    "The agent's stream ended; the kernel keeps its last generation. See the agent's log on the node.",
                ),
                Loss::Silent => (
                    Reason::AgentSilent,
                    "The agent's stream is open, but its heartbeats do not arrive; the kernel keeps its last generation. \
                     Check the network between the node and the controller.",
                ),
            };
            Verdict::not_connected(blocker, reason, message)
        }
        _ => Verdict::new(Status::True, Reason::StreamOpen, "The agent's stream is open."),
    }
}

fn programmed(observation: &Observation, check: &mut CheckAfter, now: Timestamp) -> Verdict {
    if let Some(failure) = &observation.failure {
        return Verdict::new(Status::False, failure.reason, failure_message(failure));
    }
    let behind = observation.behind_since.is_some_and(|since| check.passed(since, BEHIND_GRACE, now));
    if !observation.acknowledged {
        return Verdict::new(
            Status::False,
            Reason::Programming,
            "The agent has not acknowledged a generation yet.",
        );
    }
    if let Some(deviations) = observation.deviations.as_ref() {
        let (reason, message) = if let Some(settings) = &deviations.settings {
            let reason = match settings.cause() {
                SettingsCause::Trial => Reason::SettingsOnTrial,
                SettingsCause::RolledBack | SettingsCause::Unspecified => Reason::RolledBack,
            };
            let SettingsDeviation { profile, revision, .. } = settings;
            (reason, format!("The node uses the settings {profile}@{revision} instead."))
        } else if deviations.refused > 0 {
            (
                Reason::ItemsRefused,
                format!("The kernel refused {} items; all others are programmed.", deviations.refused),
            )
        } else {
            (Reason::DeletionsHeld, String::new())
        };
        let message = [message, held_message(deviations.held)].join(" ").trim().to_owned();
        return Verdict::new(Status::False, reason, message);
    }
    if behind {
        return Verdict::new(
            Status::False,
            Reason::Behind,
            "The agent has not acknowledged the latest generation in time.",
        );
    }
    if observation.mode == ProxyMode::Shadow {
        return Verdict::new(
            Status::True,
            Reason::ShadowMode,
            "The kernel holds the desired generation without effect on packets: the settings have mode Shadow.",
        );
    }
    Verdict::new(Status::True, Reason::UpToDate, "The kernel holds the desired generation.")
}

/// Describes held removals; empty if there are none.
fn held_message(held: u32) -> String {
    if held == 0 {
        return String::new();
    }
    format!(
        "The delete budget holds {held} removals: pools that would become empty and frontends that would vanish. If they \
         are intended, release them with kubectl switchtower release-held."
    )
}

fn failure_message(failure: &RefusedGeneration) -> String {
    let errno = if failure.errno == 0 { String::new() } else { format!(" (errno {})", failure.errno) };
    format!("The agent refused generation {}: {}{errno}.", failure.generation, failure.detail)
}

fn consistent(observation: &Observation, check: &mut CheckAfter, now: Timestamp) -> Verdict {
    match observation.drift_at {
        Some(at) if !check.passed(at, DRIFT_SHOWN, now) => {
            let cause = observation.drift_cause.name();
            Verdict::new(
                Status::False,
                Reason::ForeignChange,
                format!("The agent repaired a foreign change of its tables; cause: {cause}."),
            )
        }
        _ => Verdict::new(Status::True, Reason::NoDrift, "No program changed the agent's tables."),
    }
}

fn exclusive(observation: &Observation) -> Verdict {
    if observation.mode == ProxyMode::Shadow {
        let message = if observation.foreign_proxy {
            "kube-proxy serves the node, and the agent's rules have no effect."
        } else {
            "The agent's rules have no effect, and no rules of kube-proxy were found: check that another proxy serves the node."
        };
        Verdict::new(Status::True, Reason::ShadowMode, message)
    } else if observation.foreign_proxy {
        Verdict::new(
            Status::False,
            Reason::ForeignProxy,
            "Rules of kube-proxy exist alongside the agent's; stop it and remove its rules (commands: docs/migration.md).",
        )
    } else {
        Verdict::new(Status::True, Reason::OnlyProxy, "No rules of another service proxy were found.")
    }
}

fn local_detection(observation: &Observation) -> Verdict {
    local_detection::verdict(&observation.locality)
}

/// Limits that are too low reduce the capacity only: the programmed rules are right, so Ready does not depend on them.
fn kernel_settings(observation: &Observation) -> Verdict {
    let unset = &observation.unset_kernel_settings;
    if unset.is_empty() {
        return Verdict::new(
            Status::True,
            Reason::InForce,
            "The kernel has the connection tracking settings of the profile.",
        );
    }
    let message = format!(
        "{}. The component conntrack-sysctls sets them when the agent's Pod starts.",
        unset.join("; ")
    );
    Verdict::new(Status::False, Reason::NotInForce, message)
}

/// Pods terminate at once without it, as they do with other proxies, so Ready does not depend on it.
fn drain_gate(observation: &Observation) -> Option<Verdict> {
    let failure = &observation.drain_gate_failure;
    let message = || format!("Hooks of the drain gate end at once: {failure}.");
    (!failure.is_empty()).then(|| Verdict::new(Status::False, Reason::NotInForce, message()))
}

fn derive_state(verdicts: &Verdicts, observation: &Observation) -> State {
    if !verdicts.connected.holds() {
        State::Stale
    } else if observation.failure.is_some() {
        State::ApplyFailed
    } else if !verdicts.programmed.holds() {
        let settings = observation.deviations.as_ref().and_then(|deviations| deviations.settings.as_ref());
        let on_trial = settings.is_some_and(|settings| settings.cause() == SettingsCause::Trial);
        match observation.deviations {
            Some(_) if observation.acknowledged && !on_trial => State::Deviating,
            _ => State::Progressing,
        }
    } else if !verdicts.consistent.holds() {
        State::Drifted
    } else if verdicts.local_detection.status == Status::False {
        State::PodsNotLocal
    } else if !verdicts.exclusive.holds() {
        State::NotExclusive
    } else if observation.mode == ProxyMode::Shadow {
        State::Shadow
    } else {
        State::Synced
    }
}

/// Derives Ready with the reason of the condition that decided the state.
///
/// A second proxy does not make a node unready: during a migration both run, and the agent's rules are complete.
/// Neither do pods that local detection misses: the kernel holds what the settings request.
fn derive_ready(state: State, verdicts: &Verdicts) -> Verdict {
    let (status, decisive) = match state {
        State::Synced | State::Shadow => (Status::True, &verdicts.programmed),
        State::PodsNotLocal => (Status::True, &verdicts.local_detection),
        State::NotExclusive => (Status::True, &verdicts.exclusive),
        State::Unknown => (Status::Unknown, &verdicts.connected),
        State::Stale | State::Absent => (Status::False, &verdicts.connected),
        State::Drifted => (Status::False, &verdicts.consistent),
        State::Progressing | State::ApplyFailed | State::Deviating => (Status::False, &verdicts.programmed),
    };
    decisive.with_status(status)
}

/// The settings that the agent reports as in force, otherwise those that it acknowledged.
fn profile(observation: &Observation) -> Option<ProfileInForce> {
    let instead = observation.deviations.as_ref().and_then(|deviations| deviations.settings.as_ref());
    let (name, revision) = match (instead, &observation.settings) {
        (Some(settings), _) => (settings.profile.clone(), settings.revision),
        (None, Some((name, revision))) => (name.to_string(), *revision),
        (None, None) => return None,
    };
    let revision_name = format!("{name}@{revision}");
    Some(ProfileInForce { name, revision: to_api(revision), revision_name })
}

fn deviations(observation: &Observation) -> Option<DeviationCounts> {
    observation.deviations.as_ref().map(|deviations| DeviationCounts {
        refused: deviations.refused.into(),
        held: deviations.held.into(),
        samples: deviations
            .samples
            .iter()
            .take(16)
            .map(|sample| format!("{}: {}", sample.item, sample.reason))
            .collect(),
    })
}

/// Keeps the error of the previous row until the node is synced again.
fn last_error(
    observation: &Observation,
    state: State,
    previous: Option<&ProxyStatusStatus>,
) -> Option<LastError> {
    if let Some(failure) = &observation.failure {
        return Some(LastError {
            reason: failure.reason.as_str().to_owned(),
            message: failure.detail.clone(),
            errno: failure.errno,
            generation: to_api(failure.generation),
        });
    }
    match state {
        State::Synced | State::Shadow => None,
        _ => previous.and_then(|previous| previous.last_error.clone()),
    }
}

/// No agent reconnected to this process: the row keeps the known values and shows that the agent is disconnected.
fn gone(previous: &ProxyStatusStatus, inputs: Inputs<'_>) -> Row {
    let lost = Verdict::not_connected(
        inputs.blocker,
        Reason::AgentDisconnected,
        "No replica of the controller has a stream of the agent; the kernel keeps its last generation.",
    );
    let ready = lost.with_status(Status::False);
    let mut status = previous.clone();
    status.observed_generation = inputs.row_generation;
    State::Stale.as_str().clone_into(&mut status.state);
    if let Some(agent) = &mut status.agent
        && agent.connected_to.take().is_some()
    {
        agent.since = Some(inputs.stored(inputs.now));
    }
    replace_conditions(
        &mut status,
        [(ConditionType::Ready, ready), (ConditionType::Connected, lost)],
        inputs,
    );
    Row { status, state: State::Stale, check_after: None, confirmed: true }
}

/// The agent has not reconnected yet. Ready becomes Unknown; a row that is already not ready stays unchanged.
fn awaited(previous: &ProxyStatusStatus, inputs: Inputs<'_>) -> Row {
    let ready = previous.conditions.iter().find(|condition| condition.type_ == ConditionType::Ready.as_str());
    if ready.is_some_and(|ready| ready.status == "False") {
        return carried_over(previous, DISCONNECT_GRACE);
    }
    let message = "The replica that served the agent is gone, and the agent has not reconnected yet; the kernel keeps its last generation.";
    let unknown = || Verdict::new(Status::Unknown, Reason::AwaitingAgent, message);
    let mut status = previous.clone();
    status.observed_generation = inputs.row_generation;
    State::Unknown.as_str().clone_into(&mut status.state);
    replace_conditions(
        &mut status,
        [(ConditionType::Ready, unknown()), (ConditionType::Connected, unknown())],
        inputs,
    );
    Row { status, state: State::Unknown, check_after: Some(DISCONNECT_GRACE), confirmed: true }
}

fn replace_conditions<const N: usize>(
    status: &mut ProxyStatusStatus,
    verdicts: [(ConditionType, Verdict); N],
    inputs: Inputs<'_>,
) {
    for (kind, verdict) in verdicts {
        let condition = merge(kind, verdict, inputs);
        match status.conditions.iter_mut().find(|known| known.type_ == kind.as_str()) {
            Some(known) => *known = condition,
            None => status.conditions.push(condition),
        }
    }
}

fn absent(inputs: Inputs<'_>) -> Row {
    let message = "No agent of this node has connected. Check that the node agent's Pod runs on the node.";
    let not_connected = || Verdict::not_connected(inputs.blocker, Reason::NoAgent, message);
    let unknown = || Verdict::new(Status::Unknown, Reason::NoAgent, message);
    let verdicts = Verdicts {
        connected: not_connected(),
        programmed: unknown(),
        consistent: unknown(),
        exclusive: unknown(),
        local_detection: unknown(),
        kernel_settings: unknown(),
        drain_gate: None,
    };
    let status = ProxyStatusStatus {
        observed_generation: inputs.row_generation,
        state: State::Absent.as_str().to_owned(),
        conditions: conditions(not_connected(), verdicts, inputs),
        ..ProxyStatusStatus::default()
    };
    Row { status, state: State::Absent, check_after: None, confirmed: true }
}

fn conditions(ready: Verdict, verdicts: Verdicts, inputs: Inputs<'_>) -> Vec<Condition> {
    let Verdicts {
        connected,
        programmed,
        consistent,
        exclusive,
        local_detection,
        kernel_settings,
        drain_gate,
    } = verdicts;
    [
        (ConditionType::Ready, ready),
        (ConditionType::Connected, connected),
        (ConditionType::Programmed, programmed),
        (ConditionType::Consistent, consistent),
        (ConditionType::Exclusive, exclusive),
        (ConditionType::LocalDetection, local_detection),
        (ConditionType::KernelSettings, kernel_settings),
    ]
    .into_iter()
    .chain(drain_gate.map(|verdict| (ConditionType::DrainGate, verdict)))
    .map(|(kind, verdict)| merge(kind, verdict, inputs))
    .collect()
}

/// Keeps the transition time of the previous condition while the status stays the same.
fn merge(kind: ConditionType, verdict: Verdict, inputs: Inputs<'_>) -> Condition {
    let known = inputs
        .previous
        .and_then(|previous| previous.conditions.iter().find(|condition| condition.type_ == kind.as_str()))
        .filter(|condition| condition.status == verdict.status.as_str());
    Condition {
        type_: kind.as_str().to_owned(),
        status: verdict.status.as_str().to_owned(),
        reason: verdict.reason.into_owned(),
        message: verdict.message,
        observed_generation: inputs.row_generation,
        last_transition_time: known
            .map_or_else(|| inputs.stored(inputs.now), |condition| condition.last_transition_time.clone()),
    }
}

/// Truncates to whole seconds, the precision of the API: finer times would make every row differ from the stored one.
pub(super) fn api_time(time: Timestamp) -> Time {
    Time(Timestamp::from_second(time.as_second()).unwrap_or(time))
}

/// Converts a generation or counter to the 63 bits of the API.
fn to_api(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
