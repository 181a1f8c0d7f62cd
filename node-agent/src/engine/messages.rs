//! Input and output of the engine.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use switchtower_proto::v1::{
    Ack, Deviations, DriftCause, HealthCheckFailure, Nack, Part, ProxyMode, Query, Report,
    Stamp as WireStamp, TrialStatus, Update, UpdateEnd, View,
};
use tokio::sync::{mpsc, oneshot};

use crate::drain::server::ListenFailure;
use crate::health::BindFailures;
use crate::state::Measured;

/// Input of the engine.
#[derive(Debug)]
pub enum Command {
    /// A session begins: an unfinished update of an earlier session is dropped.
    Attach {
        /// Receives all events from now on.
        events: mpsc::UnboundedSender<Event>,
        /// Receives the status for Hello.
        status: oneshot::Sender<AgentStatus>,
    },
    /// The controller resumes from the view that Hello named.
    Resumed,
    /// Start of an update.
    Begin(Box<Update>),
    /// Part of the current update.
    Part(Part),
    /// End of the current update.
    End(UpdateEnd),
    /// The operator releases held removals.
    ReleaseHeld {
        /// Removals of generations below this are released.
        before: u64,
    },
    /// The addresses of the node's interfaces changed.
    HostAddresses(Vec<IpAddr>),
    /// The session is about to connect to a controller: no frontend may capture these connections.
    Controllers {
        /// All known addresses of controllers.
        addresses: Vec<SocketAddr>,
        /// Dropped after the attempt to remove such frontends.
        done: oneshot::Sender<()>,
    },
    /// Another program changed our tables, or may have.
    Drift {
        /// Cause in the report and the metric.
        cause: DriftCause,
        /// Time of the notice; a comparison that began later covers it.
        noticed: Instant,
    },
    /// Rules of another kube-proxy appeared (true) or disappeared.
    ForeignProxy(bool),
    /// The set of healthCheckNodePorts that cannot be bound changed.
    HealthCheckFailures(Vec<HealthCheckFailure>),
    /// The agent can listen for the drain gate, or cannot for this reason.
    DrainGate(Option<String>),
    /// Message of a pass over the conntrack table.
    Flows(crate::kernel::conntrack::FlowReport),
    /// Result of a round of probes.
    Probed {
        /// Number of the round.
        number: u64,
        /// One result per probe.
        measured: Vec<Measured>,
    },
    /// Query of the controller.
    Ask {
        /// The query.
        query: Query,
        /// Receives the answer or an error.
        answer: crate::kernel::inspector::Reply,
    },
    /// Write the snapshot file and stop; the kernel keeps its state.
    Stop,
}

impl From<BindFailures> for Command {
    fn from(BindFailures(failures): BindFailures) -> Self {
        Command::HealthCheckFailures(failures)
    }
}

impl From<ListenFailure> for Command {
    fn from(ListenFailure(failure): ListenFailure) -> Self {
        Command::DrainGate(failure)
    }
}

/// Output of the engine; the session fills in its number.
#[derive(Debug)]
pub enum Event {
    /// The kernel holds a generation.
    Ack(Ack),
    /// An update was refused, or its commit failed.
    Nack(Nack),
    /// Drift was repaired, or a condition outside the generations changed.
    Report(Report),
}

/// Status of this node in Hello.
#[derive(Debug, Clone, Default)]
pub struct AgentStatus {
    /// Stamp of the kernel's tables.
    pub kernel: Option<WireStamp>,
    /// View that the controller may resume.
    pub view: Option<View>,
    /// Addresses of the node's interfaces.
    pub addresses: Vec<IpAddr>,
    /// Intended differences between the kernel and the view.
    pub deviations: Option<Deviations>,
    /// Status of the last trial of settings.
    pub trial: Option<TrialStatus>,
    /// Mode of the settings in force.
    pub mode: ProxyMode,
}
