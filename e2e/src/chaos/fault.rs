//! The faults: what each does to the fleet, and how it is repaired.

use std::time::Duration;

use anyhow::{Context as _, Result};
use k8s_openapi::api::coordination::v1::Lease;

use crate::lab::forwarder::{Condition, Direction};
use crate::switchtower::{Fleet, FleetNode, NAMESPACE};

/// Delay of each message on a slow link.
const DELAY: Duration = Duration::from_millis(400);
/// Duration of a fault that parts of the system must notice.
const LONG: Duration = Duration::from_secs(12);
/// Duration of a fault that ends with a restart.
const SHORT: Duration = Duration::from_secs(3);

/// Processes of the product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Process {
    Agent,
    Replica,
}

/// Links between programs. A link of an agent is that to both replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    AgentToReplicas,
    ReplicaToApiServer,
    ReplicasToApiServer,
    BetweenReplicas,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    Killed(Process),
    Terminated(Process),
    Paused(Process),
    BothReplicasKilled,
    /// A replica is started with a clock that is wrong by this many minutes.
    WrongClock(i32),
    ApiServerPaused,
    LeasesDeleted,
    Broken(Link, Condition),
}

/// Every fault, in the order of the table.
pub(super) const ALL: &[Fault] = &[
    Fault::Broken(Link::ReplicaToApiServer, Condition::Cut),
    Fault::Broken(Link::AgentToReplicas, Condition::Cut),
    Fault::Broken(Link::AgentToReplicas, Condition::Silent),
    Fault::Broken(Link::AgentToReplicas, Condition::HalfOpen(Direction::ToServer)),
    Fault::Broken(Link::AgentToReplicas, Condition::HalfOpen(Direction::ToClient)),
    Fault::Broken(Link::AgentToReplicas, Condition::Slow(DELAY)),
    Fault::Broken(Link::ReplicaToApiServer, Condition::Silent),
    Fault::Broken(Link::ReplicaToApiServer, Condition::HalfOpen(Direction::ToServer)),
    Fault::Broken(Link::ReplicaToApiServer, Condition::HalfOpen(Direction::ToClient)),
    Fault::Broken(Link::ReplicaToApiServer, Condition::Slow(DELAY)),
    Fault::Broken(Link::ReplicasToApiServer, Condition::Cut),
    Fault::Broken(Link::BetweenReplicas, Condition::Cut),
    Fault::Broken(Link::BetweenReplicas, Condition::Silent),
    Fault::Killed(Process::Agent),
    Fault::Terminated(Process::Agent),
    Fault::Paused(Process::Agent),
    Fault::Killed(Process::Replica),
    Fault::Terminated(Process::Replica),
    Fault::Paused(Process::Replica),
    Fault::BothReplicasKilled,
    Fault::WrongClock(50),
    Fault::WrongClock(-50),
    Fault::ApiServerPaused,
    Fault::LeasesDeleted,
];

/// Which faults a run injects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// One of each kind.
    Short,
    /// All variants.
    Complete,
}

impl Extent {
    /// Returns its faults.
    pub(super) fn faults(self) -> impl Iterator<Item = Fault> {
        ALL.iter().copied().filter(move |fault| self == Self::Complete || !fault.is_variant())
    }
}

/// What a fault concerns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// Nothing but the node.
    Node,
    Fleet,
}

/// A fault and what it concerns.
#[derive(Debug, Clone, Copy)]
pub(super) struct Injection {
    pub(super) fault: Fault,
    /// Index of the node whose agent is concerned.
    pub(super) node: usize,
    /// The replica that is concerned: that of the node.
    pub(super) replica: usize,
}

impl Fault {
    /// Name in the table.
    pub fn name(self) -> String {
        let process = |process| match process {
            Process::Agent => "agent",
            Process::Replica => "replica",
        };
        match self {
            Self::Killed(one) => format!("{} killed", process(one)),
            Self::Terminated(one) => format!("{} terminated", process(one)),
            Self::Paused(one) => format!("{} paused", process(one)),
            Self::BothReplicasKilled => "both replicas killed".to_owned(),
            Self::WrongClock(minutes) => format!("clock of a replica wrong by {minutes:+} min"),
            Self::ApiServerPaused => "API server paused".to_owned(),
            Self::LeasesDeleted => "all Leases deleted".to_owned(),
            Self::Broken(link, condition) => format!("{}: {}", link.name(), name(condition)),
        }
    }

    /// Time from the injection to the repair.
    pub(super) fn duration(self) -> Duration {
        match self {
            Self::Killed(_) | Self::Terminated(_) | Self::LeasesDeleted => SHORT,
            Self::Paused(_)
            | Self::BothReplicasKilled
            | Self::WrongClock(_)
            | Self::ApiServerPaused
            | Self::Broken(..) => LONG,
        }
    }

    /// Returns true if another fault covers it approximately.
    fn is_variant(self) -> bool {
        match self {
            Self::WrongClock(minutes) => minutes < 0,
            Self::Broken(Link::ReplicaToApiServer, condition) => condition != Condition::Silent,
            Self::Broken(Link::BetweenReplicas, condition) => condition != Condition::Cut,
            _ => false,
        }
    }

    /// What it concerns.
    pub(super) fn scope(self) -> Scope {
        match self {
            Self::Killed(Process::Agent)
            | Self::Terminated(Process::Agent)
            | Self::Paused(Process::Agent)
            | Self::Broken(Link::AgentToReplicas, _) => Scope::Node,
            _ => Scope::Fleet,
        }
    }

