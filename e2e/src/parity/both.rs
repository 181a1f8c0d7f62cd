//! Single operations on both worlds, for tests that need more than the states of a case; nothing is compared.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::compare::TIMEOUT;
use super::probes::{Origin, Probe};
use super::world::{Side, World};
use crate::lab::wait;
use crate::probe::ProbeResult;
use crate::probe::volley::{Flow, volley};

/// Results of the same operation in both worlds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Both<T> {
    pub kube_proxy: T,
    pub switchtower: T,
}

fn outcome_text(outcome: &ProbeResult) -> String {
    outcome.backend().map_or_else(|| outcome.to_string(), str::to_owned)
}

impl World {
    /// Runs `work` in both worlds at the same time.
    fn both<T: Send>(&self, work: impl Fn(Side) -> Result<T> + Sync) -> Result<Both<T>> {
        let (kube_proxy, switchtower) = std::thread::scope(|scope| {
            let theirs = scope.spawn(|| work(Side::KubeProxy));
            let ours = work(Side::Switchtower);
            (theirs.join(), ours)
        });
        let kube_proxy = kube_proxy.map_err(|_| anyhow::anyhow!("a probing thread panicked"))??;
        Ok(Both { kube_proxy, switchtower: switchtower? })
    }

    /// Sends one packet of a probe's kind after each pause. Returns the backends, or the outcomes without one.
    ///
    /// # Errors
    /// A probe could not be sent.
    pub fn ask_with_pauses(&self, probe: &Probe, pauses: &[Duration]) -> Result<Both<Vec<String>>> {
        self.both(|side| {
            let once = |pause: &Duration| {
                std::thread::sleep(*pause);
                let outcome = volley(&[self.shot(side, probe)], TIMEOUT)?.pop().context("no outcome")?;
                Ok(outcome_text(&outcome))
            };
            self.namespace(side, probe.origin).run(|| pauses.iter().map(once).collect::<Result<Vec<_>>>())?
        })
    }

    /// Opens a UDP flow to a probe's destination.
    ///
    /// # Errors
    /// A socket cannot be opened.
    pub fn open_flow(&self, probe: &Probe) -> Result<Both<Flow>> {
        self.both(|side| {
            let port = self.source_port(side, probe.origin);
            self.namespace(side, probe.origin).run(|| Flow::open(probe.to, port))?
        })
    }

    /// Sends a datagram on a flow. Returns the backend, or the outcome without one.
    ///
    /// # Errors
    /// It could not be sent.
    pub fn ask_flow(&self, flow: &Both<Flow>) -> Result<Both<String>> {
        self.both(|side| {
            let flow = if side == Side::KubeProxy { &flow.kube_proxy } else { &flow.switchtower };
            Ok(outcome_text(Flow::ask_all(&[flow], TIMEOUT)?.first().context("no outcome")?))
        })
    }

    /// Runs lines of `ip -batch` on node n1.
    ///
    /// # Errors
    /// A line was rejected.
    pub fn on_node(&self, lines: &str) -> Result<()> {
        self.both(|side| self.namespace(side, Origin::Host).ip(lines)).map(drop)
    }

    /// Response of node n1 to `GET path` on one of its addresses. An error is returned as text too.
    ///
    /// # Errors
    /// A namespace could not be entered.
    pub fn ask_node(&self, to: SocketAddr, path: &str) -> Result<Both<String>> {
        let url = format!("http://{to}{path}");
        self.both(|side| {
            let arguments = ["-s", "-i", "-m", "3", "-w", "\n%{errormsg}", &url];
            let mut command = std::process::Command::new("curl");
            command.args(arguments);
            self.namespace(side, Origin::Host).wrap(&mut command);
            let output = command.output().context("starting curl")?;
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        })
    }

    /// Creates the deleted Node n1 again. The agent's Pod was bound to the old Node: its DaemonSet would create a new
    /// Pod.
    ///
    /// # Errors
    /// The API server refuses, or the agent does not start or gets no view.
    pub fn make_node_again(&self) -> Result<()> {
        let node = self.fleet.nodes().first().context("no node")?;
        self.fleet.register(node)?;
        self.fleet.stop_agent(node, libc::SIGTERM)?;
        self.fleet.start_agent(node)?;
        wait::until("node n1 is served again", Duration::from_secs(60), || self.fleet.agrees(node))
    }

    /// All of nf_tables on node n1, as `nft` prints it.
    ///
    /// # Errors
    /// `nft` fails.
    pub fn rulesets(&self) -> Result<Both<String>> {
        self.both(|side| self.ruleset(side))
    }

    /// Deletes the proxies' IPv4 tables on node n1, as a foreign program might.
    ///
    /// # Errors
    /// A table does not exist.
    pub fn delete_tables(&self) -> Result<()> {
        self.both(|side| {
            let table = if side == Side::KubeProxy { "kube-proxy" } else { "switchtower" };
            self.namespace(side, Origin::Host).output("nft", &["delete", "table", "ip", table])
        })
        .map(drop)
    }

    /// Restores kube-proxy after [`World::delete_tables`].
    ///
    /// # Errors
    /// It does not start.
    pub fn repair_kube_proxy(&mut self) -> Result<()> {
        self.restart_kube_proxy(&self.settings().clone())
    }
}
