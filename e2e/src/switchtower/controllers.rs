//! The processes of controllers: one replica, or two.

use std::time::Duration;

use super::*;

const SECOND_PORT: u16 = 9453;

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

    /// Sends a signal to the first replica (0) or the second (1) and leaves it alone.
    pub fn signal_replica(&self, number: usize, signal: i32) {
        let process = if number == 0 { &self.controller } else { &self.second };
        if let Some(process) = lock(process).as_ref() {
            process.signal(signal);
        }
    }

    /// Waits until a replica exits, and starts it again.
    ///
    /// # Errors
    /// It does not exit, or the program does not start.
    pub fn restart_replica(&self, number: usize) -> Result<()> {
        let process = if number == 0 { &self.controller } else { &self.second };
        if let Some(process) = lock(process).take() {
            process.wait(Duration::from_secs(15))?;
        }
        if number == 0 { self.start_controller() } else { self.start_second() }
    }

    /// Sends a signal to the first replica and leaves it alone.
    pub fn signal_controller(&self, signal: i32) {
        self.signal_replica(0, signal);
    }

    pub(super) fn controller_process(
        &self,
        number: u8,
        listen: SocketAddr,
        metrics: SocketAddr,
        admin: SocketAddr,
    ) -> Result<Process> {
        let kubeconfig = self.controller_kubeconfig()?;
        let mut command = Command::new(programs::workspace("switchtower-controller")?);
        command.arg("--kubeconfig").arg(kubeconfig);
        command.arg("--listen").arg(listen.to_string());
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
