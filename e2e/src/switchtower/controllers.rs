//! The processes of controllers: one replica, or two.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::ensure;

use super::*;

pub(super) const SECOND_PORT: u16 = 9453;
/// Time for a replica to appear in the ConfigMap, or to disappear from it.
const LISTED: Duration = Duration::from_secs(30);
/// Number of agents that are restarted until both replicas serve some.
const MAXIMUM_MOVES: usize = 20;
/// Time for a restarted agent and its row to agree.
const MOVED: Duration = Duration::from_secs(120);

impl Fleet {
    /// Starts a second replica on a port of its own.
    ///
    /// # Errors
    /// The program does not start.
    pub fn start_second(&self) -> Result<()> {
        let listen = (self.lab.root_address(), SECOND_PORT).into();
        let process = self.controller_process(1, listen, self.second_metrics, self.second_admin)?;
        *lock(&self.second) = Some(process);
        Ok(())
    }

    /// Address that agents connect to on the second replica.
    pub fn second_address(&self) -> SocketAddr {
        (self.lab.root_address(), SECOND_PORT).into()
    }

    pub(super) fn only_second_runs(&self) -> bool {
        let runs = |process: &Mutex<Option<Process>>| {
            lock(process)
                .as_ref()
                .is_some_and(|process| process.check_running().is_ok() && !is_stopped(process.id()))
        };
        !runs(&self.controller) && runs(&self.second)
    }

    fn replica(&self, number: usize) -> &Mutex<Option<Process>> {
        if number == 0 { &self.controller } else { &self.second }
    }

    /// Sends a signal to the first replica (0) or the second (1) and leaves it alone.
    pub fn signal_replica(&self, number: usize, signal: i32) {
        if let Some(process) = lock(self.replica(number)).as_ref() {
            process.signal(signal);
        }
    }

    /// Waits until a replica exits, and starts it again.
    ///
    /// # Errors
    /// It does not exit, or the program does not start.
    pub fn restart_replica(&self, number: usize) -> Result<()> {
        if let Some(process) = lock(self.replica(number)).take() {
            process.wait(Duration::from_secs(15))?;
        }
        if number == 0 { self.start_controller() } else { self.start_second() }
    }

    /// Waits until the bootstrap ConfigMap lists the first replicas up to this number, and no other.
    ///
    /// # Errors
    /// It does not in time.
    pub fn listed(&self, replicas: usize) -> Result<()> {
        let wanted: BTreeSet<u16> = [CONTROLLER_PORT, SECOND_PORT].into_iter().take(replicas).collect();
        wait::until(&format!("the ConfigMap lists {wanted:?}"), LISTED, || {
            let map: Option<ConfigMap> = self.kube().get(NAMESPACE, "switchtower-bootstrap")?;
            let controllers = map.and_then(|map| map.data?.remove("controllers")).unwrap_or_default();
            let found: BTreeSet<u16> =
                controllers.lines().filter_map(|line| line.rsplit_once(':')?.1.parse().ok()).collect();
            ensure!(found == wanted, "it lists {controllers:?}");
            Ok(())
        })
    }

    /// Name of the replica that serves a node, according to its row.
    ///
    /// # Errors
    /// The row names none.
    pub fn replica_of(&self, node: &FleetNode) -> Result<String> {
        let name = &node.net.name;
        Ok(self.row(name)?.connection.with_context(|| format!("no replica serves {name}"))?.replica)
    }

    /// Number of the replica that serves a node.
    ///
    /// # Errors
    /// As [`Fleet::replica_of`], or the replica is none of this fleet.
    pub fn replica_number(&self, node: &FleetNode) -> Result<usize> {
        let name = self.replica_of(node)?;
        let number = name.strip_prefix("controller-").and_then(|number| number.parse().ok());
        number.with_context(|| format!("{name} serves {}", node.net.name))
    }

    /// Restarts agents until both replicas serve some.
    ///
    /// # Errors
    /// All agents choose the same replica again and again.
    pub fn spread(&self) -> Result<()> {
        for attempt in 0..MAXIMUM_MOVES {
            let served: Result<Vec<_>> = self.nodes.iter().map(|node| self.replica_of(node)).collect();
            let served = served?;
            if served.iter().any(|name| *name != served[0]) {
                return Ok(());
            }
            let node = &self.nodes[attempt % self.nodes.len()];
            self.stop_agent(node, libc::SIGKILL)?;
            self.run_agent(node)?;
            self.settled(MOVED)?;
        }
        anyhow::bail!("all agents chose the same replica after {MAXIMUM_MOVES} moves")
    }

    /// Sends a signal to the first replica and leaves it alone.
    pub fn signal_controller(&self, signal: i32) {
        self.signal_replica(0, signal);
    }

    pub(super) fn controller_process(
        &self,
        number: usize,
        listen: SocketAddr,
        metrics: SocketAddr,
        admin: SocketAddr,
    ) -> Result<Process> {
        let kubeconfig = self.controller_kubeconfig(number)?;
        let mut command = Command::new(programs::workspace("switchtower-controller")?);
        command.arg("--kubeconfig").arg(kubeconfig);
        command.arg("--listen").arg(listen.to_string());
        if let Some(links) = &self.links {
            command.arg("--advertise").arg(links.replica(number).to_string());
        }
        command.arg("--metrics-listen").arg(metrics.to_string());
        command.arg("--admin-listen").arg(admin.to_string());
        command.args(["--namespace", NAMESPACE, "--replica", &format!("controller-{number}")]);
        // After SIGKILL the next one waits for so long.
        command.args(["--lease-seconds", "5"]);
        let name = if number == 0 { "controller.log".to_owned() } else { format!("controller-{number}.log") };
        command.envs(lock(&self.environment).iter().cloned());
        Process::start("switchtower-controller", command, &self.lab.directory().join(name))
    }
}

/// Returns true if a signal stopped the process.
fn is_stopped(id: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
}
