//! What goes into the engine and what comes out of it.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use switchtower_proto::v1::{
    Ack, Deviations, HealthCheckFailure, Nack, Part, Query, Report, Stamp as WireStamp, TrialStatus, Update,
    UpdateEnd, View,
};
use tokio::sync::{mpsc, oneshot};

use crate::state::Measured;

/// What the engine is asked to do.
#[derive(Debug)]
pub enum Command {
    /// A session begins: what it does not finish is dropped, and events go to it from now on.
    Attach {
        /// Where events go.
        events: mpsc::UnboundedSender<Event>,
        /// Gets what Hello says.
        standing: oneshot::Sender<Standing>,
    },
    /// The controller continues from the view that Hello named.
    Resumed,
    /// An update begins.
    Begin(Box<Update>),
    /// A part of it.
    Part(Part),
    /// Its end.
    End(UpdateEnd),
    /// The addresses of the node's interfaces changed.
    HostAddresses(Vec<IpAddr>),
    /// Where the controllers are that the session is about to connect to. Dropping `done` says that the kernel lets
    /// these connections pass, as far as that is possible now.
    Controllers {
        /// All that are known.
        addresses: Vec<SocketAddr>,
        /// Dropped when it was attempted.
        done: oneshot::Sender<()>,
    },
    /// Somebody else changed our tables, or may have.
    Drift {
        /// For the report and the metric.
        cause: &'static str,
        /// When; a comparison that began later has seen it.
        noticed: Instant,
    },
    /// Whether kube-proxy's rules exist beside ours; told when it changes.
    ForeignProxy(bool),
    /// The healthCheckNodePorts that cannot be listened on; told when they change.
    HealthCheckFailures(Vec<HealthCheckFailure>),
    /// From the pass over the conntrack table.
    Flows(super::FlowReport),
    /// What a round of probes found.
    Probed {
        /// The round's number.
        number: u64,
        /// The results.
        measured: Vec<Measured>,
    },
    /// A question of the controller.
    Ask {
        /// The question.
        query: Query,
        /// Gets the answer or why there is none.
        answer: crate::kernel::inspector::Reply,
    },
    /// Write the snapshot file and stop. The kernel is left as it is.
    Stop,
}

/// What the engine tells the session; the session number is filled in there.
#[derive(Debug)]
pub enum Event {
    /// The kernel holds a generation.
    Ack(Ack),
    /// An update was refused, or the kernel refuses it for now.
    Nack(Nack),
    /// Drift was repaired, or what stands beside the generations changed.
    Report(Report),
}

/// What Hello says about this node.
#[derive(Debug, Clone, Default)]
pub struct Standing {
    /// The kernel's stamp.
    pub kernel: Option<WireStamp>,
    /// The view that may be resumed.
    pub view: Option<View>,
    /// The addresses of the node's interfaces.
    pub addresses: Vec<IpAddr>,
    /// Where the kernel differs from the view on purpose.
    pub deviations: Option<Deviations>,
    /// Where the last trial of settings stands.
    pub trial: Option<TrialStatus>,
}
