//! A node's row as a pure function of what was observed, the row before, and the time.
//!
//! Conditions come first; STATE and the Ready condition are derived from them, so that the columns never
//! contradict each other.

use std::borrow::Cow;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use switchtower_crds::{
    Agent, Connection, Counts, DeviationCounts, Generations, LastError, NodeState as State, ProfileInForce,
    ProxyStatusStatus,
};

use switchtower_proto::v1::{SettingsCause, SettingsDeviation};

use super::local_detection;
use super::observation::{Failure, Observation};

#[cfg(test)]
mod tests;
use super::absence::Obstacle;

/// A lost stream shows as disconnected only after this time, so that a move to another replica or a short
/// interruption is not a transition of the whole fleet.
pub const DISCONNECT_GRACE: Duration = Duration::from_secs(10);
/// A node may be behind for this long before it shows: changes under way are not a transition.
pub const BEHIND_GRACE: Duration = Duration::from_secs(5);
/// How long a repaired foreign change shows as drift.
pub const DRIFT_SHOWN: Duration = Duration::from_secs(30);

/// What it means that no agent of a node has connected to this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absence {
    /// Nothing: the process has just started, and for this long the row keeps what it said.
    Expected(Duration),
    /// The agent should be back by now, but a busy fleet takes longer: the row must not claim that the node is ready.
    Overdue,
    /// Streams were accepted, or could not be, for long enough: the agent is gone.
    Certain,
}

/// What a row is made of.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// What the registry of streams knows of the node; `None` if no agent came since this process started.
    pub observation: Option<&'a Observation>,
    /// Why the agent is not connected, if that is known; says nothing while it is.
    pub obstacle: Option<&'a Obstacle>,
    /// The status in the API server.
    pub previous: Option<&'a ProxyStatusStatus>,
    /// `metadata.generation` of the row.
    pub row_generation: Option<i64>,
    /// Name of this replica.
    pub replica: &'a str,
    /// What the absence of an agent means.
    pub absence: Absence,
    /// Now.
    pub now: Timestamp,
}

/// A row, and when it changes by itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The status to be written.
    pub status: ProxyStatusStatus,
    /// The word in it.
    pub state: State,
    /// The row has to be looked at again after this time, whether or not anything happens.
    pub check_after: Option<Duration>,
    /// This process vouches for the status. If not, the row is only carried over and must not be renewed.
    pub confirmed: bool,
}

/// One condition before it is merged with the previous one.
struct Verdict {
    status: &'static str,
    reason: Cow<'static, str>,
    message: String,
}

impl Verdict {
    fn new(status: &'static str, reason: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self { status, reason: reason.into(), message: message.into() }
    }

    /// The agent is not connected: for this reason, or else for one that only says so.
    fn not_connected(obstacle: Option<&Obstacle>, reason: &'static str, message: &'static str) -> Self {
        match obstacle {
            Some(Obstacle { reason, message }) => Self::new("False", reason.clone(), message.clone()),
            None => Self::new("False", reason, message),
        }
    }

    fn holds(&self) -> bool {
        self.status == "True"
    }
}

/// The conditions that Ready and STATE are derived from.
struct Verdicts {
    connected: Verdict,
    programmed: Verdict,
    consistent: Verdict,
    exclusive: Verdict,
    local_detection: Verdict,
    kernel_settings: Verdict,
}

/// Makes the row. The times of its last renewal are those of the previous one: they are set when it is written.
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

/// The row as it was read: the agents of a restarted controller need a moment to come back.
fn carried_over(previous: &ProxyStatusStatus, rest: Duration) -> Row {
    let state = State::from_name(&previous.state);
    Row {
        status: previous.clone(),
        state: state.unwrap_or(State::Unknown),
        check_after: Some(rest),
        confirmed: false,
    }
}

/// The shortest time after which the row must be looked at again.
struct CheckAfter(Option<Duration>);

impl CheckAfter {
    fn after(&mut self, delay: Duration) {
        self.0 = Some(self.0.map_or(delay, |known| known.min(delay)));
    }