    /// Returns true if the replica of a node cannot write its row: the row reports the truth by its expiry.
    pub fn prevents_rows(self) -> bool {
        matches!(
            self,
            Self::BothReplicasKilled
                | Self::ApiServerPaused
                | Self::Killed(Process::Replica)
                | Self::Paused(Process::Replica)
                | Self::Broken(Link::ReplicasToApiServer, _)
        )
    }

    /// Returns true if agents of the concerned replica leave it, once their stream is a minute old.
    pub(super) fn makes_a_replica_stale(self) -> bool {
        matches!(self, Self::Broken(Link::ReplicaToApiServer, condition) if !matches!(condition, Condition::Slow(_)))
    }
}

impl Link {
    fn name(self) -> &'static str {
        match self {
            Self::AgentToReplicas => "agent – replicas",
            Self::ReplicaToApiServer => "replica – API server",
            Self::ReplicasToApiServer => "both replicas – API server",
            Self::BetweenReplicas => "replica – replica",
        }
    }
}

fn name(condition: Condition) -> String {
    match condition {
        Condition::Whole => "whole".to_owned(),
        Condition::Cut => "cut".to_owned(),
        Condition::Silent => "half-open".to_owned(),
        Condition::HalfOpen(Direction::ToServer) => "half-open, only replies pass".to_owned(),
        Condition::HalfOpen(Direction::ToClient) => "half-open, only requests pass".to_owned(),
        Condition::Slow(delay) => format!("{} ms slower", delay.as_millis()),
    }
}

impl Injection {
    fn node<'a>(&self, fleet: &'a Fleet) -> &'a FleetNode {
        &fleet.nodes()[self.node]
    }

    /// Injects the fault.
    ///
    /// # Errors
    /// The laboratory does not allow it.
    pub(super) fn inject(&self, fleet: &Fleet) -> Result<()> {
        match self.fault {
            Fault::Killed(process) => self.signal(fleet, process, libc::SIGKILL),
            Fault::Terminated(process) => self.signal(fleet, process, libc::SIGTERM),
            Fault::Paused(process) => self.signal(fleet, process, libc::SIGSTOP),
            Fault::BothReplicasKilled => {
                (0..2).for_each(|replica| fleet.signal_replica(replica, libc::SIGKILL));
                Ok(())
            }
            Fault::ApiServerPaused => {
                fleet.control_plane().api_server().signal(libc::SIGSTOP);
                Ok(())
            }
            Fault::WrongClock(minutes) => {
                let offset = format!("{minutes:+}m");
                fleet.set_controller_environment(&[
                    // The dynamic linker expands $LIB.
                    ("LD_PRELOAD", "/usr/$LIB/faketime/libfaketimeMT.so.1"),
                    ("FAKETIME", &offset),
                    ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
                ]);
                fleet.signal_replica(self.replica, libc::SIGTERM);
                let restarted = fleet.restart_replica(self.replica);
                fleet.set_controller_environment(&[]);
                restarted
            }
            Fault::LeasesDeleted => {
                for name in ["", "-controller-0", "-controller-1"] {
                    fleet.kube().delete::<Lease>(NAMESPACE, &format!("switchtower-controller{name}"))?;
                }
                Ok(())
            }
            Fault::Broken(link, condition) => match link {
                Link::AgentToReplicas => fleet.set_agent_links(self.node(fleet), condition),
                Link::ReplicaToApiServer => fleet.set_upstream(self.replica, condition),
                Link::ReplicasToApiServer => {
                    (0..2).try_for_each(|replica| fleet.set_upstream(replica, condition))
                }
                Link::BetweenReplicas => fleet.set_replica_links(condition),
            },
        }
    }

    /// Repairs it: restarts what ended, continues what is paused, makes links whole.
    ///
    /// # Errors
    /// A program does not start.
    pub(super) fn repair(&self, fleet: &Fleet) -> Result<()> {
        match self.fault {
            Fault::Killed(Process::Agent) | Fault::Terminated(Process::Agent) => {
                // Reaps the process.
                fleet.stop_agent(self.node(fleet), libc::SIGKILL)?;
                fleet.run_agent(self.node(fleet))
            }
            Fault::Killed(Process::Replica) | Fault::Terminated(Process::Replica) => {
                fleet.restart_replica(self.replica)
            }
            Fault::WrongClock(_) => {
                fleet.signal_replica(self.replica, libc::SIGTERM);
                fleet.restart_replica(self.replica)
            }
            Fault::Paused(process) => self.signal(fleet, process, libc::SIGCONT),
            Fault::BothReplicasKilled => (0..2).try_for_each(|replica| fleet.restart_replica(replica)),
            Fault::ApiServerPaused => {
                fleet.control_plane().api_server().signal(libc::SIGCONT);
                Ok(())
            }
            Fault::LeasesDeleted => Ok(()),
            Fault::Broken(..) => {
                fleet.heal_links();
                Ok(())
            }
        }
    }

    fn signal(&self, fleet: &Fleet, process: Process, signal: i32) -> Result<()> {
        match process {
            Process::Agent => fleet.signal_agent(self.node(fleet), signal).context("the agent does not run"),
            Process::Replica => {
                fleet.signal_replica(self.replica, signal);
                Ok(())
            }
        }
    }
}
