//! What a test asks of both worlds beside the states of a case: one thing at a time, without comparing.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::compare::PATIENCE;
use super::probes::{Origin, Probe};
use super::world::{Side, World};
use crate::lab::wait;
use crate::probe::Outcome;
use crate::probe::volley::{Flow, volley};

/// The same of both worlds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Both<T> {
    /// Where kube-proxy programs the node.
    pub kube_proxy: T,
    /// Where Switchtower does.
    pub switchtower: T,
}

fn word(outcome: &Outcome) -> String {
    outcome.backend().map_or_else(|| outcome.to_string(), str::to_owned)
}

impl World {
    /// In both worlds at the same time.
    fn both<T: Send>(&self, work: impl Fn(Side) -> Result<T> + Sync) -> Result<Both<T>> {
        let (kube_proxy, switchtower) = std::thread::scope(|scope| {
            let theirs = scope.spawn(|| work(Side::KubeProxy));
            let ours = work(Side::Switchtower);
            (theirs.join(), ours)
        });
        let kube_proxy = kube_proxy.map_err(|_| anyhow::anyhow!("a probing thread panicked"))??;
        Ok(Both { kube_proxy, switchtower: switchtower? })
    }

    /// Sends one packet of a probe's kind after each pause: the pods that answered, or what came back instead.
    ///
    /// # Errors
    /// A probe could not be sent.
    pub fn ask_with_pauses(&self, probe: &Probe, pauses: &[Duration]) -> Result<Both<Vec<String>>> {
        self.both(|side| {
            let once = |pause: &Duration| {
                std::thread::sleep(*pause);
                let outcome = volley(&[self.shot(side, probe)], PATIENCE)?.pop().context("no outcome")?;
                Ok(word(&outcome))
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

    /// Sends a datagram on a flow: the pod that answered, or what came back instead.
    ///
    /// # Errors
    /// It could not be sent.
    pub fn ask_flow(&self, flow: &Both<Flow>) -> Result<Both<String>> {
        self.both(|side| {
            let flow = if side == Side::KubeProxy { &flow.kube_proxy } else { &flow.switchtower };
            Ok(word(Flow::ask_all(&[flow], PATIENCE)?.first().context("no outcome")?))
        })
    }

    /// Runs lines of `ip -batch` on node n1.
    ///
    /// # Errors
    /// A line was refused.
    pub fn on_node(&self, lines: &str) -> Result<()> {
        self.both(|side| self.namespace(side, Origin::Host).ip(lines)).map(drop)
    }

    /// What node n1 answers to `GET path` on one of its addresses. An error is a text too.
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

    /// Writes the Node n1, which was deleted, again. The agent's Pod was bound to the old one: its DaemonSet would make
    /// a new one.
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

    /// Deletes the proxies' IPv4 tables on node n1, as somebody else might.
    ///
    /// # Errors
    /// A table is not there.
    pub fn delete_tables(&self) -> Result<()> {
        self.both(|side| {
            let table = if side == Side::KubeProxy { "kube-proxy" } else { "switchtower" };
            self.namespace(side, Origin::Host).output("nft", &["delete", "table", "ip", table])
        })
        .map(drop)
    }

    /// Brings kube-proxy back to order after [`World::delete_tables`].
    ///
    /// # Errors
    /// It does not start.
    pub fn repair_kube_proxy(&mut self) -> Result<()> {
        self.restart_kube_proxy(&self.settings().clone())
    }
}