    /// Whether `limit` has passed since `since`; if not, asks for another look when it has.
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
        connected: connected(observation, inputs.obstacle, check, now),
        programmed: programmed(observation, check, now),
        consistent: consistent(observation, check, now),
        exclusive: exclusive(observation),
        local_detection: local_detection(observation),
        kernel_settings: kernel_settings(observation),
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
        behind_since: observation.behind_since.filter(|since| shows(*since, BEHIND_GRACE, now)).map(api_time),
        profile: profile(observation)
            .or_else(|| inputs.previous.and_then(|previous| previous.profile.clone())),
        connection: Some(Connection {
            replica: inputs.replica.to_owned(),
            session: to_api(observation.session),
        }),
        agent: Some(Agent {
            version: observation.agent_version.clone(),
            connected_to: (!disconnected).then(|| inputs.replica.to_owned()),
            since: Some(api_time(if disconnected {
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
    obstacle: Option<&Obstacle>,
    check: &mut CheckAfter,
    now: Timestamp,
) -> Verdict {
    match observation.lost_since {
        Some(lost) if check.passed(lost, DISCONNECT_GRACE, now) => Verdict::not_connected(
            obstacle,
            "AgentDisconnected",
            "The agent's stream ended; the kernel keeps what it held. See the agent's log on the node.",
        ),
        _ => Verdict::new("True", "StreamOpen", "The agent's stream is open."),
    }
}

fn programmed(observation: &Observation, check: &mut CheckAfter, now: Timestamp) -> Verdict {
    if let Some(failure) = &observation.failure {
        return Verdict::new("False", failure.reason, failure_message(failure));
    }
    let behind = observation.behind_since.is_some_and(|since| check.passed(since, BEHIND_GRACE, now));
    if !observation.acknowledged {
        return Verdict::new("False", "Programming", "The agent has not acknowledged a generation yet.");
    }
    if let Some(deviations) = observation.deviations.as_ref() {
        let (reason, message) = if let Some(settings) = &deviations.settings {
            let reason = match settings.cause() {
                SettingsCause::Trial => "SettingsOnTrial",
                SettingsCause::RolledBack | SettingsCause::Unspecified => "RolledBack",
            };
            let SettingsDeviation { profile, revision, .. } = settings;
            (reason, format!("Settings {profile}@{revision} are in force instead."))
        } else if deviations.refused > 0 {
            ("ItemsRefused", format!("{} items were refused; all others are programmed.", deviations.refused))
        } else {
            ("DeletionsHeld", format!("{} removals are held back by the delete budget.", deviations.held))
        };
        return Verdict::new("False", reason, message);
    }
    if behind {
        return Verdict::new(
            "False",
            "Behind",
            "The agent has not acknowledged the last generation in time.",
        );
    }
    Verdict::new("True", "UpToDate", "The kernel holds what it should.")
}

fn failure_message(failure: &Failure) -> String {
    let errno = if failure.errno == 0 { String::new() } else { format!(" (errno {})", failure.errno) };
    format!("Generation {} was refused: {}{errno}.", failure.generation, failure.detail)
}

fn consistent(observation: &Observation, check: &mut CheckAfter, now: Timestamp) -> Verdict {
    match observation.drift_at {
        Some(at) if !check.passed(at, DRIFT_SHOWN, now) => {
            let cause = if observation.drift_cause.is_empty() { "unknown" } else { &observation.drift_cause };
            Verdict::new("False", "ForeignChange", format!("A foreign change was repaired; cause: {cause}."))
        }
        _ => Verdict::new("True", "NoDrift", "No foreign change of the agent's tables."),
    }
}

fn exclusive(observation: &Observation) -> Verdict {
    if observation.foreign_proxy {
        Verdict::new(
            "False",
            "ForeignProxy",
            "Rules of kube-proxy exist beside the agent's; stop it and remove its rules (docs/migration.md has the commands).",
        )
    } else {
        Verdict::new("True", "OnlyProxy", "No rules of another service proxy were found.")
    }
}

fn local_detection(observation: &Observation) -> Verdict {
    let (status, reason, message) = local_detection::verdict(&observation.locality);
    Verdict::new(status, reason, message)
}

/// Limits that are too low are a matter of capacity: what is programmed is right, so Ready does not depend on them.
fn kernel_settings(observation: &Observation) -> Verdict {
    let unset = &observation.unset_kernel_settings;
    if unset.is_empty() {
        return Verdict::new(
            "True",
            "InForce",
            "The kernel has the connection tracking settings of the profile.",
        );
    }
    let message = format!(
        "{}. The component conntrack-sysctls sets them at the start of the agent's Pod.",
        unset.join("; ")
    );
    Verdict::new("False", "NotInForce", message)
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
    } else if verdicts.local_detection.status == "False" {
        State::PodsNotLocal
    } else if !verdicts.exclusive.holds() {
        State::NotExclusive
    } else {
        State::Synced
    }
}

/// The reason is that of the condition that decided the state. A second proxy does not make a node unready:
/// during a migration both run, and what the agent programs is complete. Nor do pods that are not recognised: the
/// kernel holds what the settings ask for.
fn derive_ready(state: State, verdicts: &Verdicts) -> Verdict {
    let (status, decisive) = match state {
        State::Synced => ("True", &verdicts.programmed),
        State::PodsNotLocal => ("True", &verdicts.local_detection),
        State::NotExclusive => ("True", &verdicts.exclusive),
        State::Unknown => ("Unknown", &verdicts.connected),
        State::Stale | State::Absent => ("False", &verdicts.connected),
        State::Drifted => ("False", &verdicts.consistent),
        State::Progressing | State::ApplyFailed | State::Deviating => ("False", &verdicts.programmed),
    };
    Verdict::new(status, decisive.reason.clone(), decisive.message.clone())
}

/// What the agent says is in force, or else what it acknowledged.
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
        samples: deviations
            .samples
            .iter()
            .take(16)
            .map(|sample| format!("{}: {}", sample.item, sample.reason))
            .collect(),
    })
}

/// Kept from the previous row until the node is in order again.
fn last_error(
    observation: &Observation,
    state: State,
    previous: Option<&ProxyStatusStatus>,
) -> Option<LastError> {
    if let Some(failure) = &observation.failure {
        return Some(LastError {
            reason: failure.reason.to_owned(),
            message: failure.detail.clone(),
            errno: failure.errno,
            generation: to_api(failure.generation),
        });
    }
    match state {
        State::Synced => None,
        _ => previous.and_then(|previous| previous.last_error.clone()),
    }
}

/// No agent came back to this process: the row keeps what was known and says so.
fn gone(previous: &ProxyStatusStatus, inputs: Inputs<'_>) -> Row {
    let lost = Verdict::not_connected(
        inputs.obstacle,
        "AgentDisconnected",
        "The agent has not connected since the controller started; the kernel keeps what it held.",
    );
    let ready = Verdict::new("False", lost.reason.clone(), lost.message.clone());
    let mut status = previous.clone();
    status.observed_generation = inputs.row_generation;
    State::Stale.as_str().clone_into(&mut status.state);
    if let Some(agent) = &mut status.agent
        && agent.connected_to.take().is_some()
    {
        agent.since = Some(api_time(inputs.now));
    }
    replace_conditions(&mut status, [("Ready", ready), ("Connected", lost)], inputs);
    Row { status, state: State::Stale, check_after: None, confirmed: true }
}

/// The agent has not come back yet. A row that says the node is ready would claim more than is known; one that already
/// says what is wrong stays.
fn awaited(previous: &ProxyStatusStatus, inputs: Inputs<'_>) -> Row {
    let ready = previous.conditions.iter().find(|condition| condition.type_ == "Ready");
    if ready.is_some_and(|ready| ready.status == "False") {
        return carried_over(previous, DISCONNECT_GRACE);
    }
    let message =
        "The controller restarted and has not heard from the agent yet; the kernel keeps what it held.";
    let unknown = || Verdict::new("Unknown", "AwaitingAgent", message);
    let mut status = previous.clone();
    status.observed_generation = inputs.row_generation;
    State::Unknown.as_str().clone_into(&mut status.state);
    replace_conditions(&mut status, [("Ready", unknown()), ("Connected", unknown())], inputs);
    Row { status, state: State::Unknown, check_after: Some(DISCONNECT_GRACE), confirmed: true }
}

fn replace_conditions<const N: usize>(
    status: &mut ProxyStatusStatus,
    verdicts: [(&str, Verdict); N],
    inputs: Inputs<'_>,
) {
    for (kind, verdict) in verdicts {
        let condition = merge(kind, verdict, inputs);
        match status.conditions.iter_mut().find(|known| known.type_ == kind) {
            Some(known) => *known = condition,
            None => status.conditions.push(condition),
        }
    }
}

fn absent(inputs: Inputs<'_>) -> Row {
    let message = "No agent of this node has connected. Check that the node agent's pod runs on it.";
    let not_connected = || Verdict::not_connected(inputs.obstacle, "NoAgent", message);
    let unknown = || Verdict::new("Unknown", "NoAgent", message);
    let verdicts = Verdicts {
        connected: not_connected(),
        programmed: unknown(),
        consistent: unknown(),
        exclusive: unknown(),
        local_detection: unknown(),
        kernel_settings: unknown(),
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
    let Verdicts { connected, programmed, consistent, exclusive, local_detection, kernel_settings } =
        verdicts;
    [
        ("Ready", ready),
        ("Connected", connected),
        ("Programmed", programmed),
        ("Consistent", consistent),
        ("Exclusive", exclusive),
        ("LocalDetection", local_detection),
        ("KernelSettings", kernel_settings),
    ]
    .into_iter()
    .map(|(kind, verdict)| merge(kind, verdict, inputs))
    .collect()
}

/// The transition time is that of the previous condition while the status stays the same.
fn merge(kind: &str, verdict: Verdict, inputs: Inputs<'_>) -> Condition {
    let known = inputs
        .previous
        .and_then(|previous| previous.conditions.iter().find(|condition| condition.type_ == kind))
        .filter(|condition| condition.status == verdict.status);
    Condition {
        type_: kind.to_owned(),
        status: verdict.status.to_owned(),
        reason: verdict.reason.into_owned(),
        message: verdict.message,
        observed_generation: inputs.row_generation,
        last_transition_time: known
            .map_or(Time(inputs.now), |condition| condition.last_transition_time.clone()),
    }
}

/// The API keeps whole seconds; finer times would make every row differ from what was read back.
pub(super) fn api_time(time: Timestamp) -> Time {
    Time(Timestamp::from_second(time.as_second()).unwrap_or(time))
}

/// Generations and counters are 63 bits in the API.
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
